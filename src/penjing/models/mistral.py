"""Mistral 7B and its dense successors: Llama with a sliding window.  Jiang et al., arXiv 2310.06825."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .llama import like_llama
from .reader import Reader


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    reader = Reader(values, where)
    # Written as null by models without a window; the format's default is 4096.
    window = None if values.get("sliding_window", 4096) is None else reader.integer("sliding_window", 4096)
    return like_llama(reader, windows=[window] * reader.layers)
