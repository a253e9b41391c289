"""Products of values in bfloat16, in pairs: what calibration and the solvers multiply most."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _native
from ._bits import float_bits


def has_pairs() -> bool:
    """Does this processor multiply pairs of bfloat16 (AVX512_BF16), which `add_gram` and `PairMatrix` are made of?

    Their products are exact and their sums float32, in one order whatever the number of threads.
    """
    return _native.has_pairs()


def add_gram(x: NDArray[Any], total: NDArray[np.float32]) -> None:
    """total (n, n) += xᵀx of bfloat16 rows (m, n), in its upper triangle; what is below may be anything afterwards."""
    _native.add_gram(float_bits(x), total)


class PairMatrix:
    """Values (rows, columns) float32 as bfloat16, for many products while blocks of rows change; see `has_pairs`."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self._native = _native.PairMatrix(np.ascontiguousarray(values))

    def put(self, values: NDArray[np.float32], low: int, high: int) -> None:
        """Rows [low, high) become those of values, which has all rows; of a pair of rows, both."""
        self._native.put(np.ascontiguousarray(values), low, high)

    def product(self, a: NDArray[np.float32], low: int, high: int) -> NDArray[np.float32]:
        """aᵀ, of columns [low, high) of a (n, any), rounded to bfloat16, times the first n rows: (high − low, columns).

        Where n is odd, what comes after it counts as zeros.
        """
        return self._native.product(np.ascontiguousarray(a), low, high)
