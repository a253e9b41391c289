"""Llama 1 to 3, and what is built like it.  Touvron et al., arXiv 2302.13971."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ..config import Attention, Experts, Mlp, ModelConfig, Weights
from ..parts import MakeNorm, Sources, block, decoder, grouped_attention, mlp, pre_norm, rms
from ..reader import Reader
from ..rope import Rope, read_rope

# Number of a block → what follows its attention.
Feed: TypeAlias = Callable[[int], tuple[Mlp | Experts, Weights]]


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where)
    bias = read.flag("attention_bias")
    return like_llama(read, qkv_bias=bias, output_bias=bias, mlp_bias=read.flag("mlp_bias"))


def like_llama(
    read: Reader,
    *,
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[Rope | None] | None = None,
    norm: MakeNorm | None = None,
    norms: Callable[[int, MakeNorm], Weights] = pre_norm,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    sources: Sources | None = None,
    feed: Feed | None = None,
    attention: Mapping[str, Any] | None = None,
    residual_scale: float = 1.0,
    **model: Any,
) -> ModelConfig:
    """A decoder of grouped-query attention and a gated MLP; the keywords are what a family says of itself.

    windows, ropes: one a block.  norm: how a norm is made; norms: those of a block, its parts' own aside.  sources:
    where the weights of attention and MLP are.  feed: in place of the MLP.  attention, model: fields of `Attention`
    and of `ModelConfig` that are not Llama's.
    """
    hidden = read.integer("hidden_size")
    heads, kv_heads, head_dim = read.heads()
    norm = norm or rms(read.number("rms_norm_eps", 1e-6))
    windows = windows or [None] * read.layers
    ropes = ropes or [read_rope(read.values, read.where, head_dim)] * read.layers
    feed = feed or gated_feed(read, bias=mlp_bias, sources=sources)
    blocks = []
    for index, (window, rope) in enumerate(zip(windows, ropes, strict=True)):
        fields = {"scale": head_dim**-0.5, "window": window, "rope": rope} | dict(attention or {})
        mixer = Attention(heads, kv_heads, head_dim, head_dim, **fields)
        weights = grouped_attention(hidden, mixer, norm, qkv_bias=qkv_bias, output_bias=output_bias, sources=sources)
        after, feed_weights = feed(index)
        parts = (weights, feed_weights, norms(hidden, norm))
        blocks.append(block(mixer, after, *parts, residual_scale=residual_scale))
    return decoder(read, blocks, norm("norm", hidden), **model)


def gated_feed(read: Reader, *, bias: bool = False, sources: Sources | None = None) -> Feed:
    """The usual MLP of every block."""
    inner, key = read.integer("intermediate_size"), "hidden_act"
    rule = Mlp(inner, read.activation("hidden_activation" if read.values.get("hidden_activation") else key))
    weights = mlp(read.integer("hidden_size"), inner, bias=bias, sources=sources)
    return lambda index: (rule, weights)
