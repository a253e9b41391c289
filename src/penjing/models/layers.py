"""The layers that all families share, in float32: norm, linear layer, and the block of attention and gated MLP.

Linear layers are `kernels.Matrix`, whatever their weights are stored in; attention and the gate are kernels too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..kernels import gated
from .config import Attention
from .rope import rotate

Array: TypeAlias = NDArray[np.float32]
# Queries (n, heads, d), keys and values (n, kv_heads, d) of the new tokens → what attention reads (n, heads, d).
Attend: TypeAlias = Callable[[Array, Array, Array], Array]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / √(mean(x²) + eps) · weight over the last axis.  Zhang and Sennrich, arXiv 1910.07467."""
    mean_square = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    normed: Array = x * (1 / np.sqrt(mean_square + np.float32(eps)))
    normed *= weight
    return normed


class Product(Protocol):
    """What a linear layer needs of its matrix (out, in); `kernels.Matrix` is one."""

    nbytes: int

    def __call__(self, x: Array, bias: Array | None = None) -> Array:
        """x (n, in) @ matrixᵀ + bias, (n, out)."""
        ...


@dataclass(frozen=True)
class LinearLayer:
    """matrix: (out, in).  bias: (out,) or None."""

    matrix: Product
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
    attention: Attention
    eps: float

    @property
    def linears(self) -> tuple[LinearLayer, ...]:
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down

    @property
    def window(self) -> int | None:
        return self.attention.window

    def __call__(self, x: Array, positions: NDArray[np.int64], attend: Attend) -> Array:
        """The residual stream (tokens, hidden) of tokens at ``positions`` after this block.

        Tokens may belong to several sequences: only ``attend`` knows which.
        """
        tokens = x.shape[0]
        assert self.attention.rope is not None  # as checked when it was loaded
        cos, sin = self.attention.rope.table(positions)
        normed = rms_norm(x, self.attention_norm, self.eps)
        queries = self.q(normed).reshape(tokens, -1, self.attention.head_dim)
        keys = self.k(normed).reshape(tokens, -1, self.attention.head_dim)
        values = self.v(normed).reshape(tokens, -1, self.attention.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            queries = rms_norm(queries, self.query_norm, self.eps)
            keys = rms_norm(keys, self.key_norm, self.eps)
        mixed = attend(rotate(queries, cos, sin), rotate(keys, cos, sin), values)
        x = x + self.o(mixed.reshape(tokens, -1))
        normed = rms_norm(x, self.mlp_norm, self.eps)
        x += self.down(gated(self.gate(normed), self.up(normed)))
        return x
