"""The tokenizer and the chat templates against transformers, on Novelist's tokenizer and on one made here."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from penjing.errors import BadCheckpoint, BadInput
from penjing.models.tokenizer import Tokenizer

NOVELIST = Path(__file__).parents[2] / "examples" / "novelist"
TEXTS = [
    "It was the best of times,",
    " leading space",
    "",
    "naïve café – “quoted” 中文 🎄",
    "tab\tand\nline\n\n",
    "<s>x</s>",
]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
        {{ raise_exception('unknown role ' + message['role']) }}
    {% endif %}
    {% if loop.index0 > 7 %}{% break %}{% endif %}
<|{{ message.role }}|>
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% else %}
{{ message.content | trim }}{% endif %}
{% if message.tool_calls is defined %}{{ message.tool_calls | tojson(indent=2) }}{% endif %}
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% set ns = namespace(count=messages | length) %}{{ ns.count }}{{ strftime_now('%Y') | length }}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def spm_like(folder: Path, **config: Any) -> Path:
    """Like Llama 2's: spaces as ▁, a byte for what is not in the vocabulary, the leading space dropped on decoding."""
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("o", "r"), ("▁", "w"), ("▁w", "or"), ("l", "d")]
    vocabulary += [left + right for left, right in pairs]
    ids = {token: index for index, token in enumerate(vocabulary)}
    backend = Backend(models.BPE(ids, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def oracle(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


CONFIGS: dict[str, dict[str, Any]] = {
    "as-in-file": {},
    "no-bos": {"add_bos_token": False},
    "both-ends": {"add_bos_token": True, "add_eos_token": True},
    "objects": {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "add_bos_token": True},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("text", TEXTS)
def test_encoding_equals_transformers(config: str, text: str, tmp_path: Path) -> None:
    folder = spm_like(tmp_path / "m", **CONFIGS[config])
    mine, theirs = Tokenizer(folder), oracle(folder)
    for special in (True, False):
        assert mine.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)
    ids = mine.encode(text)
    for skip in (True, False):
        right = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert mine.decode(ids, skip_special_tokens=skip) == right


@pytest.mark.parametrize("text", TEXTS)
def test_novelists_tokenizer_equals_transformers(text: str) -> None:
    mine, theirs = Tokenizer(NOVELIST), oracle(NOVELIST)
    assert mine.encode(text) == theirs.encode(text)
    assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert mine.vocab_size == len(theirs) == 4096
    assert mine.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=40))
def test_pieces_of_any_byte_level_tokens_make_up_the_whole(ids: list[int]) -> None:
    check_pieces(NOVELIST_TOKENIZER, ids)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_pieces_of_any_text_in_byte_tokens_make_up_the_whole(spm: Tokenizer, text: str) -> None:
    check_pieces(spm, spm.encode(text))


NOVELIST_TOKENIZER = Tokenizer(NOVELIST)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(spm_like(tmp_path_factory.mktemp("spm")))


def check_pieces(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.detokenizer()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    ids = NOVELIST_TOKENIZER.encode("a 🎄 b")
    stream = NOVELIST_TOKENIZER.detokenizer()
    pieces = [stream.push(token) for token in ids]
    assert "�" not in "".join(pieces)
    assert any("🎄" in piece for piece in pieces)
    assert "" in pieces, "the tree has four bytes and no token of its own"
    assert stream.flush() == ""


def test_a_stream_after_a_prompt_keeps_the_first_words_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer(spm_like(tmp_path / "m"))
    prompt, answer = tokenizer.encode("the"), tokenizer.encode("world", add_special_tokens=False)
    stream = tokenizer.detokenizer(prompt)
    assert "".join(stream.push(token) for token in answer) + stream.flush() == " world"


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "  What is a pot? "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<Hi> & 'bye' – 中文"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"ä": "<1>"}}]},
        {"role": "tool", "content": "3"},
    ],
    [{"role": "user", "content": str(n)} for n in range(12)],
]


@pytest.mark.parametrize("where", ["jinja-file", "config", "config-list"])
@pytest.mark.parametrize("conversation", range(len(CONVERSATIONS)))
def test_chat_template_equals_transformers(where: str, conversation: int, tmp_path: Path) -> None:
    given_in = {
        "config": {"chat_template": TEMPLATE},
        "config-list": {"chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "x", "template": "x"}]},
        "jinja-file": {},
    }[where]
    folder = spm_like(tmp_path / "m", **given_in)
    if where == "jinja-file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    messages = CONVERSATIONS[conversation]
    tools = [{"type": "function", "function": {"name": "f", "description": "<f>", "parameters": {}}}]
    for prompt in (True, False):
        right = oracle(folder).apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        assert Tokenizer(folder).render_chat(messages, tools=tools, add_generation_prompt=prompt) == right


def test_templates_are_kept_in_their_sandbox(tmp_path: Path) -> None:
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.__base__.__subclasses__() }}",
    ):
        tokenizer = Tokenizer(spm_like(tmp_path / "m", chat_template=attack))
        rendered = ""
        with contextlib.suppress(BadInput):
            rendered = tokenizer.render_chat([{"role": "user", "content": "x"}])
        assert rendered == "", f"{attack} came out as {rendered[:80]!r}"


def test_what_a_template_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    tokenizer = Tokenizer(spm_like(tmp_path / "m", chat_template=TEMPLATE))
    with pytest.raises(BadInput, match="unknown role wizard"):
        tokenizer.render_chat([{"role": "wizard", "content": "x"}])
    with pytest.raises(BadInput, match="no chat template"):
        NOVELIST_TOKENIZER.render_chat([{"role": "user", "content": "x"}])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json: no such file"):
        Tokenizer(tmp_path)
    shutil.copy(NOVELIST / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{% if %}"}')
    with pytest.raises(BadCheckpoint, match="line 1 of the chat template"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_tokens_may_be_numpy_integers() -> None:
    ids = np.array(NOVELIST_TOKENIZER.encode("It was"))
    assert NOVELIST_TOKENIZER.decode(ids) == "It was"
