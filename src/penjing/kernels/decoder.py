"""The parts of a decoder that have no weights: attention, and the gate of the MLP."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _native

Floats = NDArray[np.float32]
MAX_HEAD_DIM = 256


def attention(queries: Floats, keys: Floats, values: Floats, *, window: int | None = None) -> Floats:
    """Causal attention of the last n positions to all of them.

    queries: (n, heads, head_dim), head_dim at most `MAX_HEAD_DIM`.  keys, values: (kv_heads, length, head_dim), of
    which the last n positions belong to the queries; each serves heads / kv_heads query heads (Ainslie et al., arXiv
    2305.13245). They may be parts of a cache: only each head must be contiguous.  window: how many positions a query
    sees, itself included; all by default.  Returns (n, heads, head_dim). A query's result does not depend on the other
    queries, except for rounding.
    """
    return _native.attention(np.ascontiguousarray(queries), keys, values, window or 0)


def gated(gate: Floats, up: Floats) -> Floats:
    """gate · sigmoid(gate) · up, for matrices of one shape (SwiGLU; Shazeer, arXiv 2002.05202)."""
    return _native.gated(gate, up)
