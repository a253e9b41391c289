"""MXFP4: four-bit floats in blocks of 32 that share a power of two (OCP Microscaling Formats 1.0, 2023).

Codes are E2M1: one sign, two exponent and one mantissa bit. Two lie in a byte, the first in its low half; a block's
scale is a byte that stands for 2^(scale − 127). Every number of the format is a bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput

BLOCK = 32
NAN = 255  # the one scale that is no number
LARGEST = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)


def values(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes (…, n / 2) of two E2M1 codes each → what the codes stand for, float32 (…, n)."""
    both = np.stack([blocks & 0xF, blocks >> 4], axis=-1)
    return _VALUES[both.reshape(*blocks.shape[:-1], -1)]


def codes(numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Numbers (…, n), n even → the nearest E2M1 codes, ties to even, ±6 at most: bytes (…, n / 2)."""
    clipped = np.clip(numbers, -LARGEST, LARGEST)
    nearest = clipped.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return nearest[..., ::2] | nearest[..., 1::2] << np.uint8(4)


def encode(weight: NDArray[Any]) -> Mxfp4Tensor:
    """A matrix (out, in), in a multiple of 32; a block's scale is its largest exponent less 2, as in the standard."""
    rows, columns = weight.shape
    if columns % BLOCK:
        raise BadInput(f"MXFP4 has blocks of {BLOCK}: {columns} columns are not a multiple")
    grouped = weight.astype(np.float32).reshape(rows, -1, BLOCK)
    largest = np.abs(grouped).max(axis=2)
    # frexp gives a fraction in [1/2, 1): the exponent is one less, and that of 6 is 2
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 3, 0)
    scales = np.clip(exponent + 127, 0, 254)
    return Mxfp4Tensor(codes(np.ldexp(grouped, 127 - scales[..., None])), scales.astype(np.uint8))


def decode(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[ml_dtypes.bfloat16]:
    """blocks (…, groups, 16) and scales (…, groups) → bfloat16 (…, groups · 32)."""
    scaled = np.ldexp(values(blocks), scales.astype(np.int32)[..., None] - 127)
    return scaled.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK).astype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Mxfp4Tensor:
    """A matrix (out, in) as it is stored: blocks uint8 (out, in / 32, 16), scales uint8 (out, in / 32)."""

    blocks: NDArray[np.uint8]
    scales: NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, int]:
        rows, groups = self.scales.shape
        return rows, groups * BLOCK

    def decode(self) -> NDArray[ml_dtypes.bfloat16]:
        return decode(self.blocks, self.scales)
