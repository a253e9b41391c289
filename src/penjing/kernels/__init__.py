"""The kernels: matrix products on compressed weights, integer layers, and the compressor's fast primitives.

Everything takes and returns numpy arrays; docs/kernels.md describes layouts, rounding and the choice of instruction
set, and `reference` has each computation in plain numpy.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import _native
from ..errors import BadInput
from ..formats.affine import AffineTensor
from ..formats.bitmask import BitmaskTensor
from . import reference
from .reference import (
    IntegerConv,
    IntegerLinear,
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
    "bitmask_decode",
    "bitmask_encode",
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

isa = _native.isa


def threads() -> int:
    """Threads that a large product is spread over."""
    return 1


def set_threads(count: int) -> None:
    """Spread large products over that many threads."""


class Matrix(Protocol):
    """A weight (out, in) in the layout of its kernel: rows = out, columns = in, nbytes = resident bytes."""

    rows: int
    columns: int
    nbytes: int
    layout: str

    def __call__(self, x: NDArray[np.float32], bias: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """x (m, in) float32 → x @ weightᵀ + bias, (m, out) float32."""
        ...

    def decode(self, rows: slice | NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        """The numbers that the layout stands for, all rows or the given ones: float32 (rows, in)."""
        ...


class _Plain:
    def __init__(self, weight: Any, activations: str) -> None:
        self._tensor, self._int8 = weight, activations == "int8"
        self._weight = np.asarray(weight.decode() if hasattr(weight, "decode") else weight).astype(np.float32)
        self.rows, self.columns = self._weight.shape
        self.nbytes, self.layout = self._weight.nbytes, "float32"

    def __call__(self, x: NDArray[np.float32], bias: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        if self._int8:
            return reference.int8_matrix(x, self._tensor, bias)
        y = x @ self._weight.T
        return y if bias is None else y + bias

    def decode(self, rows: slice | NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        return self._weight[slice(None) if rows is None else rows]


def matrix_from(
    weight: NDArray[Any] | AffineTensor | BitmaskTensor,
    *,
    activations: Literal["float", "int8"] = "float",
    sparse: bool | None = None,
) -> Matrix:
    """A weight (out, in), put into the layout of its kernel.

    weight: float32, float16 or bfloat16 array, an AffineTensor, or a BitmaskTensor of floats.
    activations: "int8" quantizes each row of x on the fly (needs 8-bit weights with one step a row or a tensor).
    sparse: store a bitmask and the non-zeros; None does so from 40 % zeros on.
    """
    if activations == "int8" and not (
        isinstance(weight, AffineTensor) and weight.grid.bits == 8 and weight.grid.group_size <= 0
    ):
        raise BadInput("activations='int8' needs 8-bit weights with one step a row or a tensor")
    return _Plain(weight, activations)
