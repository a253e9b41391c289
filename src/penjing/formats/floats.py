"""Weights as floats of 8 or 4 bits times steps: FP8, MXFP4 and NVFP4, the formats that GPUs multiply.

    fp8        E4M3, a step for a row or the tensor
    fp8-block  E4M3, a step for a block of 128 rows × 128 columns (as DeepSeek-V3's weights)
    mxfp4      E2M1, a power of two for 32 columns of a row (OCP Microscaling Formats 1.0, 2023)
    nvfp4      E2M1, a step in E4M3 for 16 columns, and one divisor in float32 for the tensor: code · step / divisor

E4M3 has 4 exponent and 3 mantissa bits, no infinities, 448 at most and a NaN in 0x7f and 0xff (Micikevicius et al.,
2022, arXiv 2209.05433); E2M1 has ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}. Rounding is to nearest, ties to even; what lies beyond
the largest saturates. Numbers are decoded to bfloat16, or for fp8 to what its steps are stored in, once rounded: as
transformers decodes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from .affine import PER_CHANNEL, PER_TENSOR, SCALE_DTYPES

E4M3: Any = ml_dtypes.float8_e4m3fn
E2M1: Any = ml_dtypes.float4_e2m1fn
Floats = NDArray[np.float32]
KINDS = ("fp8", "fp8-block", "mxfp4", "nvfp4")
MX_BLOCK, NV_BLOCK, FP8_BLOCK = 32, 16, 128
BIAS = 127  # of a power of two that is stored as a byte; 255 is no number
E4M3_LARGEST = np.float32(448)
_LARGEST = {8: E4M3_LARGEST, 4: np.float32(6)}
_TABLES = {
    8: np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32),
    4: (np.arange(16, dtype=np.uint8)).view(E2M1).astype(np.float32),
}
_LEAST_E4M3 = np.float32(2.0**-9)
_SLAB = 1 << 20  # numbers that are worked on at a time, so that little is held beside the result


@dataclass(frozen=True)
class FloatGrid:
    """kind: of `KINDS`.  group_size: columns that share a step; -1 a row, 0 the tensor.

    scale_dtype: what steps of fp8 are stored in.  reach: the largest number that a step of the whole tensor is to
    hold (of fp8 with group_size 0, and of nvfp4); None is the weight's own largest.
    """

    kind: str = "fp8"
    group_size: int = PER_CHANNEL
    scale_dtype: str = "float32"
    reach: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInput(f"format={self.kind!r}: known: {', '.join(KINDS)}")
        right = {"fp8": (PER_CHANNEL, PER_TENSOR), "fp8-block": (FP8_BLOCK,), "mxfp4": (MX_BLOCK,)}
        if self.group_size not in (sizes := right.get(self.kind, (NV_BLOCK,))):
            raise BadInput(f"group_size={self.group_size}: {self.kind} has {' or '.join(map(str, sizes))}")

    @property
    def bits(self) -> int:
        return 8 if self.kind.startswith("fp8") else 4

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def largest(self) -> np.float32:
        """The largest code."""
        return _LARGEST[self.bits]

    @property
    def height(self) -> int:
        """Rows that share a step, where not one or all do."""
        return FP8_BLOCK if self.kind == "fp8-block" else 1

    @property
    def by_tensor(self) -> bool:
        """Is there a step for the whole tensor, which depends on the largest of its numbers?"""
        return self.kind == "nvfp4" or self.group_size == PER_TENSOR

    @property
    def dtype(self) -> np.dtype[Any]:
        """What numbers are decoded to."""
        found: np.dtype[Any] = np.dtype(SCALE_DTYPES[self.scale_dtype] if self.bits == 8 else ml_dtypes.bfloat16)
        return found

    def groups(self, columns: int) -> int:
        """Steps in a row of that many columns; BadInput where groups do not divide them."""
        if self.group_size <= 0:
            return 1
        if columns % self.group_size:
            raise BadInput(f"{self.kind} has blocks of {self.group_size} columns, which do not divide {columns}")
        return columns // self.group_size

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Codes and steps, over the number of weights."""
        steps = 1 if self.group_size == PER_TENSOR else -(-rows // self.height) * self.groups(columns)
        each = 8 * np.dtype(SCALE_DTYPES[self.scale_dtype]).itemsize if self.bits == 8 else 8
        return self.bits + (steps * each + (32 if self.kind == "nvfp4" else 0)) / (rows * columns)

    def nearest(self, numbers: Floats) -> Floats:
        """Numbers in steps, any shape, as the nearest codes stand for: float32."""
        found: Floats = _TABLES[self.bits][self.codes(numbers)]
        return found

    def codes(self, numbers: Floats) -> NDArray[np.uint8]:
        """Numbers in steps, any shape, as the bits of the nearest codes; of E2M1 in the low half of a byte."""
        dtype = E4M3 if self.bits == 8 else E2M1
        nearest: NDArray[np.uint8] = np.clip(numbers, -self.largest, self.largest).astype(dtype).view(np.uint8)
        return nearest

    def steps(self, reach: Floats, divisor: np.float32) -> Floats:
        """The steps, as they are stored, that put numbers of that size (≥ 0, any shape) on the largest code.

        A power of two is the least that the largest number, once rounded, does not leave (as compressed-tensors and
        vLLM choose it). Steps are positive, so that zeros have one too.
        """
        if self.kind == "mxfp4":
            fraction, exponent = np.frexp(np.where(reach > 0, reach, np.float32(1)))  # fraction in [1/2, 1)
            exponent = exponent - 3 + (fraction >= 0.875)
            found: Floats = np.ldexp(np.float32(1), np.clip(exponent, -BIAS, BIAS)).astype(np.float32)
            return found
        if self.kind == "nvfp4":
            wanted = np.clip(reach / self.largest * divisor, _LEAST_E4M3, _LARGEST[8])
            found = wanted.astype(E4M3).astype(np.float32)
            return found
        found = (reach / self.largest).astype(SCALE_DTYPES[self.scale_dtype]).astype(np.float32)
        return np.where(found > 0, found, np.float32(1))

    def divisor(self, reach: float) -> np.float32:
        """What steps of nvfp4 are divided by, for a tensor whose largest number is ``reach``; 1 for other kinds."""
        if self.kind != "nvfp4" or not reach > 0:
            return np.float32(1)
        return np.float32(_LARGEST[8] * self.largest / np.float32(max(reach, 1e-30)))


@dataclass(frozen=True)
class FloatTensor:
    """A matrix of small floats.

    codes: uint8 (out, in), a code a byte.  scale: float32 (out, groups), or (1, 1) for one step a tensor; the rows of a
    block repeat theirs.  divisor: of all steps, see `FloatGrid.divisor`.
    """

    codes: NDArray[np.uint8]
    scale: Floats
    divisor: np.float32
    grid: FloatGrid

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def decode(self) -> NDArray[Any]:
        """The numbers that the codes stand for: (out, in), of ``grid.dtype``."""
        found = np.empty(self.shape, self.grid.dtype)
        table, steps = _TABLES[self.grid.bits], self.scale / self.divisor
        for rows in slabs(*self.shape):
            part = table[self.codes[rows]]
            at = steps[rows] if len(steps) > 1 else steps
            grouped = part.reshape(len(part), at.shape[1], -1)
            found[rows] = (grouped * at[..., None]).reshape(part.shape)
        return found

    def rows(self, rows: slice | NDArray[np.int64]) -> FloatTensor:
        """Some of its rows, with the same steps."""
        scale = self.scale if self.scale.shape == (1, 1) else np.ascontiguousarray(self.scale[rows])
        return dataclasses.replace(self, codes=np.ascontiguousarray(self.codes[rows]), scale=scale)

    def zeros(self) -> int:
        """How many numbers are 0."""
        sign = 0x80 if self.grid.bits == 8 else 0x08
        return int(self.codes.size - np.count_nonzero(self.codes & np.uint8(sign - 1)))

    @property
    def bits_per_weight(self) -> float:
        return self.grid.bits_per_weight(*self.shape)


def slabs(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a matrix, a million numbers or so at a time."""
    step = max(1, _SLAB // max(columns, 1))
    return (slice(low, low + step) for low in range(0, rows, step))


def largest(weight: NDArray[Any]) -> float:
    """max |w| of a matrix (out, in), 0 of an empty one."""
    return max((float(np.abs(weight[rows].astype(np.float32)).max()) for rows in slabs(*weight.shape)), default=0.0)


def ranges(weight: NDArray[Any], grid: FloatGrid) -> Floats:
    """max |w| of what shares a step: (out, groups), the rows of a block alike, or (1, 1)."""
    if grid.group_size == PER_TENSOR:
        reach = largest(weight) if grid.reach is None else grid.reach
        return np.full((1, 1), reach, np.float32)
    groups = grid.groups(weight.shape[1])
    found = np.empty((len(weight), groups), np.float32)
    for rows in slabs(*weight.shape):
        part = np.abs(weight[rows].astype(np.float32))
        found[rows] = part.reshape(len(part), groups, -1).max(axis=2)
    if grid.height > 1:
        tops = np.maximum.reduceat(found, range(0, len(found), grid.height), axis=0)
        found = np.repeat(tops, grid.height, axis=0)[: len(found)]
    return found


def divisor_of(weight: NDArray[Any], grid: FloatGrid) -> np.float32:
    """`FloatGrid.divisor` of a matrix, or of the reach that its grid is given."""
    if grid.kind != "nvfp4":
        return np.float32(1)
    return grid.divisor(largest(weight) if grid.reach is None else grid.reach)


def encode(weight: NDArray[Any], scale: Floats, divisor: np.float32, grid: FloatGrid) -> FloatTensor:
    """A matrix (out, in) rounded to nearest on the given steps."""
    codes = np.empty(weight.shape, np.uint8)
    steps = scale / divisor
    for rows in slabs(*weight.shape):
        part = weight[rows].astype(np.float32)
        at = steps[rows] if len(steps) > 1 else steps
        codes[rows] = grid.codes(part.reshape(len(part), at.shape[1], -1) / at[..., None]).reshape(part.shape)
    return FloatTensor(codes, scale, divisor, dataclasses.replace(grid, reach=None))


def quantize(weight: NDArray[Any], grid: FloatGrid) -> FloatTensor:
    """A matrix (out, in) on steps that hold the largest of what shares them. BadInput where blocks do not divide it."""
    divisor = divisor_of(weight, grid)
    return encode(weight, grid.steps(ranges(weight, grid), divisor), divisor, grid)


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes of 4 bits (out, in), in even, as two in a byte (out, in / 2), the first in its low half."""
    return codes[:, ::2] | codes[:, 1::2] << np.uint8(4)


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of `pack`."""
    both = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return both.reshape(packed.shape[0], -1)


def exponents(scale: Floats) -> NDArray[np.uint8]:
    """Powers of two as the bytes that stand for them."""
    return (np.frexp(scale)[1] - 1 + BIAS).astype(np.uint8)
