"""From what a client sends to the tokens that the model reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..models.chat import ChatTemplate
from ..models.tokenizer import Tokenizer

log = logging.getLogger("penjing.serve")


class Prompts:
    """A tokenizer and the way in which conversations are written down.

    chat_template: a file with a Jinja template, which goes before the model's own. A model that has none and gets
    none, such as a base model, reads the contents of the messages one after another, an empty line between them.
    """

    def __init__(
        self, tokenizer: Tokenizer, bos_token_id: int | None = None, chat_template: Path | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._bos = bos_token_id
        self._said = False
        if chat_template is not None:
            try:
                source = chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise BadInput(
                    f"--chat-template {chat_template}: {error}; a file with a Jinja template is needed"
                ) from None
            tokenizer.chat_template = ChatTemplate(source, str(chat_template))

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text; of an empty one, the token that begins a text, if the model has one."""
        tokens = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return tokens or ([] if self._bos is None else [self._bos])

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of a conversation; raises BadInput if the template refuses it."""
        if not self.has_template:
            if not self._said:
                log.warning(
                    "the model has no chat template: messages are joined by empty lines; --chat-template FILE gives one"
                )
                self._said = True
            text = "\n\n".join(str(message.get("content") or "") for message in messages)
            return self.text(text, add_special_tokens=add_special_tokens is not False)
        # The template writes the special tokens itself.
        reserved = {"messages", "add_generation_prompt", *self.tokenizer.special_tokens}
        extra = {name: value for name, value in (variables or {}).items() if name not in reserved}
        rendered = self.tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt, **extra)
        return self.text(rendered, add_special_tokens=bool(add_special_tokens))
