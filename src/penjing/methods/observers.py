"""Which range a grid should cover, from values seen: pure functions of arrays.

minmax      all of them: no value is clipped, one outlier widens every step.
percentile  from the 0.01th to the 99.99th percentile: the few beyond are clipped.
mse         the range, shrunk in `STEPS` equal parts of min-max, whose rounding and clipping error is least in the
            mean square (grid search as in Banner et al., 2019, "ACIQ", and in torch.ao's and llm-compressor's MSE
            observers).
histogram   mse on a histogram of the values, for many of them; see `histogram`, which also takes them batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, nearest
from ..formats import affine
from ..formats.affine import Grid
from .histogram import BINS, Histogram

Floats = NDArray[np.float32]
Range = tuple[Floats, Floats]
PERCENTILE = 99.99
STEPS = 100


def minmax(values: Floats, grid: Grid) -> Range:
    """Lowest and highest of each row: values (rows, n) → two arrays (rows, 1)."""
    return values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)


def percentile(values: Floats, grid: Grid) -> Range:
    """The same without the outermost 0.01 % at each end (interpolated between neighbours)."""
    low, high = np.percentile(values, [100 - PERCENTILE, PERCENTILE], axis=1, keepdims=True)
    return low.astype(np.float32), high.astype(np.float32)


def mse(values: Floats, grid: Grid) -> Range:
    """The shrunk min-max range with the least squared error on ``grid``; of equal ones the widest."""
    low, high = minmax(values, grid)
    least = np.full(low.shape, np.inf, np.float32)
    best_low, best_high = low, high
    for step in range(STEPS, 0, -1):
        share = np.float32(step / STEPS)
        scale, zero_point = affine.fit(low * share, high * share, grid)
        codes = affine.encode(values, scale, zero_point, grid)
        error = np.mean((affine.decode(codes, scale, zero_point) - values) ** 2, axis=1, keepdims=True)
        better = error < least
        least = np.where(better, error, least)
        best_low, best_high = np.where(better, low * share, best_low), np.where(better, high * share, best_high)
    return best_low, best_high


def histogram(values: Floats, grid: Grid) -> Range:
    """As `mse`, of each row's histogram; where there are no more values than bins, of the values."""
    if values.shape[1] <= BINS:
        return mse(values, grid)
    found = np.empty((len(values), 2), np.float32)
    for row, seen in zip(found, values, strict=True):
        counted = Histogram()
        counted.add(seen)
        row[:] = counted.range(grid)
    return found[:, :1], found[:, 1:]


OBSERVERS: dict[str, Callable[[Floats, Grid], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "histogram": histogram,
}


def observer(name: str) -> Callable[[Floats, Grid], Range]:
    """The observer of that name; BadInput names the nearest known one."""
    if name not in OBSERVERS:
        raise BadInput(f"observer={name!r} is unknown: {nearest(name, OBSERVERS)}")
    return OBSERVERS[name]
