"""GLM-4 (0414): norms around each part, and neighbours of the first half of a head turn.  arXiv 2406.12793."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..parts import norms_at, split
from ..reader import Reader
from ..rope import read_rope
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7})
    inner = read.integer("intermediate_size")
    rope = read_rope(read.values, where, read.heads()[2], partial_rotary_factor=0.5)
    return like_llama(
        read,
        ropes=[rope] * read.layers,
        norms=norms_at(
            attention_in="input_layernorm",
            attention_out="post_self_attn_layernorm",
            mlp_in="post_attention_layernorm",
            mlp_out="post_mlp_layernorm",
        ),
        qkv_bias=read.flag("attention_bias", True),
        sources=split("mlp.gate_up_proj", {"gate": inner, "up": inner}),
        attention={"rope_interleaved": True},
    )
