"""Rounding to nearest on steps searched with an importance matrix: Σ_j h_j (w_j − ŵ_j)² is least, h_j the mean square
of x_j.

The idea of llama.cpp's importance matrix: the error of a layer's output, with the correlations between inputs left out.
Costs little more than rounding, and needs only the norms of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats import affine
from ..formats.affine import PER_TENSOR, AffineTensor, Grid
from . import steps
from .statistics import Statistics

NEEDS: tuple[str, ...] = ("input_norm",)
MEMORY = (22, 0)


@dataclass(frozen=True)
class Config:
    """grid: the integers."""

    grid: Grid


def by_rows(config: Config) -> bool:
    return config.grid.group_size != PER_TENSOR


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> AffineTensor:
    """A weight (out, in) on the grid; BadInput when the group size does not divide its columns."""
    out, columns = weight.shape
    groups = config.grid.groups(columns)
    values = weight.astype(np.float32)
    h = np.square(statistics.need("input_norm", columns))
    if not h.any():  # nothing was seen: all columns alike
        h = np.ones_like(h)
    if config.grid.group_size == PER_TENSOR:
        scale, zero = steps.search(values.reshape(1, -1), np.tile(h, out)[None], config.grid)
    else:
        importance = np.tile(h.reshape(groups, -1), (out, 1))
        scale, zero = steps.search(values.reshape(out * groups, -1), importance, config.grid)
        scale, zero = scale.reshape(out, groups), None if zero is None else zero.reshape(out, groups)
    return AffineTensor(affine.encode(values, scale, zero, config.grid), scale, zero, config.grid)
