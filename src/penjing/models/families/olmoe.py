"""OLMoE: Llama with experts, queries and keys normed over all heads.  Muennighoff et al., arXiv 2409.02060."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Experts, ModelConfig
from ..parts import mixture, rms
from ..reader import Reader
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"num_experts_per_tok": 8})
    read.refuse("clip_qkv")
    bias = read.flag("attention_bias")
    rule = Experts(
        count=read.experts("num_experts", "num_local_experts"),
        top_k=read.integer("num_experts_per_tok"),
        inner=read.integer("intermediate_size"),
        activation=read.activation("hidden_act"),
        normalized=read.flag("norm_topk_prob"),
    )
    weights = mixture(read.integer("hidden_size"), rule)
    return like_llama(
        read,
        norm=rms(read.number("rms_norm_eps", 1e-5)),
        qkv_bias=bias,
        output_bias=bias,
        feed=lambda index: (rule, weights),
        attention={"query_key_norm": "all"},
    )
