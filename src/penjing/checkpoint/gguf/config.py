"""The values of a ``config.json``, from a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import BadCheckpoint, Unsupported, nearest
from .file import GgufFile
from .names import ARCHITECTURES, HEAD, ROPE, ROPE_LONG, ROPE_SHORT, Architecture

_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_SAME = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
}


class Keys:
    """The metadata of one architecture; errors name the key."""

    def __init__(self, file: GgufFile) -> None:
        self._file, name = file, file.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise BadCheckpoint(f"{file.path}: key general.architecture is missing; it names the family")
        if name not in ARCHITECTURES:
            raise Unsupported(
                f"{file.path}: general.architecture = {name!r} is not read; {nearest(name, ARCHITECTURES)}"
            )
        self.architecture: Architecture = ARCHITECTURES[name]

    def get(self, key: str, default: Any = None) -> Any:
        """A value that is one for all blocks."""
        value = self._file.metadata.get(f"{self.architecture.name}.{key}", default)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            return value[0]
        if isinstance(value, list):
            raise Unsupported(f"{self._file.path}: key {self.architecture.name}.{key} differs from block to block")
        return value

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise BadCheckpoint(f"{self._file.path}: key {self.architecture.name}.{key} is missing")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on; without a default the key must be there."""
        value = self.need(key) if default is None else self.get(key, default)
        if type(value) is not int or value < 1:
            name = f"{self.architecture.name}.{key}"
            raise BadCheckpoint(f"{self.path}: key {name} = {value!r}, expected a whole number from 1 on")
        return value

    @property
    def path(self) -> Path:
        return self._file.path

    def has(self, tensor: str) -> bool:
        return tensor in self._file.tensors

    def factors(self, tensor: str) -> list[float]:
        found = self._file.tensors.get(tensor)
        if found is None or found.kind.name != "f32":
            what = "is missing" if found is None else f"is in format {found.kind.name.upper()}, expected F32"
            raise BadCheckpoint(f"{self.path}: tensor {tensor} {what}")
        return [float(each) for each in self._file.read(tensor).view("<f4").reshape(-1)]

    def token(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._file.metadata.get(key)
        if value is not None and type(value) is not int:
            raise BadCheckpoint(f"{self.path}: key {key} = {value!r}, expected the number of a token")
        return value


def read_config(file: GgufFile) -> dict[str, Any]:
    """What ``config.json`` would say; Unsupported for an architecture that is not read, BadCheckpoint for keys."""
    keys = Keys(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise BadCheckpoint(f"{file.path}: tensor token_embd.weight is missing")
    name, heads = keys.architecture.name, keys.count("attention.head_count")
    if keys.get("expert_count", 0):
        raise Unsupported(f"{file.path}: {name}.expert_count: GGUF files of mixtures of experts are not read")
    ends = {token for each in ("eos", "eot", "eom") if (token := keys.token(each)) is not None}
    config = {
        "model_type": keys.architecture.families[0],
        **{theirs: keys.need(ours) for theirs, ours in _SAME.items()},
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": keys.count("attention.key_length", max(keys.count("embedding_length") // heads, 1)),
        "intermediate_size": keys.need("feed_forward_length"),
        "max_position_embeddings": keys.need("context_length"),
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon", 1e-5),
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": not keys.has(f"{HEAD}.weight"),
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        "mlp_bias": keys.has("blk.0.ffn_down.bias"),
        "sliding_window": None,
        "bos_token_id": keys.token("bos"),
        "eos_token_id": sorted(ends) or None,
        **_rope(keys),
    }
    return config | (_OWN[name](keys) if name in _OWN else {})


def _rope(keys: Keys) -> dict[str, Any]:
    """Rotary positions; factors of single pairs, which llama.cpp keeps in a tensor, as LongRoPE's."""
    theta, kind = keys.get("rope.freq_base", 10000.0), keys.get("rope.scaling.type")
    longest, rope = keys.need("context_length"), {"rope_theta": theta}
    if keys.get("rope.dimension_count") is not None and keys.get("attention.key_length") is not None:
        width, head = keys.count("rope.dimension_count"), keys.count("attention.key_length")
        if width != head:
            rope["partial_rotary_factor"] = width / head
    if keys.has(ROPE_SHORT):
        original = keys.get("rope.scaling.original_context_length", longest)
        rope |= {"rope_type": "longrope", "short_factor": keys.factors(ROPE_SHORT)}
        rope |= {"long_factor": keys.factors(ROPE_LONG), "original_max_position_embeddings": original}
        rope |= {"attention_factor": keys.get("rope.scaling.attn_factor", 1.0)}
    elif keys.has(ROPE):
        factors = keys.factors(ROPE)
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        rope |= {"original_max_position_embeddings": longest}
    elif kind == "linear":
        rope |= {"rope_type": kind, "factor": keys.need("rope.scaling.factor")}
    elif kind not in (None, "none"):
        raise Unsupported(f"{keys.path}: rope.scaling.type = {kind!r} is not read; known: none, linear")
    original = rope.get("original_max_position_embeddings")
    beside = {} if original is None else {"original_max_position_embeddings": original}
    return {"rope_parameters": rope, **beside}


def _granite(keys: Keys) -> dict[str, Any]:
    return {
        "attention_multiplier": keys.need("attention.scale"),
        "embedding_multiplier": keys.get("embedding_scale", 1.0),
        "residual_multiplier": keys.get("residual_scale", 1.0),
        "logits_scaling": keys.get("logit_scale", 1.0),
    }


_OWN: dict[str, Callable[[Keys], dict[str, Any]]] = {
    "gemma": lambda keys: dict(_GELU),
    "granite": _granite,
}
