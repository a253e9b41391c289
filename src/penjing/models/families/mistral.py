"""Mistral 7B and its dense successors: Llama with a sliding window.  Jiang et al., arXiv 2310.06825."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import Reader
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    # The window is written as null by models without one.
    read = Reader(values, where, {"sliding_window": 4096})
    return like_llama(read, windows=[read.maybe("sliding_window")] * read.layers)
