"""The row of a float matrix with the greatest product, found by reading a copy in 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _native
from .._native import Screen as NativeScreen
from ..errors import BadInput
from .matrix import Matrix

COLUMNS = 128  # that share a step; a screen's are padded to a multiple of it


class Screen(Matrix):
    """Which row of a float matrix has the greatest product with x, to the bit as the matrix computes them.

    Reads half of what a bfloat16 matrix is, and of that only the rows which bounds do not rule out. As a matrix it is
    the copy, columns padded with zeros to a multiple of 128.
    """

    __slots__ = ()

    _native: NativeScreen

    @property
    def native(self) -> NativeScreen:
        return self._native

    def greatest(
        self, matrix: Matrix, x: NDArray[np.float32], scale: float = 1.0
    ) -> tuple[NDArray[np.int64], int] | None:
        """x (m, in), m up to 8 → (m,), the first of the rows with the greatest scale · product, and how many panels of
        sixteen rows ``matrix`` had to compute; None where a product might not be finite."""
        found: Any = self._native.greatest(matrix.native, np.ascontiguousarray(x, np.float32), scale)
        return None if found is None else (found[0], found[1])


def can_screen(matrix: Matrix) -> bool:
    """Are its products computed on floats?"""
    return "float" in matrix.layout


def screen_of(matrix: Matrix) -> Screen:
    """Raises BadInput for a matrix of integers, which is read as fast as its screen would be."""
    if not can_screen(matrix):
        raise BadInput(f"a screen of {matrix.layout}: only matrices of floats have one")
    return Screen(_native.screen_of(matrix.native))


def screen_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the screen of a matrix (rows, columns)."""
    return rows, -(-columns // COLUMNS) * COLUMNS


def screen_bytes(rows: int, columns: int) -> int:
    """The most that it takes: a byte a weight, a step for 128 and two bounds a row."""
    return -(-rows // 16) * 16 * (screen_shape(rows, columns)[1] // COLUMNS * (COLUMNS + 4) + 8)
