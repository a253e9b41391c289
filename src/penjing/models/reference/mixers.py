"""How positions are mixed: attention, latent attention, and the gated delta net."""

from __future__ import annotations

import math

import numpy as np

from ..config import Attention, Block, DeltaNet, LatentAttention
from ..rope import Rope, rotate
from .layers import Array, Parts, activate, normed, sigmoid, softcap

# Number of a block → its keys and values, for the blocks that share them.
Shared = dict[int, tuple[Array, Array]]


def mix(block: Block, parts: Parts, x: Array, index: int, shared: Shared) -> Array:
    """What a block's mixer makes of x (n, hidden)."""
    mixer = block.mixer
    if isinstance(mixer, Attention):
        return attention(mixer, block, parts, x, index, shared)
    if isinstance(mixer, LatentAttention):
        return latent_attention(mixer, block, parts, x)
    return delta_net(mixer, block, parts, x)


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
    sinks: Array | None = None,
) -> Array:
    """queries (n, heads, d), keys (n, kv_heads, d), values (n, kv_heads, v), sinks (heads,) → (n, heads, v)."""
    n, heads = queries.shape[:2]
    keys, values = (each.repeat(heads // each.shape[1], axis=1) for each in (keys, values))
    scores = softcap(np.einsum("qhd,khd->hqk", queries, keys) * queries.dtype.type(scale), cap)
    distance = np.arange(n)[:, None] - np.arange(n)
    seen = (distance >= 0) & (distance < (window or n))
    scores = np.where(seen, scores, -np.inf)
    most = scores.max(-1, keepdims=True)
    if sinks is not None:
        most = np.maximum(most, sinks[:, None, None])
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - most)
    return np.einsum("hqk,khv->qhv", weights / total, values).astype(queries.dtype)


def _turned(y: Array, rope: Rope, interleaved: bool) -> Array:
    """Heads y (n, heads, d) at positions 0 to n − 1."""
    cos, sin = rope.table(np.arange(len(y)))
    return rotate(y, cos.astype(y.dtype), sin.astype(y.dtype), interleaved)


def attention(rule: Attention, block: Block, parts: Parts, x: Array, index: int, shared: Shared) -> Array:
    n = len(x)

    def heads_of(role: str, count: int, width: int, place: str) -> Array:
        y = parts.linear(role, x)
        whole = rule.query_key_norm == "all"
        y = parts.norm(place, block.norms, y) if whole else y
        y = y.reshape(n, count, width)
        return y if whole else parts.norm(place, block.norms, y)

    def turned(y: Array) -> Array:
        return y if rule.rope is None else _turned(y, rule.rope, rule.rope_interleaved)

    queries = turned(heads_of("q", rule.heads, rule.head_dim, "query"))
    if rule.query_growth is not None:
        growth, length = rule.query_growth
        queries = queries * (1 + growth * np.log1p(np.arange(n) // length)).astype(x.dtype)[:, None, None]
    if rule.shares_kv_of is not None:
        keys, values = shared[rule.shares_kv_of]
    else:
        keys = turned(heads_of("k", rule.kv_heads, rule.head_dim, "key"))
        values = heads_of("k" if rule.values_are_keys else "v", rule.kv_heads, rule.value_dim, "value")
        shared[index] = keys, values
    mixed = attend(queries, keys, values, rule.scale, rule.window, rule.softcap, parts.vectors.get("sinks"))
    mixed = mixed.reshape(n, -1)
    if rule.output_gate:
        mixed = mixed * sigmoid(parts.linear("output_gate", x))
    return parts.linear("o", mixed)


def latent_attention(rule: LatentAttention, block: Block, parts: Parts, x: Array) -> Array:
    """With keys and values of each head made from the latent, not multiplied into queries and result."""
    n, heads = len(x), rule.heads
    if rule.q_rank is None:
        queries = parts.linear("q", x)
    else:
        queries = parts.linear("q_b", parts.norm("q_latent", block.norms, parts.linear("q_a", x)))
    queries = queries.reshape(n, heads, -1)
    fixed, moving = queries[..., : rule.nope_dim], queries[..., rule.nope_dim :]
    queries = np.concatenate([fixed, _turned(moving, rule.rope, rule.rope_interleaved)], axis=-1)
    latent = parts.norm("kv_latent", block.norms, parts.linear("kv_a", x))
    position = _turned(parts.linear("k_rope", x)[:, None], rule.rope, rule.rope_interleaved)
    keys = parts.linear("k_b", latent).reshape(n, heads, rule.nope_dim)
    keys = np.concatenate([keys, position.repeat(heads, axis=1)], axis=-1)
    values = parts.linear("v_b", latent).reshape(n, heads, rule.value_dim)
    return parts.linear("o", attend(queries, keys, values, rule.scale).reshape(n, -1))


def delta_net(net: DeltaNet, block: Block, parts: Parts, x: Array) -> Array:
    """One position after another, the state as it is after each."""
    n, per_key = len(x), net.value_heads // net.key_heads
    width = net.key_heads * net.key_dim
    made = _convolved(parts.linear("qkv", x), parts.vectors["convolution"])
    queries, keys = (
        _unit(part.reshape(n, net.key_heads, net.key_dim)).repeat(per_key, axis=1)
        for part in (made[:, :width], made[:, width : 2 * width])
    )
    queries = queries / math.sqrt(net.key_dim)
    values = made[:, 2 * width :].reshape(n, net.value_heads, net.value_dim)
    rate = sigmoid(parts.linear("b", x))
    softplus = np.logaddexp(0, parts.linear("a", x) + parts.vectors["step"])
    kept = np.exp(-np.exp(parts.vectors["decay"]) * softplus)
    state = np.zeros((net.value_heads, net.key_dim, net.value_dim), x.dtype)
    mixed = np.empty((n, net.value_heads, net.value_dim), x.dtype)
    for t in range(n):
        state = state * kept[t, :, None, None]
        recalled = np.einsum("hk,hkv->hv", keys[t], state)
        state = state + keys[t, :, :, None] * (rate[t, :, None] * (values[t] - recalled))[:, None]
        mixed[t] = np.einsum("hk,hkv->hv", queries[t], state)
    gate = activate("silu", parts.linear("z", x)).reshape(mixed.shape)
    mixed = normed(mixed, block.norms["state"], *parts.norms["state"]) * gate
    return parts.linear("o", mixed.reshape(n, -1).astype(x.dtype))


def _convolved(x: Array, kernel: Array) -> Array:
    """x (n, channels) with kernel (channels, 1, size) over this and the positions before, then silu."""
    size = kernel.shape[-1]
    padded = np.concatenate([np.zeros((size - 1, x.shape[1]), x.dtype), x])
    return activate("silu", sum(padded[tap : tap + len(x)] * kernel[:, 0, tap] for tap in range(size)))


def _unit(x: Array) -> Array:
    """Vectors of length one."""
    return x / np.sqrt(np.square(x).sum(-1, keepdims=True) + x.dtype.type(1e-6))
