"""OLMo 3: OLMo 2 with a window in three of four blocks, and stretched positions in the fourth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import Reader, windows
from ..rope import read_rope_of
from .olmo2 import like_olmo2


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"sliding_window": 4096})
    kinds, head_dim = read.kinds(read.every(4)), read.heads()[2]
    ropes = [read_rope_of(kind, read.values, where, head_dim, rope_theta=500_000.0) for kind in kinds]
    return like_olmo2(read, windows=windows(kinds, read.maybe("sliding_window")), ropes=ropes)
