"""The kernels: matrix products on compressed weights, integer layers, and the compressor's fast primitives.

Everything takes and returns numpy arrays; docs/kernels.md describes layouts, rounding and the choice of instruction
set, and `reference` has each computation in plain numpy. Wrong shapes and types raise BadInput or ValueError.
"""

from __future__ import annotations

from .._native import (
    IntegerConv,
    IntegerLinear,
    KvPool,
    Sampler,
    checksum,
    isa,
    log_probabilities,
    set_threads,
    threads,
)
from .attention import KV_TOKENS, KV_TYPES, MAX_KV_DIM, causal_attention
from .elements import activate, delta, norm, rotate, route
from .matrix import Matrix, matrix_from
from .pairs import PairMatrix, add_gram, has_pairs
from .screen import Screen, can_screen, screen_bytes, screen_of, screen_shape
from .stream import (
    Steps,
    bitmask_decode,
    bitmask_encode,
    has_nonfinite,
    pack,
    prune,
    prune_threshold,
    quantize,
    quantize_packed,
    search_steps,
    settle,
    unpack,
)

__all__ = [
    "KV_TOKENS",
    "KV_TYPES",
    "MAX_KV_DIM",
    "IntegerConv",
    "IntegerLinear",
    "KvPool",
    "Matrix",
    "PairMatrix",
    "Sampler",
    "Screen",
    "Steps",
    "activate",
    "add_gram",
    "bitmask_decode",
    "bitmask_encode",
    "can_screen",
    "causal_attention",
    "checksum",
    "delta",
    "has_nonfinite",
    "has_pairs",
    "isa",
    "log_probabilities",
    "matrix_from",
    "norm",
    "pack",
    "prune",
    "prune_threshold",
    "quantize",
    "quantize_packed",
    "rotate",
    "route",
    "screen_bytes",
    "screen_of",
    "screen_shape",
    "search_steps",
    "set_threads",
    "settle",
    "threads",
    "unpack",
]
