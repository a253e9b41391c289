"""Qwen 3, dense: each head's queries and keys are normed, and no biases.  Yang et al., arXiv 2505.09388."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, Reader, read_decoder, window_per_layer


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    reader = Reader(values, where)
    bias = reader.flag("attention_bias")
    return read_decoder(
        values,
        where,
        qkv_bias=bias,
        output_bias=bias,
        query_key_norm=True,
        head_dim=128,
        sliding_windows=window_per_layer(reader, 28),
    )
