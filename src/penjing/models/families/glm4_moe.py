"""GLM-4.5 and 4.6: Llama with DeepSeek-V3's experts and partly turning heads.  arXiv 2508.06471."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..parts import rms
from ..reader import Reader
from ..rope import read_rope
from .deepseek_v3 import corrected_feed
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"num_key_value_heads": 8, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0})
    rope = read_rope(read.values, where, read.heads()[2], partial_rotary_factor=0.5)
    return like_llama(
        read,
        ropes=[rope] * read.layers,
        norm=rms(read.number("rms_norm_eps", 1e-5)),
        qkv_bias=read.flag("attention_bias"),
        feed=corrected_feed(read),
        attention={"query_key_norm": "head"} if read.flag("use_qk_norm") else {},
    )
