"""Qwen 2 and 2.5, dense: Llama with biases on queries, keys and values.  Yang et al., arXiv 2407.10671."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, Reader, read_decoder, window_per_layer


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    windows = window_per_layer(Reader(values, where), 28)
    return read_decoder(values, where, qkv_bias=True, output_bias=False, sliding_windows=windows)
