"""Sparse matrices as a bitmask and the non-zeros: one bit a weight, and the kept weights row by row.

The layout is that of compressed-tensors' ``sparse-bitmask``: bit i of a row's bitmask (lowest bit of the first byte
first) says that column i is kept; ``row_offsets[r]`` is where row r's kept values begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BitmaskTensor:
    """values: (kept,) of any dtype.  bitmask: uint8 (rows, ceil(columns / 8)).  row_offsets: int64 (rows,).

    shape: (rows, columns).
    """

    values: NDArray[Any]
    bitmask: NDArray[np.uint8]
    row_offsets: NDArray[np.int64]
    shape: tuple[int, int]

    def decode(self) -> NDArray[Any]:
        """The matrix, with zeros where nothing was kept."""
        return decode(self.values, self.bitmask, self.shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.bitmask.nbytes + self.row_offsets.nbytes


def encode(matrix: NDArray[Any]) -> BitmaskTensor:
    """A matrix (rows, columns) of any dtype; what equals zero is not stored."""
    kept = matrix != 0
    counts = kept.sum(axis=1, dtype=np.int64)
    return BitmaskTensor(
        values=matrix[kept],
        bitmask=np.packbits(kept, axis=1, bitorder="little"),
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)[:-1]]),
        shape=(matrix.shape[0], matrix.shape[1]),
    )


def decode(values: NDArray[Any], bitmask: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[Any]:
    """Values back at their places: a matrix of ``shape`` with the values' dtype."""
    matrix = np.zeros(shape, values.dtype)
    matrix[kept(bitmask, shape[1])] = values
    return matrix


def kept(bitmask: NDArray[np.uint8], columns: int) -> NDArray[np.bool_]:
    """Which weights a bitmask (rows, ceil(columns / 8)) keeps: bool (rows, columns)."""
    return np.unpackbits(bitmask, axis=1, count=columns, bitorder="little").astype(bool)
