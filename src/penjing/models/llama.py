"""Llama 1 to 3, and what is built like it.  Touvron et al., arXiv 2302.13971."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, Reader, read_decoder


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    reader = Reader(values, where)
    bias = reader.flag("attention_bias")
    return read_decoder(values, where, qkv_bias=bias, output_bias=bias, mlp_bias=reader.flag("mlp_bias"))
