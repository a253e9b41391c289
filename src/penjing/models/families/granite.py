"""Granite 3, dense: Llama with factors on embeddings, scores, parts and logits (as in muP, arXiv 2203.03466)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import Reader
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where)
    bias = read.flag("attention_bias")
    return like_llama(
        read,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=read.flag("mlp_bias"),
        attention={"scale": read.number("attention_multiplier", 1.0)},
        residual_scale=read.number("residual_multiplier", 1.0),
        embedding_scale=read.number("embedding_multiplier", 1.0),
        logit_scale=1 / read.number("logits_scaling", 1.0),
    )
