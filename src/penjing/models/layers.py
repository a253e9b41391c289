"""What a decoder is built of in memory: arrays of float32, and linear layers on weights however stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..kernels import Matrix

Array: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class LinearLayer:
    """matrix: (out, in).  bias: (out,) or None."""

    matrix: Matrix
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        return self.matrix(x, self.bias)
