"""Qwen 3 with experts.  Yang et al., arXiv 2505.09388."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import Reader
from .llama import like_llama
from .qwen2_moe import sparse_feed


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where)
    bias = read.flag("attention_bias")
    window = read.maybe("sliding_window") if read.flag("use_sliding_window") else None
    return like_llama(
        read,
        windows=[window] * read.layers,
        qkv_bias=bias,
        output_bias=bias,
        feed=sparse_feed(read),
        attention={"query_key_norm": "head"},
    )
