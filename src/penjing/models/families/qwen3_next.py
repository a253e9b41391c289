"""Qwen3-Next: three gated delta nets to one gated attention, experts with a gated MLP beside them.

Norms are stored around zero. Queries lie head by head with their output gates; the delta net's matrices lie key head by
key head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Attention, Block, DeltaNet, ModelConfig, Norm, Run, Weights
from ..parts import Sources, block, decoder, delta_net, grouped_attention, part, pre_norm, rms
from ..reader import FULL, LINEAR, Reader
from ..rope import read_rope
from .llama import Feed
from .qwen2_moe import sparse_feed

DEFAULTS = {
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, DEFAULTS)
    shared = read.integer("shared_expert_intermediate_size", 512)
    feed = sparse_feed(read, normalized=read.flag("norm_topk_prob", True), shared_inner=shared, shared_gate=True)
    return hybrid(read, feed, key_by_key(read_net(read)))


def read_net(read: Reader) -> DeltaNet:
    keys, values = read.integer("linear_num_key_heads"), read.integer("linear_num_value_heads")
    if values % keys:
        raise read.error("linear_num_value_heads", f"a multiple of linear_num_key_heads = {keys}")
    read.refuse("hidden_act", "silu")
    return DeltaNet(
        key_heads=keys,
        value_heads=values,
        key_dim=read.integer("linear_key_head_dim"),
        value_dim=read.integer("linear_value_head_dim"),
        kernel=read.integer("linear_conv_kernel_dim"),
    )


def key_by_key(net: DeltaNet) -> Sources:
    """Where the net's weights are: of each key head q, k, then v and z of its value heads; and b, then a of these."""
    each = net.value_heads // net.key_heads
    width, times = each * net.value_dim, net.key_heads
    step = 2 * net.key_dim + 2 * width

    def run(start: int, count: int) -> Run:
        return Run(start, count, step, times)

    q, k, v = run(0, net.key_dim), run(net.key_dim, net.key_dim), run(2 * net.key_dim, width)
    together, rates = "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"
    return {
        "qkv": part(together, step * times, q, k, v),
        "z": part(together, step * times, run(2 * net.key_dim + width, width)),
        "b": part(rates, 2 * net.value_heads, Run(0, each, 2 * each, times)),
        "a": part(rates, 2 * net.value_heads, Run(each, each, 2 * each, times)),
    }


def hybrid(read: Reader, feed: Feed, net_sources: Sources) -> ModelConfig:
    """Qwen3-Next and Qwen3.5: delta nets and attention in turn; ``net_sources`` is where the former's weights are."""
    hidden, eps = read.integer("hidden_size"), read.number("rms_norm_eps", 1e-6)
    norm, net = rms(eps, offset=1.0), read_net(read)
    attention, weights = _gated_attention(read)
    state = Norm("linear_attn.norm.weight", net.value_dim, eps)
    net_weights = delta_net(hidden, net, state, net_sources)
    kinds = read.kinds(read.every(read.integer("full_attention_interval"), LINEAR), (LINEAR, FULL))

    def described(index: int, kind: str) -> Block:
        rule, after = feed(index)
        mixer, its = (net, net_weights) if kind == LINEAR else (attention, weights)
        return block(mixer, rule, its, after, pre_norm(hidden, norm))

    blocks = [described(index, kind) for index, kind in enumerate(kinds)]
    return decoder(read, blocks, norm("norm", hidden))


def _gated_attention(read: Reader) -> tuple[Attention, Weights]:
    heads, kv_heads, head_dim = read.heads()
    bias = read.flag("attention_bias")
    rope = read_rope(read.values, read.where, head_dim, partial_rotary_factor=0.25)
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        head_dim,
        head_dim**-0.5,
        rope=rope,
        query_key_norm="head",
        output_gate=True,
    )
    both, total = "self_attn.q_proj", 2 * heads * head_dim
    sources = {
        "q": part(both, total, Run(0, head_dim, 2 * head_dim, heads)),
        "output_gate": part(both, total, Run(head_dim, head_dim, 2 * head_dim, heads)),
    }
    norm = rms(read.number("rms_norm_eps", 1e-6), offset=1.0)
    hidden = read.integer("hidden_size")
    return attention, grouped_attention(hidden, attention, norm, qkv_bias=bias, output_bias=bias, sources=sources)
