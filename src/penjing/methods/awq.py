"""AWQ: columns that meet large inputs are scaled up before rounding, so that less of them is lost (Lin et al.,
2306.00978).

The scale is s = (mean |x|)^α; α is searched for the least error of the layer's output with s-scaled weights rounded to
nearest. The paper measures that on a sample of inputs; here it is tr(E H Eᵀ) over all of them, on evenly chosen rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.affine import Grid
from ..formats.floats import FloatGrid
from . import linalg, options, rtn
from .scaling import Floats, check_readers, level
from .statistics import Statistics, evenly

NEEDS: tuple[str, ...] = ("absmean", "hessian")
FLOATS = 0


@dataclass(frozen=True)
class Config:
    """grid: what the weights will be rounded to.  tries: values of α in [0, 1).  rows: tried of each weight."""

    grid: Grid | FloatGrid
    tries: int = 20
    rows: int = 512

    def __post_init__(self) -> None:
        options.whole("tries", self.tries, 1, 1000)
        options.whole("rows", self.rows, 1, 1 << 30)


def solve(weights: Sequence[NDArray[Any]], statistics: Statistics, config: Config) -> Floats:
    """Weights (out_i, in) that read one input → the scale (in,) with the least `error`, all ones among those tried."""
    columns = check_readers(weights)
    strength = statistics.need("absmean", columns).astype(np.float64)
    hessian = statistics.need("hessian", columns)
    samples = [weight[evenly(len(weight), config.rows)] for weight in weights]
    best, least = np.ones(columns, np.float32), np.inf
    for power in np.arange(config.tries) / config.tries:
        scale = level(strength**power)
        found = error(samples, scale, hessian, config.grid)
        if found < least:
            best, least = scale, found
    return best


def error(weights: Sequence[NDArray[Any]], scale: Floats, hessian: NDArray[Any], grid: Grid | FloatGrid) -> float:
    """tr(E H Eᵀ) of all weights, when W · s is rounded to nearest and read with x / s."""
    total = 0.0
    for weight in weights:
        values = weight.astype(np.float32)
        nearest = rtn.solve(np.ascontiguousarray(values * scale), Statistics(), rtn.Config(grid))
        rounded = nearest.decode().astype(np.float32, copy=False) / scale
        total += float(linalg.losses(values - rounded, hessian).sum())
    return total
