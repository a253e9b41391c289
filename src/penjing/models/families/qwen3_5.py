"""Qwen 3.5, dense, its text: Qwen3-Next with an MLP, and the delta net's matrices apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..parts import Sources, module
from ..reader import Reader
from .llama import gated_feed
from .qwen3_next import DEFAULTS, hybrid

APART: Sources = {role: module(f"linear_attn.in_proj_{role}") for role in ("qkv", "z", "b", "a")}


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, DEFAULTS)
    return hybrid(read, gated_feed(read), APART)
