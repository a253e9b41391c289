"""Gemma 1: Llama with norms stored around zero, gelu, and embeddings times √hidden.  arXiv 2403.08295."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..parts import rms
from ..reader import Reader
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    # The first releases say "gelu" and mean its approximation.
    older = {"hidden_act": "gelu_pytorch_tanh"} if values.get("hidden_act", "gelu") == "gelu" else {}
    read = Reader({**values, **older}, where, {"head_dim": 256})
    return like_gemma(read)


def like_gemma(read: Reader, **more: Any) -> ModelConfig:
    """What all Gemmas have in common; ``more`` are keywords of `like_llama`."""
    read.refuse("use_bidirectional_attention", False)
    bias = read.flag("attention_bias")
    return like_llama(
        read,
        norm=rms(read.number("rms_norm_eps", 1e-6), offset=1.0),
        qkv_bias=bias,
        output_bias=bias,
        embedding_scale=read.integer("hidden_size") ** 0.5,
        tied=True,
        **more,
    )
