"""A GGUF file's tokenizer as Hugging Face's tokenizer.json and tokenizer_config.json.

Files that Penjing wrote hold tokenizer.json itself (key tokenizer.huggingface.json); of others it is put together from
tokens, merges and scores: "gpt2" is byte-level BPE, "llama" SentencePiece's BPE, whose merges follow from the scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import BadCheckpoint, Unsupported, nearest
from .file import GgufFile

# Kinds of tokens, as tokenizer.ggml.token_type numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
JSON, TEMPLATE = "tokenizer.huggingface.json", "tokenizer.chat_template"
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START, _SLASHES = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# llama.cpp's name of a way to split text before BPE → Hugging Face's pattern; the first name of a pattern is written.
PATTERNS = {
    "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_WORDS}|\p{{N}}|{_REST}",
    "tekken": rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}",
    "gpt-4o": (rf"{_START}{_UPPER}*{_LOWER}+{_END}|{_START}{_UPPER}+{_LOWER}*{_END}|\p{{N}}{{1,3}}|{_SLASHES}"),
}
# The names of the same splits that other models' files have.
_ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2", "kormo"), "qwen2"),
    **dict.fromkeys(("llama4",), "gpt-4o"),
    **dict.fromkeys(("default", "gpt2", "phi-2", "olmo", "jina-es", "mpt"), "gpt-2"),
    **dict.fromkeys(("refact", "smollm", "command-r", "codeshell", "exaone", "minerva-7b"), "starcoder"),
}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLITS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTES | {"use_regex": True},
    "starcoder": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
    },
    **{
        name: {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                _BYTES,
            ],
        }
        for name, pattern in PATTERNS.items()
    },
}


def read_tokenizer(file: GgufFile) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, as text; Unsupported names a tokenizer that is not read."""
    read = _Keys(file)
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for name, key in _NAMED.items():
        if (number := file.metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None and number < len(read.tokens):
            config[key] = read.tokens[number]
    if TEMPLATE in file.metadata:
        config["chat_template"] = file.metadata[TEMPLATE]
    whole = file.metadata.get(JSON)
    text = whole if isinstance(whole, str) else json.dumps(_put_together(read), ensure_ascii=False)
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, ensure_ascii=False)}


class _Keys:
    """tokenizer.ggml's lists; BadCheckpoint names the key that is missing or of another length."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.model = file.metadata.get("tokenizer.ggml.model")
        self.tokens: list[str] = self.list("tokens")
        self.kinds: list[int] = self.list("token_type", [NORMAL] * len(self.tokens))

    def get(self, key: str, default: Any) -> Any:
        return self._file.metadata.get(f"tokenizer.ggml.{key}", default)

    def list(self, key: str, default: Sequence[Any] | None = None) -> Any:
        values = self.get(key, default)
        if not isinstance(values, list):
            raise BadCheckpoint(f"{self._file.path}: key tokenizer.ggml.{key} is missing or no list")
        if key not in ("tokens", "merges") and len(values) != len(self.tokens):
            raise BadCheckpoint(
                f"{self._file.path}: key tokenizer.ggml.{key} has {len(values)} entries for {len(self.tokens)} tokens"
            )
        return values

    def error(self, key: str, known: Sequence[str]) -> Unsupported:
        value = self.get(key, None)
        return Unsupported(
            f"{self._file.path}: tokenizer.ggml.{key} = {value!r} is not read; {nearest(str(value), known)}"
        )


def _put_together(read: _Keys) -> dict[str, Any]:
    if read.model not in ("gpt2", "llama"):
        raise read.error("model", ("gpt2", "llama"))
    added = [
        {"id": number, "content": token, "special": kind in (CONTROL, UNKNOWN)}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, (token, kind) in enumerate(zip(read.tokens, read.kinds, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    made = _bytewise(read) if read.model == "gpt2" else _sentencepiece(read)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added} | made


def _bytewise(read: _Keys) -> dict[str, Any]:
    name = read.get("pre", "default")
    name = _ALIASES.get(name, name)
    if name not in SPLITS:
        raise read.error("pre", (*SPLITS, *_ALIASES))
    merges = [merge.split(" ", 1) for merge in read.list("merges")]
    return {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": SPLITS[name],
        "post_processor": _ends(read, read.get("add_bos_token", name == "llama-bpe"), read.get("add_eos_token", False)),
        "decoder": _BYTES | {"use_regex": True},
        "model": _model(read.tokens, merges, ignore_merges=name in ("llama-bpe", "tekken")),
    }


def _sentencepiece(read: _Keys) -> dict[str, Any]:
    """Any two neighbours whose text together is a token may be merged, those of the highest score first."""
    scores = read.list("scores")
    numbers = {token: number for number, token in enumerate(read.tokens)}
    ranked = sorted(
        (-scores[numbers[token]], numbers[token[:cut]], numbers[token[cut:]], token[:cut], token[cut:])
        for token, kind in zip(read.tokens, read.kinds, strict=True)
        if kind in (NORMAL, USER_DEFINED)
        for cut in range(1, len(token))
        if token[:cut] in numbers and token[cut:] in numbers
    )
    prefix = [{"type": "Prepend", "prepend": "▁"}] if read.get("add_space_prefix", True) else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    unknown = next((token for token, kind in zip(read.tokens, read.kinds, strict=True) if kind == UNKNOWN), None)
    model = _model(read.tokens, [[left, right] for *_, left, right in ranked], byte_fallback=True, fuse_unk=True)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "pre_tokenizer": None,
        "post_processor": _ends(read, read.get("add_bos_token", True), read.get("add_eos_token", False)),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model | {"unk_token": unknown},
    }


def _model(tokens: Sequence[str], merges: list[list[str]], **more: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False) | more
    names = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return {"type": "BPE", **names, **flags, "vocab": vocabulary, "merges": merges}


def _ends(read: _Keys, begin: bool, end: bool) -> Mapping[str, Any] | None:
    """What is put before and after a text."""
    wanted = [read.get(f"{name}_token_id", None) if use else None for name, use in (("bos", begin), ("eos", end))]
    special = {number: read.tokens[number] for number in wanted if number is not None}
    if not special:
        return None

    def around(letters: str) -> list[dict[str, Any]]:
        before, after = ([] if n is None else [{"SpecialToken": {"id": special[n], "type_id": 0}}] for n in wanted)
        return [*before, *({"Sequence": {"id": letter, "type_id": 0}} for letter in letters), *after]

    tokens = {token: {"id": token, "ids": [number], "tokens": [token]} for number, token in special.items()}
    return {"type": "TemplateProcessing", "single": around("A"), "pair": around("AB"), "special_tokens": tokens}
