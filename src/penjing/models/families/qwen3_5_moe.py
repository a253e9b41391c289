"""Qwen 3.5 with experts, its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import Reader
from .qwen2_moe import sparse_feed
from .qwen3_5 import APART
from .qwen3_next import DEFAULTS, hybrid


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, DEFAULTS)
    shared = read.integer("shared_expert_intermediate_size", 512)
    return hybrid(read, sparse_feed(read, normalized=True, shared_inner=shared, shared_gate=True), APART)
