"""Qwen 3, dense: each head's queries and keys are normed, and no biases.  Yang et al., arXiv 2505.09388."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import Reader
from .llama import like_llama
from .qwen2 import read_windows


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"head_dim": 128})
    bias = read.flag("attention_bias")
    return like_llama(
        read,
        windows=read_windows(read),
        qkv_bias=bias,
        output_bias=bias,
        attention={"query_key_norm": "head"},
    )
