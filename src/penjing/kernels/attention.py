"""Attention over a paged cache of keys and values, and over whole sequences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .._native import KvPool

Floats = NDArray[np.float32]
KV_TOKENS = 32  # positions of a block
KV_TYPES = ("float32", "float16", "bfloat16", "int8", "int4")
MAX_KV_DIM = 576  # of keys and of values


def causal_attention(
    queries: Floats,
    keys: Floats,
    values: Floats,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Floats | None = None,
) -> Floats:
    """Each position's attention to those up to itself.

    queries: (n, heads, key_dim).  keys, values: (n, kv_heads, key_dim) and (n, kv_heads, value_dim), which serve
    heads / kv_heads query heads each (Ainslie et al., arXiv 2305.13245). All three may be parts of wider rows: only
    each position must be contiguous.  window: how many positions a query sees, itself included; all by default.
    scale: of the scores, 1 / √key_dim by default.  softcap: c · tanh(score / c) in place of the scores (Gemma 2, arXiv
    2408.00118).  sinks: (heads), a score more in each softmax's sum, which has no value (gpt-oss, arXiv 2508.10925).
    Returns (n, heads, value_dim). A query's result is the same bits whatever comes after it.
    """
    n, kv_heads, key_dim = keys.shape
    blocks = -(-n // KV_TOKENS)
    pool = KvPool([(kv_heads, key_dim, values.shape[-1])], "float32", blocks)
    chunk = (queries, keys, values, np.arange(blocks, dtype=np.int32), 0)
    return pool.attend(0, [chunk], window or 0, scale, softcap or 0, sinks)[0]
