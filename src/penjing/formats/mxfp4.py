"""MXFP4: four-bit floats in blocks of 32 that share a power of two (OCP Microscaling Formats 1.0, 2023).

Codes are E2M1: one sign, two exponent and one mantissa bit. Two lie in a byte, the first in its low half; a block's
scale is a byte that stands for 2^(scale − 127). Every number of the format is a bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)


def decode(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[ml_dtypes.bfloat16]:
    """blocks (…, groups, 16) and scales (…, groups) → bfloat16 (…, groups · 32)."""
    codes = np.stack([blocks & 0xF, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], BLOCK)
    values = np.ldexp(_VALUES[codes], scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK).astype(ml_dtypes.bfloat16)


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
