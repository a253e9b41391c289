"""Llama 1 to 3, and what is built like it.  Touvron et al., arXiv 2302.13971."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .config import Attention, Mlp, ModelConfig
from .parts import block, decoder, grouped_attention, mlp, pre_norm, rms
from .reader import Reader
from .rope import read_rope


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    reader = Reader(values, where)
    bias = reader.flag("attention_bias")
    return like_llama(reader, qkv_bias=bias, output_bias=bias, mlp_bias=reader.flag("mlp_bias"))


def like_llama(
    read: Reader,
    *,
    windows: Sequence[int | None] | None = None,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    query_key_norm: Literal["head"] | None = None,
) -> ModelConfig:
    """A pre-norm decoder of grouped-query attention and a gated MLP; the keywords are what a family says of itself.

    windows: one a block.  head_dim: what the family takes where config.json says nothing.
    """
    hidden, inner = read.integer("hidden_size"), read.integer("intermediate_size")
    heads, kv_heads, head_dim = read.heads(head_dim=head_dim)
    rope = read_rope(read.values, read.where, head_dim)
    norm, activation = rms(read.number("rms_norm_eps", 1e-6)), read.activation("hidden_act")
    blocks = []
    for window in windows or [None] * read.layers:
        attention = Attention(
            heads, kv_heads, head_dim, head_dim, head_dim**-0.5, window, rope, query_key_norm=query_key_norm
        )
        mixer = grouped_attention(hidden, attention, norm, qkv_bias=qkv_bias, output_bias=output_bias)
        weights = (mixer, mlp(hidden, inner, bias=mlp_bias), pre_norm(hidden, norm))
        blocks.append(block(attention, Mlp(inner, activation), *weights))
    return decoder(read, blocks, norm("norm", hidden))
