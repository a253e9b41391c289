"""Codes of 2 to 8 bits packed into int32 words, as compressed-tensors' ``pack-quantized`` lays them out.

A code is stored as ``code − qmin`` (unsigned). A row is one stream of bits, lowest bit first, padded to whole words:
code i takes the bits from ``i · bits`` on, so that codes of 3, 5, 6 or 7 bits may straddle two words and none is
wasted. Words are little-endian.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def words(columns: int, bits: int) -> int:
    """int32 words that a row of that many codes takes."""
    return -(-columns * bits // 32)


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """int8 (rows, columns) in [qmin, qmax] → int32 (rows, words)."""
    rows, columns = codes.shape
    unsigned = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    stream = np.zeros((rows, words(columns, bits) * 32), np.uint8)
    each = np.unpackbits(unsigned[..., None], axis=2, count=bits, bitorder="little")
    stream[:, : columns * bits] = each.reshape(rows, -1)
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def unpack(packed: NDArray[np.int32], bits: int, columns: int) -> NDArray[np.int8]:
    """int32 (rows, words) → int8 (rows, columns); the inverse of `pack`."""
    rows = packed.shape[0]
    stream = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=1, count=columns * bits, bitorder="little")
    unsigned = np.packbits(stream.reshape(rows, columns, bits), axis=2, bitorder="little")[..., 0]
    return (unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
