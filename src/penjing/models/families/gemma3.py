"""Gemma 3, its text: normed queries and keys, five blocks with a window to one without.  arXiv 2503.19786."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..parts import sandwich
from ..reader import FULL, Reader, windows
from ..rope import read_rope_of
from .gemma import like_gemma

# Configurations of the larger models leave out what these have in common.
DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, DEFAULTS)
    kinds = read.kinds(read.every(read.integer("sliding_window_pattern")))
    head_dim = read.heads()[2]
    ropes = [
        read_rope_of(
            kind,
            read.values,
            where,
            head_dim,
            local="rope_local_base_freq",
            rope_theta=1_000_000.0 if kind == FULL else 10_000.0,
        )
        for kind in kinds
    ]
    return like_gemma(
        read,
        windows=windows(kinds, read.maybe("sliding_window")),
        ropes=ropes,
        norms=sandwich,
        attention={
            "scale": read.number("query_pre_attn_scalar") ** -0.5,
            "softcap": read.factor("attn_logit_softcapping"),
            "query_key_norm": "head",
        },
        logit_softcap=read.factor("final_logit_softcapping"),
    )
