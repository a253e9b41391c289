"""DeepSeek-V2: attention through a latent, and experts chosen within groups.  arXiv 2405.04434."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Experts, LatentAttention, ModelConfig
from ..parts import block, decoder, latent_attention, mixture, pre_norm, rms
from ..reader import Reader
from ..rope import read_rope, score_temperature
from .llama import Feed, gated_feed

_DEFAULTS = {"q_lora_rank": 1536, "n_shared_experts": 2, "first_k_dense_replace": 0, "topk_method": "greedy"}


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, _DEFAULTS)
    read.refuse("topk_method", "greedy", "group_limited_greedy")
    read.refuse("norm_topk_prob", False)
    read.refuse("scoring_func", "softmax")
    grouped = read.values["topk_method"] == "group_limited_greedy"
    feed = late_experts(
        read,
        normalized=False,
        scale=read.number("routed_scaling_factor", 1.0),
        groups=read.integer("n_group", 1) if grouped else 1,
        top_groups=read.integer("topk_group", 1) if grouped else 1,
    )
    return with_latents(read, feed, interleaved=True)


def late_experts(read: Reader, **more: Any) -> Feed:
    """An MLP in the first ``first_k_dense_replace`` blocks, then experts; ``more`` are fields of `Experts`."""
    read.refuse("moe_layer_freq", 1)
    inner = read.integer("moe_intermediate_size")
    rule = Experts(
        count=read.experts("n_routed_experts", "num_experts", "num_local_experts"),
        top_k=read.integer("num_experts_per_tok"),
        inner=inner,
        activation=read.activation("hidden_act"),
        shared_inner=inner * read.count("n_shared_experts"),
        **more,
    )
    if rule.count % rule.groups:
        raise read.error("n_group", f"a divisor of the {rule.count} experts")
    sparse = rule, mixture(read.integer("hidden_size"), rule)
    dense, first = gated_feed(read), read.count("first_k_dense_replace")
    return lambda index: dense(index) if index < first else sparse


def with_latents(read: Reader, feed: Feed, *, interleaved: bool) -> ModelConfig:
    """A decoder with latent attention; ``interleaved``: neighbouring elements turn together."""
    hidden, rope_dim = read.integer("hidden_size"), read.integer("qk_rope_head_dim", 64)
    nope_dim = read.integer("qk_nope_head_dim", 128)
    bias = read.flag("attention_bias")
    attention = LatentAttention(
        heads=read.integer("num_attention_heads"),
        q_rank=read.maybe("q_lora_rank"),
        kv_rank=read.integer("kv_lora_rank", 512),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=read.integer("v_head_dim", 128),
        scale=(nope_dim + rope_dim) ** -0.5 * score_temperature(read.values, read.where),
        rope=read_rope(read.values, read.where, rope_dim),
        rope_interleaved=interleaved,
    )
    norm = rms(read.number("rms_norm_eps", 1e-6))
    weights = latent_attention(hidden, attention, rms(1e-6), bias=bias)  # their own, whatever config.json says
    blocks = [
        block(attention, rule, weights, after, pre_norm(hidden, norm)) for rule, after in map(feed, range(read.layers))
    ]
    return decoder(read, blocks, norm("norm", hidden))
