"""Qwen 2 and 2.5, dense: Llama with biases on queries, keys and values.  Yang et al., arXiv 2407.10671."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import FULL, SLIDING, Reader, windows
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where)
    return like_llama(read, qkv_bias=True, windows=read_windows(read))


def read_windows(read: Reader) -> tuple[int | None, ...]:
    """Qwen's switches: ``use_sliding_window``, ``sliding_window``, and ``layer_types`` or ``max_window_layers``."""
    if not read.flag("use_sliding_window"):
        return (None,) * read.layers
    first = read.count("max_window_layers", 28)
    kinds = read.kinds([SLIDING if index >= first else FULL for index in range(read.layers)])
    return windows(kinds, read.integer("sliding_window", 4096))
