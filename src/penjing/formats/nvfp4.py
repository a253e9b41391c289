"""NVFP4: four-bit floats (E2M1) in blocks of 16 with an E4M3 step each, and one float32 step for the tensor.

NVIDIA's block format for Blackwell: a number is code · block step · tensor step. The tensor step makes the largest
block step 448, so that the steps of small blocks stay normal numbers. 4.5 bits a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from . import mxfp4
from .fp8 import E4M3, LARGEST

BLOCK = 16


@dataclass(frozen=True)
class Nvfp4Tensor:
    """blocks: uint8 (out, in / 16, 8), two codes a byte, the low half first.  scales: uint8 (out, in / 16), E4M3.

    scale: of the tensor.
    """

    blocks: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    scale: np.float32

    @property
    def shape(self) -> tuple[int, int]:
        rows, groups = self.scales.shape
        return rows, groups * BLOCK

    @property
    def bits_per_weight(self) -> float:
        return 4 + 8 / BLOCK + 32 / (self.scales.size * BLOCK)

    def decode(self) -> NDArray[np.float32]:
        """float32 (out, in)."""
        steps = self.scales.view(E4M3).astype(np.float32) * self.scale
        decoded: NDArray[np.float32] = (mxfp4.values(self.blocks) * steps[..., None]).reshape(self.shape)
        return decoded


def encode(weight: NDArray[Any]) -> Nvfp4Tensor:
    """A matrix (out, in), in a multiple of 16; steps put the largest weight of a block on 6, the largest code."""
    rows, columns = weight.shape
    if columns % BLOCK:
        raise BadInput(f"NVFP4 has blocks of {BLOCK}: {columns} columns are not a multiple")
    grouped = weight.astype(np.float32).reshape(rows, -1, BLOCK)
    reach = np.abs(grouped).max(axis=2) / np.float32(mxfp4.LARGEST)
    scale = np.float32(reach.max() / LARGEST) or np.float32(1)
    scales = np.clip(reach / scale, 0, LARGEST).astype(E4M3)
    steps = scales.astype(np.float32) * scale
    usable = np.where(steps > 0, steps, np.float32(1))  # a block whose step rounds to 0 is 0
    return Nvfp4Tensor(mxfp4.codes((grouped / usable[..., None]).astype(np.float32)), scales.view(np.uint8), scale)
