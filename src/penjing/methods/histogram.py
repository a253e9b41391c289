"""A histogram of values that come batch by batch, and the range with the least rounding error that it shows.

Bins lie evenly on [−reach, reach], reach a power of two: when a larger value comes, neighbours become one bin and the
reach doubles, so that any order of batches, and any merging of histograms, ends with the same counts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from ..formats import affine
from ..formats.affine import Grid

BINS = 2048
TRIES = 100  # shares of min-max that are tried
Floats = NDArray[np.float32]


class Histogram:
    """counts: int64 (BINS,).  low, high: the smallest and largest value seen."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.low, self.high, self._exponent = math.inf, -math.inf, -126

    @property
    def reach(self) -> float:
        return float(2.0**self._exponent)

    def add(self, values: NDArray[Any]) -> None:
        """Values of any shape; BadInput for a NaN or an infinity."""
        flat = np.asarray(values, np.float32).ravel()
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise BadInput("the values have a NaN or an infinity: the model overflows on this data")
        self._widen(math.frexp(max(-low, high))[1])
        self.low, self.high = min(self.low, low), max(self.high, high)
        place = ((flat.astype(np.float64) / self.reach + 1) * (BINS // 2)).astype(np.int64)
        self.counts += np.bincount(np.minimum(place, BINS - 1), minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Take over what another histogram saw."""
        self._widen(other._exponent)
        counts = _halved(other.counts, self._exponent - other._exponent)
        self.counts += counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def range(self, grid: Grid) -> tuple[float, float]:
        """Of min-max and its shares, the range on which the bins' middles round with the least squared error."""
        if not self.counts.any():
            raise BadInput("no values were seen: the calibration data never reached this place")
        seen = np.flatnonzero(self.counts)
        middles = (((seen + 0.5) / (BINS // 2) - 1) * self.reach).astype(np.float32)[None]
        share = np.arange(1, TRIES + 1, dtype=np.float32)[::-1, None] / TRIES  # of equal errors the widest range
        low, high = ((np.float32(end) * share).astype(np.float32) for end in (self.low, self.high))
        scale, zero = affine.fit(low, high, grid)
        off = np.float32(0) if zero is None else zero.astype(np.float32)
        codes = np.clip(np.rint(middles / scale + off), grid.qmin, grid.qmax)
        errors = np.square((codes - off) * scale - middles, dtype=np.float64) @ self.counts[seen]
        best = int(np.argmin(errors))
        return float(low[best, 0]), float(high[best, 0])

    def _widen(self, exponent: int) -> None:
        if exponent > self._exponent:
            self.counts = _halved(self.counts, exponent - self._exponent)
            self._exponent = exponent


def _halved(counts: NDArray[np.int64], times: int) -> NDArray[np.int64]:
    """The counts when the reach has doubled so many times."""
    for _ in range(times if counts.any() else 0):
        inner = counts.reshape(-1, 2).sum(axis=1)
        counts = np.zeros(BINS, np.int64)
        counts[BINS // 4 : BINS // 4 + BINS // 2] = inner
    return counts
