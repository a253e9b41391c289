"""Mixtral: Mistral with experts in place of the MLP.  Jiang et al., arXiv 2401.04088."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Experts, ModelConfig
from ..parts import mixture
from ..reader import Reader
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"num_key_value_heads": 8, "num_experts_per_tok": 2})
    rule = Experts(
        count=read.experts("num_local_experts", "num_experts"),
        top_k=read.integer("num_experts_per_tok"),
        inner=read.integer("intermediate_size"),
        activation=read.activation("hidden_act"),
    )
    weights = mixture(read.integer("hidden_size"), rule, at="block_sparse_moe", names=("w1", "w3", "w2"))
    return like_llama(read, windows=[read.maybe("sliding_window")] * read.layers, feed=lambda index: (rule, weights))
