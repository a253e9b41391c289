"""MXFP4 as gpt-oss stores it, and as the kernel takes it: four-bit floats in blocks of 32 that share a power of two.

Codes are E2M1: one sign, two exponent and one mantissa bit. Two lie in a byte, the first in its low half; a block's
scale is a byte that stands for 2^(scale − 127). Every number of the format is a bfloat16 (OCP Microscaling Formats 1.0,
2023). What Penjing rounds to it is in `floats`.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BLOCK = 32
NAN = 255  # the one scale that is no number
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)


def values(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes (…, n / 2) of two E2M1 codes each → what the codes stand for, float32 (…, n)."""
    both = np.stack([blocks & 0xF, blocks >> 4], axis=-1)
    return _VALUES[both.reshape(*blocks.shape[:-1], -1)]


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
