"""The affine integer grid: codes, scales and zero points of 2 to 8 bits.

    x_q = clamp(round(x · scale + bias), qmin, qmax)        scale = 1/s, bias = z
    x   ≈ (x_q − z) · s

Rounding is to nearest, ties to even. A weight is a matrix (out, in): one step `s` (and one `z` unless the grid
is symmetric) for the whole tensor, for each row (channel), or for each group of `group_size` columns of a row.
This file is the oracle that the native encoders and kernels are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput

PER_CHANNEL = -1
PER_TENSOR = 0
SCALE_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


@dataclass(frozen=True)
class Grid:
    """How numbers are put on integers.

    bits: 2 to 8.  group_size: columns that share a step; -1 one step a row, 0 one step a tensor.
    symmetric: no zero point, codes centred on 0.  scale_dtype: what the step is stored in; codes are computed
    with the step as stored, so that decoding loses nothing further.
    """

    bits: int = 8
    group_size: int = PER_CHANNEL
    symmetric: bool = True
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise BadInput(f"bits={self.bits}: the affine grid has 2 to 8 bits")
        if self.group_size < -1:
            raise BadInput(f"group_size={self.group_size}: give columns per group, -1 (channel) or 0 (tensor)")
        if self.scale_dtype not in SCALE_DTYPES:
            raise BadInput(f"scale_dtype={self.scale_dtype!r}: known: {', '.join(SCALE_DTYPES)}")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """Steps in a row of that many columns (a whole-tensor step counts as one)."""
        if self.group_size <= 0:
            return 1
        if columns % self.group_size:
            raise BadInput(f"group_size={self.group_size} does not divide {columns} columns")
        return columns // self.group_size

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Codes, steps and zero points, over the number of weights."""
        steps = 1 if self.group_size == PER_TENSOR else rows * self.groups(columns)
        step_bits: int = np.dtype(SCALE_DTYPES[self.scale_dtype]).itemsize * 8
        return self.bits + steps * (step_bits + (0 if self.symmetric else self.bits)) / (rows * columns)


@dataclass(frozen=True)
class AffineTensor:
    """A matrix on a grid.

    codes: int8 (out, in), in [qmin, qmax].  scale: float32 (out, groups), or (1, 1) for one step a tensor; it
    holds the step `s`, exactly representable in ``grid.scale_dtype``.  zero_point: int8, shaped like scale, or
    None on a symmetric grid.
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int8] | None
    grid: Grid

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def decode(self) -> NDArray[np.float32]:
        """The numbers that the codes stand for: float32 (out, in)."""
        return decode(self.codes, self.scale, self.zero_point)

    def rows(self, rows: slice | NDArray[np.int64]) -> AffineTensor:
        """Some of its rows, on the same grid."""
        at = rows if len(self.scale) == len(self.codes) else slice(None)
        zero = None if self.zero_point is None else self.zero_point[at]
        return AffineTensor(self.codes[rows], self.scale[at], zero, self.grid)


def _grouped(values: NDArray[Any], scale: NDArray[Any]) -> NDArray[Any]:
    """(out, in) as (out, groups, columns per group), so that steps broadcast over the last axis."""
    return values.reshape(values.shape[0], scale.shape[1], -1)


def fit(low: NDArray[np.float32], high: NDArray[np.float32], grid: Grid) -> tuple[Any, Any]:
    """Steps and zero points that cover the ranges [low, high] (any shape) → scale float32, zero_point int8 or None.

    A symmetric step is max(|low|, |high|) / qmax' with qmax' = (qmax − qmin)/2, as in compressed-tensors, so that
    both ends of the range are met to half a step. A range of zero width gets the step 1.
    """
    low, high = np.minimum(low, 0).astype(np.float32), np.maximum(high, 0).astype(np.float32)
    span = np.float32((grid.qmax - grid.qmin) / 2) if grid.symmetric else np.float32(grid.qmax - grid.qmin)
    reach = np.maximum(-low, high) if grid.symmetric else high - low
    dtype = SCALE_DTYPES[grid.scale_dtype]
    scale = (reach / span).astype(dtype).astype(np.float32)
    scale = np.where(scale == 0, np.float32(1), scale)
    if grid.symmetric:
        return scale, None
    zero_point = np.clip(np.rint(grid.qmin - low / scale), grid.qmin, grid.qmax).astype(np.int8)
    return scale, zero_point


def ranges(weight: NDArray[np.float32], grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smallest and largest value of each group of a matrix (out, in): two arrays (out, groups) or (1, 1)."""
    if grid.group_size == PER_TENSOR:
        return weight.min(keepdims=True), weight.max(keepdims=True)
    grouped = weight.reshape(weight.shape[0], grid.groups(weight.shape[1]), -1)
    return grouped.min(axis=2), grouped.max(axis=2)


def encode(
    weight: NDArray[np.float32], scale: NDArray[np.float32], zero_point: NDArray[np.int8] | None, grid: Grid
) -> NDArray[np.int8]:
    """Codes int8 (out, in) of a matrix float32 (out, in) on the given steps."""
    steps = np.broadcast_to(scale, (weight.shape[0], scale.shape[1]))
    codes = _grouped(weight, steps) * (np.float32(1) / steps)[..., None]
    if zero_point is not None:
        codes += np.broadcast_to(zero_point, steps.shape)[..., None]
    rounded: NDArray[np.int8] = np.clip(np.rint(codes), grid.qmin, grid.qmax).astype(np.int8)
    return rounded.reshape(weight.shape)


def spread(steps: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Steps or zero points, (out, groups) or (1, 1), as one for each weight: a read-only (out, in)."""
    return np.broadcast_to(np.repeat(steps, shape[1] // steps.shape[1], axis=1), shape)


def decode(
    codes: NDArray[np.int8], scale: NDArray[np.float32], zero_point: NDArray[np.int8] | None
) -> NDArray[np.float32]:
    """(codes − zero_point) · scale, float32 (out, in)."""
    steps = np.broadcast_to(scale, (codes.shape[0], scale.shape[1]))
    values = _grouped(codes, steps).astype(np.float32)
    if zero_point is not None:
        values -= np.broadcast_to(zero_point, steps.shape)[..., None]
    return (values * steps[..., None]).reshape(codes.shape)
