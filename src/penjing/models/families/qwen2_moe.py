"""Qwen 1.5 and 2 with experts: an MLP for all tokens, gated, beside small experts.  Yang et al., arXiv 2407.10671."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Experts, ModelConfig
from ..parts import mixture
from ..reader import Reader
from .llama import Feed, gated_feed, like_llama
from .qwen2 import read_windows


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where)
    feed = sparse_feed(read, shared_inner=read.integer("shared_expert_intermediate_size"), shared_gate=True)
    return like_llama(read, qkv_bias=read.flag("qkv_bias", True), windows=read_windows(read), feed=feed)


def sparse_feed(read: Reader, **more: Any) -> Feed:
    """Experts in every ``decoder_sparse_step``-th block but ``mlp_only_layers``; ``more`` are fields of `Experts`."""
    rule = Experts(
        count=read.experts("num_experts", "num_local_experts"),
        top_k=read.integer("num_experts_per_tok"),
        inner=read.integer("moe_intermediate_size"),
        activation=read.activation("hidden_act"),
        **{"normalized": read.flag("norm_topk_prob")} | more,
    )
    sparse = rule, mixture(read.integer("hidden_size"), rule, shared="shared_expert")
    step, dense_blocks = read.integer("decoder_sparse_step", 1), read.values.get("mlp_only_layers") or []
    if not isinstance(dense_blocks, list):
        raise read.error("mlp_only_layers", "a list of numbers of blocks")
    if step == 1 and not dense_blocks:
        return lambda index: sparse
    dense = gated_feed(read)
    return lambda index: dense(index) if (index + 1) % step or index in dense_blocks else sparse
