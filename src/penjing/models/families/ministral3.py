"""Ministral 3: Mistral whose queries grow with the position, as Llama 4's do, for long contexts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import Reader
from ..rope import merged
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"head_dim": 128})
    rope = Reader(merged(read.values, where), f"{where}: rope_parameters")
    growth = rope.factor("llama_4_scaling_beta")
    attention = {"query_growth": (growth, rope.integer("original_max_position_embeddings"))} if growth else {}
    return like_llama(read, windows=[read.maybe("sliding_window")] * read.layers, attention=attention)
