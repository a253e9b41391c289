"""What a GGUF file says of a model besides its weights: configuration and tokenizer, in llama.cpp's keys.

Whatever llama.cpp would compute in another way is refused here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..checkpoint.gguf.names import BY_FAMILY, ROPE, ROPE_LONG, ROPE_SHORT, Architecture
from ..checkpoint.gguf.tokenizer import BYTE, CONTROL, JSON, NORMAL, SPLITS, TEMPLATE, UNKNOWN, UNUSED, USER_DEFINED
from ..errors import Unsupported, nearest
from ..models.config import Attention, ModelConfig
from ..models.rope import Rope, merged
from ..models.tokenizer import Tokenizer

Extra = dict[str, NDArray[Any]]


def describe(checkpoint: Checkpoint, config: ModelConfig) -> tuple[Architecture, dict[str, Any], Extra, list[str]]:
    """The architecture, the keys, tensors that belong to them, and what a user should know."""
    architecture = BY_FAMILY.get(config.family)
    if architecture is None:
        raise Unsupported(f"{checkpoint.path}: {config.family} has no GGUF here; {nearest(config.family, BY_FAMILY)}")
    wrong = _difference(architecture.name, config)
    if wrong:
        raise Unsupported(f"{checkpoint.path}: llama.cpp computes {architecture.name} otherwise: {wrong}")
    keys, notes = _keys(architecture.name, config)
    rope, extra = _rope(checkpoint, architecture.name, config)
    said = {f"{architecture.name}.{key}": value for key, value in (keys | rope).items()}
    metadata = {"general.architecture": architecture.name, "general.name": checkpoint.path.stem, **said}
    metadata["general.quantization_version"] = 2
    words, more = _tokenizer(checkpoint, config)
    return architecture, metadata | words, extra, [*notes, *more]


def _difference(name: str, config: ModelConfig) -> str | None:
    """What of a model is not as llama.cpp has it; None if nothing is."""
    first, right = config.blocks[0].mixer, "gelu_tanh" if name == "gemma" else "silu"
    for block in config.blocks:
        if block.mlp.activation != right:
            return f"its activation is {right}, not {block.mlp.activation}"
    assert isinstance(first, Attention)
    biased = {linear.role for linear in config.blocks[0].linears if linear.bias}
    if biased and name in ("gemma", "olmo2", "qwen3"):
        return f"{sorted(biased)[0]} has no bias"
    if name != "granite" and not np.isclose(first.scale, first.head_dim**-0.5):
        return f"scores are divided by √{first.head_dim}"
    return None


def _keys(name: str, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    block = config.blocks[0]
    mixer, mlp, norm = block.mixer, block.mlp, config.final_norm
    assert isinstance(mixer, Attention)
    length, notes = config.max_position, []
    window = min((each.mixer.window for each in config.blocks if each.mixer.window), default=None)
    if window is not None and window < length:
        length = window
        notes.append(f"llama.cpp does not compute {name}'s window of {window} positions: the context ends there")
    keys: dict[str, Any] = {
        "context_length": length,
        "embedding_length": config.hidden,
        "block_count": config.layers,
        "feed_forward_length": mlp.inner,
        "attention.head_count": mixer.heads,
        "attention.head_count_kv": mixer.kv_heads,
        "attention.key_length": mixer.head_dim,
        "attention.value_length": mixer.value_dim,
        "vocab_size": config.vocab_size,
        f"attention.layer_norm_{'rms_' if norm.kind == 'rms' else ''}epsilon": float(norm.eps),
    }
    if name == "granite":
        keys |= {"attention.scale": mixer.scale, "embedding_scale": config.embedding_scale}
        keys |= {"residual_scale": block.residual_scale, "logit_scale": 1 / config.logit_scale}
    return keys, notes


def _rope(checkpoint: Checkpoint, name: str, config: ModelConfig) -> tuple[dict[str, Any], Extra]:
    """Rotary positions: the base, and what single pairs differ from it by."""
    mixer = config.blocks[0].mixer
    assert isinstance(mixer, Attention)
    rope, where = mixer.rope, str(checkpoint.path)
    assert isinstance(rope, Rope)
    text = checkpoint.config.get("text_config") or checkpoint.config
    values = merged(text, where)
    width = 2 * len(rope.frequencies)
    base = float(values.get("rope_theta") or 1e4)
    keys: dict[str, Any] = {"rope.dimension_count": width, "rope.freq_base": base}
    plain = base ** -(np.arange(0, width, 2) / width)
    if values.get("rope_type", values.get("type")) == "yarn":
        raise Unsupported(f"{where}: YaRN's rotary positions are not written to GGUF")
    factors = plain / np.asarray(rope.frequencies)
    if rope.long is not None and name == "phi3":
        keys |= {"rope.scaling.original_context_length": rope.original, "rope.scaling.attn_factor": float(rope.scale)}
        return keys, {ROPE_SHORT: factors, ROPE_LONG: plain / np.asarray(rope.long)}
    if rope.long is not None or rope.scale != 1:
        raise Unsupported(f"{where}: llama.cpp has no such rotary positions for {name}")
    if np.allclose(factors, factors[0], rtol=1e-6):
        linear = {"rope.scaling.type": "linear", "rope.scaling.factor": float(factors[0])}
        return keys | ({} if np.isclose(factors[0], 1) else linear), {}
    if name != "llama":
        raise Unsupported(f"{where}: llama.cpp has no rotary positions of this kind for {name}")
    return keys, {ROPE: factors}


def _tokenizer(checkpoint: Checkpoint, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer's keys; without one a file serves token ids alone, which is said."""
    if "tokenizer.json" not in checkpoint.side_files:
        return {"tokenizer.ggml.model": "none"}, ["there is no tokenizer.json: the file takes and gives token ids only"]
    tokenizer = Tokenizer(checkpoint.path)
    text = tokenizer.backend.to_str()
    made = json.loads(text)
    model = made["model"]
    if model["type"] != "BPE":
        raise Unsupported(f"{checkpoint.path}/tokenizer.json: a {model['type']} tokenizer has no GGUF here; BPE has")
    tokens = [f"[PAD{number}]" for number in range(config.vocab_size)]
    kinds = np.full(config.vocab_size, UNUSED, np.int32)
    for token, number in model["vocab"].items():
        byte = model["byte_fallback"] and token.startswith("<0x") and len(token) == 6
        tokens[number], kinds[number] = token, BYTE if byte else NORMAL
    for each in made["added_tokens"]:
        tokens[each["id"]] = each["content"]
        kinds[each["id"]] = CONTROL if each["special"] else USER_DEFINED
    notes: list[str] = []
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if model["byte_fallback"]:
        if model["unk_token"] in model["vocab"]:
            number = model["vocab"][model["unk_token"]]
            kinds[number], keys["tokenizer.ggml.unknown_token_id"] = UNKNOWN, number
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", "", 1), rank)
        scores = [-float(ranks.get(token, len(merges))) for token in tokens]
        prefix = '"Prepend"' in text or '"prepend_scheme":"first"' in text or '"prepend_scheme":"always"' in text
        keys |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        keys |= {"tokenizer.ggml.scores": np.array(scores, np.float32), "tokenizer.ggml.add_space_prefix": prefix}
    else:
        keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _split(made, checkpoint.path)}
        keys["tokenizer.ggml.merges"] = merges
        notes += _normalizer(made, checkpoint.path)
    return keys | _ends(tokenizer, config) | {JSON: text}, notes


