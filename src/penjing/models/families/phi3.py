"""Phi-3, Phi-3.5 and Phi-4: Llama with fused matrices, LongRoPE, and heads that turn in part.  arXiv 2404.14219."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..parts import split
from ..reader import Reader
from ..rope import merged, rope_from
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"original_max_position_embeddings": 4096})
    heads, kv_heads, head_dim = read.heads()
    inner, keys = read.integer("intermediate_size"), kv_heads * head_dim
    sources = split("self_attn.qkv_proj", {"q": heads * head_dim, "k": keys, "v": keys})
    sources |= split("mlp.gate_up_proj", {"gate": inner, "up": inner})
    rope = merged(read.values, where)
    if rope.get("rope_type", rope.get("type")) == "yarn":
        rope |= {"rope_type": "longrope"}  # what the first releases called it
    ropes = [rope_from(rope, read.values, where, head_dim)] * read.layers
    window = [read.maybe("sliding_window")] * read.layers
    return like_llama(read, windows=window, ropes=ropes, sources=sources)
