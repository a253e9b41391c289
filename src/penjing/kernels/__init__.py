"""The kernels: matrix products on compressed weights, integer layers, and the compressor's fast primitives.

Everything takes and returns numpy arrays; docs/kernels.md describes layouts, rounding and the choice of instruction
set, and `reference` has each computation in plain numpy. Wrong shapes and types raise BadInput or ValueError.
"""

from __future__ import annotations

from .._native import IntegerConv, IntegerLinear, isa, set_threads, threads
from .decoder import attention, gated
from .matrix import Matrix, matrix_from
from .stream import (
    bitmask_decode,
    bitmask_encode,
    has_nonfinite,
    pack,
    prune,
    prune_threshold,
    quantize,
    quantize_packed,
    unpack,
)

__all__ = [
    "IntegerConv",
    "IntegerLinear",
    "Matrix",
    "attention",
    "bitmask_decode",
    "bitmask_encode",
    "gated",
    "has_nonfinite",
    "isa",
    "matrix_from",
    "pack",
    "prune",
    "prune_threshold",
    "quantize",
    "quantize_packed",
    "set_threads",
    "threads",
    "unpack",
]
