"""The layers that all families share, in float32: norm, attention, gated MLP, and the block that they make.

Linear layers are `kernels.Matrix`, whatever their weights are stored in; the rest is numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..kernels import Matrix
from .rope import rotate

Array: TypeAlias = NDArray[np.float32]
# Queries (n, heads, d), keys and values (n, kv_heads, d) of the new tokens → what attention reads (n, heads, d).
Attend: TypeAlias = Callable[[Array, Array, Array], Array]

# Queries that attend at once: bounds the scores to heads · 128 · context, and skips what causality hides.
QUERY_ROWS = 128


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / √(mean(x²) + eps) · weight over the last axis.  Zhang and Sennrich, arXiv 1910.07467."""
    mean_square = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    normed: Array = x * (1 / np.sqrt(mean_square + np.float32(eps)))
    normed *= weight
    return normed


def silu(x: Array) -> Array:
    """x · sigmoid(x), in place, and without overflow: sigmoid(x) = (1 + tanh(x/2)) / 2."""
    gate = np.multiply(x, np.float32(0.5))
    np.tanh(gate, out=gate)
    gate += 1
    gate *= np.float32(0.5)
    x *= gate
    return x


def attention(queries: Array, keys: Array, values: Array, window: int | None = None) -> Array:
    """Causal attention of the last n positions to all of them.

    queries: (n, heads, d).  keys, values: (kv_heads, length, d), of which the last n belong to the queries; each
    serves heads / kv_heads query heads (Ainslie et al., arXiv 2305.13245).  window: how many positions a query sees,
    itself included.  Returns (n, heads, d).
    """
    n, heads, d = queries.shape
    kv_heads, length, _ = keys.shape
    grouped = (queries * np.float32(d**-0.5)).reshape(n, kv_heads, heads // kv_heads, d).transpose(1, 2, 0, 3)
    out = np.empty((n, kv_heads, heads // kv_heads, d), np.float32)
    for low in range(0, n, QUERY_ROWS):
        high = min(low + QUERY_ROWS, n)
        start, end = length - n + low, length - n + high
        first = 0 if window is None else max(0, start - window + 1)
        rows = grouped[:, :, low:high].reshape(kv_heads, -1, d)
        scores = (rows @ keys[:, first:end].swapaxes(1, 2)).reshape(kv_heads, -1, high - low, end - first)
        if high - low > 1:
            scores += _hidden(start, end, first, window)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        mixed = scores.reshape(kv_heads, -1, end - first) @ values[:, first:end]
        out[low:high] = (mixed.reshape(kv_heads, -1, high - low, d) / total).transpose(2, 0, 1, 3)
    return out.reshape(n, heads, d)


def _hidden(start: int, end: int, first: int, window: int | None) -> Array:
    """0 where the queries at [start, end) see the keys at [first, end), −∞ where they do not."""
    query, key = np.arange(start, end)[:, None], np.arange(first, end)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return np.where(hidden, np.float32(-np.inf), np.float32(0))


@dataclass(frozen=True)
class LinearLayer:
    """matrix: (out, in).  bias: (out,) or None."""

    matrix: Matrix
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        return self.matrix(x, self.bias)


@dataclass(frozen=True)
class Block:
    """One decoder layer.  The norms of queries and keys, (head_dim,), are None in families without."""

    q: LinearLayer
    k: LinearLayer
    v: LinearLayer
    o: LinearLayer
    gate: LinearLayer
    up: LinearLayer
    down: LinearLayer
    attention_norm: Array
    mlp_norm: Array
    query_norm: Array | None
    key_norm: Array | None
    window: int | None
    head_dim: int
    eps: float

    @property
    def linears(self) -> tuple[LinearLayer, ...]:
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down

    def __call__(self, x: Array, cos: Array, sin: Array, attend: Attend) -> Array:
        """The residual stream (tokens, hidden) after this block; ``cos`` and ``sin`` as from `Rope.table`.

        Tokens may belong to several sequences: only ``attend`` knows which.
        """
        tokens = x.shape[0]
        normed = rms_norm(x, self.attention_norm, self.eps)
        queries = self.q(normed).reshape(tokens, -1, self.head_dim)
        keys = self.k(normed).reshape(tokens, -1, self.head_dim)
        values = self.v(normed).reshape(tokens, -1, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            queries = rms_norm(queries, self.query_norm, self.eps)
            keys = rms_norm(keys, self.key_norm, self.eps)
        mixed = attend(rotate(queries, cos, sin), rotate(keys, cos, sin), values)
        x = x + self.o(mixed.reshape(tokens, -1))
        normed = rms_norm(x, self.mlp_norm, self.eps)
        inner = silu(self.gate(normed))
        inner *= self.up(normed)
        x += self.down(inner)
        return x