def _normalizer(made: dict[str, Any], where: Path) -> list[str]:
    """llama.cpp has none before byte-level BPE."""
    kind = (made["normalizer"] or {"type": None})["type"]
    if kind not in (None, "NFC"):
        raise Unsupported(f"{where}/tokenizer.json: llama.cpp has no {kind} normalizer; NFC or none can be written")
    return ["llama.cpp does not compose Unicode (NFC), as the tokenizer does: give it composed text"] if kind else []


def _split(made: dict[str, Any], where: Path) -> str:
    """llama.cpp's name of the way in which text is split before BPE."""
    found = made["pre_tokenizer"]
    for name, split in SPLITS.items():
        if found is not None and _plain(found) == _plain(split):
            return name
    raise Unsupported(
        f"{where}/tokenizer.json: llama.cpp has no name here for its pre_tokenizer; {', '.join(SPLITS)} do"
    )


def _plain(split: dict[str, Any]) -> list[Any]:
    """The steps of a pre-tokenizer, without what changes no token."""
    steps = split["pretokenizers"] if split["type"] == "Sequence" else [split]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _ends(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    ids = tokenizer.encode("a")
    bos, ends = config.bos_token_id, config.eos_token_ids
    named = tokenizer.special_tokens.get("eos_token")
    eos = tokenizer.backend.token_to_id(named) if named else None
    eos = ends[0] if eos is None and ends else eos
    keys: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": bos is not None and ids[:1] == [bos],
        "tokenizer.ggml.add_eos_token": len(ids) > 1 and ids[-1] in ends,
    }
    if bos is not None:
        keys["tokenizer.ggml.bos_token_id"] = bos
    if eos is not None:
        keys["tokenizer.ggml.eos_token_id"] = eos
    if other := [end for end in ends if end != eos]:
        keys["tokenizer.ggml.eot_token_id"] = other[0]
    if tokenizer.chat_template is not None:
        keys[TEMPLATE] = tokenizer.chat_template.source
    return keys
