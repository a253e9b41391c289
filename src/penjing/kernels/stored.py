"""Matrices as bytes of a file: written as they lie in memory, and read again without packing."""

from __future__ import annotations

from collections.abc import Sequence

from .. import _native
from .matrix import Matrix
from .screen import Screen

LAYOUT: int = _native.STORED_LAYOUT  # another one when the bytes mean something else; the same for all machines


def store(matrix: Matrix, file: int) -> tuple[int, int]:
    """Write a matrix where an open file is → how many bytes, a multiple of 64, and their checksum. Raises OSError."""
    return _native.store_matrix(matrix.native, file)


def restore(file: int, sections: Sequence[tuple[int, int, int]]) -> list[Matrix | None]:
    """The matrices at (offset, bytes, checksum) of an open file, all in one piece of memory that goes with the last.

    Sections are in order and do not overlap. None for each that is damaged: its checksum is another, or what it
    says of itself does not fit its bytes. Raises ValueError for offsets that cannot be, MemoryError.
    """
    found = _native.load_matrices(file, list(sections))
    return [None if native is None else _wrapped(native) for native in found]


def _wrapped(native: _native.Matrix) -> Matrix:
    return Screen(native) if isinstance(native, _native.Screen) else Matrix(native)
