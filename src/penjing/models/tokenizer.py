"""Text to tokens and back: ``tokenizer.json`` through the tokenizers library, with Hugging Face's conventions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..checkpoint.gguf import GgufFile
from ..checkpoint.gguf.tokenizer import read_tokenizer
from ..errors import BadCheckpoint, BadInput
from .chat import ChatTemplate, read_template
from .reader import read_object

_CONFIG = "tokenizer_config.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a model folder or a GGUF file; raises BadCheckpoint where it is missing or damaged.

    What is put at the ends of a text (a beginning-of-text token, say) is what ``tokenizer.json`` has as its
    post-processor; ``add_bos_token`` of tokenizer_config.json is not read, as in transformers 5.

    special_tokens: ``bos_token`` and so on, as text.  chat_template: None if the model has none.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        within = _of_gguf(folder)
        self.config = json.loads(within["tokenizer_config.json"]) if within else read_object(folder / _CONFIG)
        try:
            self.backend = (
                Backend.from_str(within["tokenizer.json"])
                if within
                else Backend.from_file(str(folder / "tokenizer.json"))
            )
        except Exception as error:  # the library raises plain Exception for every fault
            reason = error if within or (folder / "tokenizer.json").exists() else "no such file"
            raise BadCheckpoint(f"{folder}/tokenizer.json: {reason}; a tokenizers-format file is needed") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special_tokens = _special_tokens(self.config, read_object(folder / "special_tokens_map.json"))
        self.chat_template: ChatTemplate | None = read_template(folder, self.config)

    @property
    def vocab_size(self) -> int:
        """Tokens that text can be made of, added ones included; a model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with ``add_special_tokens`` also what the model expects at its ends."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """Text of a stream of tokens that follow the given ones."""
        return Detokenizer(self, prompt, skip_special_tokens)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model was taught to read it; encode it with ``add_special_tokens=False``.

        variables: what else the template asks for (``tools``, ``enable_thinking``, …), as plain JSON data.
        Raises BadInput if there is no template, or if the template refuses the messages.
        """
        if self.chat_template is None:
            raise BadInput("the model has no chat template; use completions, or add chat_template.jinja to its folder")
        return self.chat_template.render(
            messages, {"add_generation_prompt": add_generation_prompt, **self.special_tokens, **variables}
        )


def _of_gguf(path: Path) -> dict[str, str]:
    """The files that a GGUF file's tokenizer would be; none for a folder."""
    if path.suffix != ".gguf" or not path.is_file():
        return {}
    with GgufFile(path) as file:
        return read_tokenizer(file)


class Detokenizer:
    """Text piece by piece: what was pushed comes out as soon as it is whole UTF-8.

    The pieces and `flush` together are the text of all tokens, as long as that is valid UTF-8: some decoders turn a
    whole run of bytes into U+FFFD once one of them is wrong, which a stream cannot know in time. A token is decoded
    with those before it, because many decoders treat the first token of a text (its leading space) in another way.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Tokens whose text is out, and in front of them, those that only give context; then those held back.
        self._ids = list(prompt[-4:])
        self._shown = len(self._ids)
        self._context = 0

    def _decode(self, end: int | None = None) -> str:
        return self._tokenizer.decode(self._ids[self._context : end], skip_special_tokens=self._skip)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while it ends within a character."""
        self._ids.append(token)
        before, text = self._decode(self._shown), self._decode()
        if len(text) <= len(before) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """The rest at the end of a text, with U+FFFD for an incomplete character."""
        rest = self._decode()[len(self._decode(self._shown)) :]
        self._context = self._shown = len(self._ids)
        return rest


def _special_tokens(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """Named tokens as text; each is given as text or as an object with ``content``."""
    tokens = {}
    for name in _NAMED:
        value = config.get(name, older.get(name))
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens
