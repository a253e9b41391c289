"""Ministral: Mistral with a window in some blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import FULL, SLIDING, Reader, windows
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"sliding_window": 4096})
    window = read.maybe("sliding_window")
    kinds = read.kinds([FULL if window is None else SLIDING] * read.layers)
    return like_llama(read, windows=windows(kinds, window))
