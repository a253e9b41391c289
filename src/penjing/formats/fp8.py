"""FP8 weights: E4M3 floats (4 exponent, 3 mantissa bits) times a step for the tensor, a row or a group.

The finite variant of Micikevicius et al., 2022 (arXiv 2209.05433): no infinities, largest number 448, a NaN in 0x7f and
0xff. Rounding is to nearest, ties to even; what is larger than 448 steps saturates. The size is 8 bits a weight and a
float32 a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput

E4M3: Any = ml_dtypes.float8_e4m3fn
LARGEST = np.float32(448)


@dataclass(frozen=True)
class Fp8Tensor:
    """codes: uint8 (out, in), the bits of E4M3.  scale: float32 (out, groups), or (1, 1) for one step a tensor."""

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]

    def decode(self) -> NDArray[np.float32]:
        """float32 (out, in)."""
        rows, columns = self.codes.shape
        values = self.codes.view(E4M3).astype(np.float32).reshape(rows, self.scale.shape[1], -1)
        decoded: NDArray[np.float32] = (values * self.scale[..., None]).reshape(rows, columns)
        return decoded

    @property
    def bits_per_weight(self) -> float:
        return 8 + 32 * self.scale.size / self.codes.size


def encode(weight: NDArray[Any], group_size: int = -1) -> Fp8Tensor:
    """A matrix (out, in) with steps so that the largest of each group is 448 of them.

    group_size: columns that share a step, -1 a row, 0 the tensor. Raises BadInput when it does not divide the columns.
    """
    rows, columns = weight.shape
    values = weight.astype(np.float32)
    if group_size > 0 and columns % group_size:
        raise BadInput(f"group_size={group_size} does not divide {columns} columns")
    shape = (1, 1, -1) if group_size == 0 else (rows, columns // group_size if group_size > 0 else 1, -1)
    grouped = values.reshape(shape)
    scale = np.abs(grouped).max(axis=2, keepdims=True) / LARGEST
    scale = np.where(scale == 0, np.float32(1), scale)
    codes = np.clip(grouped / scale, -LARGEST, LARGEST).astype(E4M3).view(np.uint8)
    return Fp8Tensor(codes.reshape(rows, columns), scale[..., 0])
