"""DeepSeek-V3 and R1: experts are scored apart, and a learnt bias balances which are chosen.  arXiv 2412.19437."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import Reader
from .deepseek_v2 import late_experts, with_latents
from .llama import Feed

_DEFAULTS = {"q_lora_rank": 1536, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4}


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, _DEFAULTS)
    return with_latents(read, corrected_feed(read), interleaved=read.flag("rope_interleave", True))


def corrected_feed(read: Reader) -> Feed:
    """V3's experts, which others took over."""
    read.refuse("scoring_func", "sigmoid")
    read.refuse("topk_method", "noaux_tc")
    return late_experts(
        Reader(read.values, read.where, {"n_shared_experts": 1}),
        scoring="sigmoid",
        normalized=read.flag("norm_topk_prob", True),
        scale=read.number("routed_scaling_factor", 2.5),
        groups=read.integer("n_group", 1),
        top_groups=read.integer("topk_group", 1),
        group_score="pair",
        correction_bias=True,
    )
