"""Matrix products with float activations on weights of any layout, and int8 × int8."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import _native
from ..errors import BadInput
from ..formats import floats
from ..formats.affine import AffineTensor
from ..formats.bitmask import BitmaskTensor
from ..formats.floats import FloatTensor
from ..formats.mxfp4 import Mxfp4Tensor
from ._bits import float_bits, is_bfloat16
from .stream import bitmask_decode

# From this share of zeros on, a bitmask and the non-zeros read faster than dense codes.
SPARSE_FROM = 0.4


class Matrix:
    """A weight (out, in) in the layout of its kernel; made by `matrix_from`.

    rows: out.  columns: in.  nbytes: bytes it takes in memory.  layout: what it holds, such as "int4",
    "bfloat16-sparse" or "int4-int8-groups" (activations quantized too).
    """

    __slots__ = ("_native", "columns", "layout", "nbytes", "rows")

    def __init__(self, native: _native.Matrix) -> None:
        self._native = native
        self.rows, self.columns = native.rows, native.columns
        self.nbytes, self.layout = native.nbytes, native.layout

    @property
    def native(self) -> _native.Matrix:
        """As other native code takes it."""
        return self._native

    def __call__(
        self, x: NDArray[np.float32], bias: NDArray[np.float32] | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """x (m, in) float32 → x @ weightᵀ + bias, (m, out) float32, in ``out`` when given."""
        return self._native.multiply(np.ascontiguousarray(x, np.float32), bias, out)

    def decode(self, rows: slice | NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        """The numbers that the layout stands for, all rows or those given: float32 (rows, in)."""
        if rows is None or isinstance(rows, slice):
            rows = np.arange(self.rows)[rows or slice(None)]
        return self._native.decode(np.ascontiguousarray(rows, np.int64))

    def __repr__(self) -> str:
        return f"Matrix({self.rows} × {self.columns}, {self.layout}, {self.nbytes} bytes)"


def matrix_from(
    weight: NDArray[Any] | AffineTensor | FloatTensor | BitmaskTensor | Mxfp4Tensor,
    *,
    activations: Literal["float", "int8", "int8-groups"] = "float",
    sparse: bool | None = None,
) -> Matrix:
    """A weight (out, in), put into the layout of its kernel.

    weight: float32, float16 or bfloat16 array, an AffineTensor, a FloatTensor (the numbers it stands for, unless it is
    MXFP4 and inputs are quantized), a BitmaskTensor of floats, or an Mxfp4Tensor.
    activations: "float" keeps them. "int8" quantizes each row of x on the fly, symmetrically, with one step (8-bit
    weights with one step a row or a tensor). "int8-groups" does so with a step for up to 128 columns, on integer
    weights of any bits and groups; floats stay floats.  sparse: keep a bitmask and the non-zeros, expanded
    in registers; None does so from 40 % zeros on where it is smaller.  Codes of 2 and 3 bits are kept as 4 when sparse,
    those of 5 to 7 always as bytes.
    Raises BadInput for combinations that no kernel has.
    """
    if activations not in ("float", "int8", "int8-groups"):
        raise BadInput(f"activations={activations!r}: known: float, int8, int8-groups")
    if isinstance(weight, AffineTensor):
        return Matrix(_from_affine(weight, activations, sparse))
    if isinstance(weight, FloatTensor):
        if weight.grid.kind == "mxfp4" and activations == "int8-groups":
            return Matrix(_native.matrix_from_mxfp4(floats.pack(weight.codes), floats.exponents(weight.scale)))
        weight = weight.decode()
    if isinstance(weight, Mxfp4Tensor):
        if activations == "int8-groups":
            blocks = np.ascontiguousarray(weight.blocks).reshape(len(weight.blocks), -1)
            return Matrix(_native.matrix_from_mxfp4(blocks, np.ascontiguousarray(weight.scales)))
        weight = weight.decode()
    if activations == "int8":
        raise BadInput("activations='int8' needs 8-bit weights with one step a row or a tensor; these are floats")
    if isinstance(weight, BitmaskTensor):
        weight, sparse = bitmask_decode(weight.values, weight.bitmask, weight.shape), sparse is not False
    if weight.ndim != 2:
        raise BadInput(f"a weight of shape {weight.shape}: give a matrix (out, in)")
    if sparse is None:
        sparse = int(np.count_nonzero(weight)) <= (1 - SPARSE_FROM) * weight.size
    return Matrix(_native.matrix_from_floats(float_bits(weight), is_bfloat16(weight), sparse))


def _from_affine(tensor: AffineTensor, activations: str, sparse: bool | None) -> _native.Matrix:
    grid, rows = tensor.grid, tensor.shape[0]
    if activations == "int8" and (grid.bits != 8 or grid.group_size > 0):
        raise BadInput(
            f"activations='int8' needs 8-bit weights with one step a row or a tensor; "
            f"these have {grid.bits} bits and group_size={grid.group_size}"
        )
    scale = _a_row_each(tensor.scale, rows)
    zero_point = None if tensor.zero_point is None else _a_row_each(tensor.zero_point, rows)
    codes = np.ascontiguousarray(tensor.codes)
    if sparse is None:
        zeros = _zeros(codes, zero_point)
        dense_bits, kept_bits = (grid.bits, 4) if grid.bits <= 4 else (8, 8)
        smaller = 1 + (1 - zeros) * kept_bits < dense_bits
        sparse = zeros >= SPARSE_FROM and smaller
    return _native.matrix_from_codes(codes, grid.bits, scale, zero_point, activations, sparse)


def _a_row_each(steps: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.ascontiguousarray(np.broadcast_to(steps, (rows, steps.shape[1])))


def _zeros(codes: NDArray[np.int8], zero_point: NDArray[np.int8] | None) -> float:
    """The share of codes that stand for 0."""
    if zero_point is None:
        kept = np.count_nonzero(codes)
    else:
        kept = np.count_nonzero(codes.reshape(*zero_point.shape, -1) != zero_point[..., None])
    return 1 - int(kept) / codes.size
