"""What a decoder-only model is: the numbers its computation needs, and the tensors it is made of.

A family's file (``llama.py``, …) reads its ``config.json`` into a `ModelConfig`; everything after that is data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import read_json
from ..errors import BadCheckpoint, Unsupported
from ..kernels.decoder import MAX_HEAD_DIM
from .rope import Rope, read_rope

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"
_REQUIRED = object()


@dataclass(frozen=True)
class Linear:
    """A weight (out, in) of a block.

    name: below the block's prefix.  role: which of the seven it is.  reads: the activation that goes in; weights
    that read the same one share its statistics.
    """

    name: str
    role: str
    reads: str
    shape: tuple[int, int]
    bias: bool


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder: attention (grouped queries, rotary positions) and a gated MLP in each block.

    sliding_windows: per block, how many positions back a query sees (itself included), or None for all.
    eos_token_ids: any of them ends a text.  Sizes are in elements, ``max_position`` in tokens.
    """

    family: str
    vocab_size: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: Rope
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    query_key_norm: bool
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The weights of one block, in the order in which they compute."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, inner = self.hidden, self.intermediate
        return (
            Linear("self_attn.q_proj", "q", "attention_input", (queries, hidden), self.qkv_bias),
            Linear("self_attn.k_proj", "k", "attention_input", (keys, hidden), self.qkv_bias),
            Linear("self_attn.v_proj", "v", "attention_input", (keys, hidden), self.qkv_bias),
            Linear("self_attn.o_proj", "o", "attention_output", (hidden, queries), self.output_bias),
            Linear("mlp.gate_proj", "gate", "mlp_input", (inner, hidden), self.mlp_bias),
            Linear("mlp.up_proj", "up", "mlp_input", (inner, hidden), self.mlp_bias),
            Linear("mlp.down_proj", "down", "mlp_inner", (hidden, inner), self.mlp_bias),
        )

    @property
    def norms(self) -> dict[str, int]:
        """The norms of one block: name below the block's prefix → size."""
        norms = {"input_layernorm": self.hidden, "post_attention_layernorm": self.hidden}
        if self.query_key_norm:
            norms |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        return norms

    def block(self, index: int) -> str:
        """The prefix of a block's tensors."""
        return f"model.layers.{index}"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order in which the model computes."""
        yield f"{EMBEDDING}.weight", (self.vocab_size, self.hidden)
        for index in range(self.layers):
            for norm, size in self.norms.items():
                yield f"{self.block(index)}.{norm}.weight", (size,)
            for linear in self.linears:
                yield f"{self.block(index)}.{linear.name}.weight", linear.shape
                if linear.bias:
                    yield f"{self.block(index)}.{linear.name}.bias", linear.shape[:1]
        yield f"{FINAL_NORM}.weight", (self.hidden,)
        if not self.tied_embeddings:
            yield f"{HEAD}.weight", (self.vocab_size, self.hidden)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one position in all blocks, in float32."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 4


class Reader:
    """config.json, read strictly: a value of the wrong type or out of range is an error that names its key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, key: str, right: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.where}: {key} = {self.values.get(key)!r}, expected {right}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise BadCheckpoint(f"{self.where}: {key} is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.error(key, "a positive integer")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; none if the key is missing or null."""
        value = self._get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(type(each) is not int or each < 0 for each in ids):
            raise self.error(key, "a token id or a list of them")
        return tuple(ids)


def read_decoder(
    values: Mapping[str, Any],
    where: str,
    *,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool = False,
    query_key_norm: bool = False,
    head_dim: int | None = None,
    sliding_windows: tuple[int | None, ...] | None = None,
) -> ModelConfig:
    """What all families of this shape have in common; the keywords are what a family says of itself.

    Raises BadCheckpoint for missing, wrong and contradictory values, Unsupported for what Penjing cannot compute.
    """
    read = Reader(values, where)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", heads)
    layers = read.integer("num_hidden_layers")
    if heads % kv_heads:
        raise read.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if head_dim is None and values.get("head_dim") is None and hidden % heads:
        raise read.error("num_attention_heads", f"a divisor of hidden_size = {hidden}, or head_dim given")
    head_dim = read.integer("head_dim", head_dim or hidden // heads)
    if head_dim % 2:
        raise read.error("head_dim", "an even number, because rotary positions turn pairs")
    if head_dim > MAX_HEAD_DIM:
        raise Unsupported(f"{where}: head_dim = {head_dim}; attention is computed for heads of up to {MAX_HEAD_DIM}")
    _check_architecture(read)
    max_position = read.integer("max_position_embeddings")
    bos = read.tokens("bos_token_id")
    return ModelConfig(
        family=values["model_type"],
        vocab_size=read.integer("vocab_size"),
        layers=layers,
        hidden=hidden,
        intermediate=read.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        rope=read_rope(values, where, head_dim, max_position),
        sliding_windows=sliding_windows or (None,) * layers,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        query_key_norm=query_key_norm,
        tied_embeddings=read.flag("tie_word_embeddings"),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=read.tokens("eos_token_id"),
    )


def _check_architecture(read: Reader) -> None:
    activation = read.values.get("hidden_act", "silu")
    if activation != "silu":
        raise Unsupported(f"{read.where}: hidden_act = {activation!r}; these families are computed with 'silu'")
    architectures = read.values.get("architectures") or []
    if not isinstance(architectures, list):
        raise read.error("architectures", "a list of names")
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise Unsupported(
            f"{read.where}: architectures = {architectures}; a causal language model (…ForCausalLM) is read"
        )


def window_per_layer(read: Reader, default_layers: int) -> tuple[int | None, ...] | None:
    """Qwen's switches: ``use_sliding_window``, ``sliding_window``, and ``layer_types`` or ``max_window_layers``."""
    if not read.flag("use_sliding_window"):
        return None
    layers = read.integer("num_hidden_layers")
    window = read.integer("sliding_window", 4096)
    first = read.values.get("max_window_layers", default_layers)
    kinds = read.values.get("layer_types")
    if kinds is None:
        return tuple(window if index >= first else None for index in range(layers))
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise read.error("layer_types", f"{layers} times 'sliding_attention' or 'full_attention'")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is not there; BadCheckpoint if it is something else."""
    values = read_json(file, BadCheckpoint) if file.exists() else {}
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{file}: not an object")
    return values
