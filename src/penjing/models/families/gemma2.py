"""Gemma 2: norms after each part too, capped scores and logits, a window in every other block.  arXiv 2408.00118."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..parts import sandwich
from ..reader import Reader, windows
from .gemma import like_gemma

DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, DEFAULTS)
    return like_gemma(
        read,
        windows=windows(read.kinds(read.every(2)), read.maybe("sliding_window")),
        norms=sandwich,
        attention={
            "scale": read.number("query_pre_attn_scalar") ** -0.5,
            "softcap": read.factor("attn_logit_softcapping"),
        },
        logit_softcap=read.factor("final_logit_softcapping"),
    )
