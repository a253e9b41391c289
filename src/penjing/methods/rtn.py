"""Round to nearest: each group's range is put on the grid, each weight goes to the nearest code. Needs no data.

Of integers and of floats; floats keep to the range or, by "mse", to the share of it with the least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..formats import affine
from ..formats.affine import PER_TENSOR, AffineTensor, Grid
from ..formats.floats import FloatGrid, FloatTensor
from . import floating
from .observers import observer
from .statistics import Statistics

NEEDS: tuple[str, ...] = ()
MEMORY = (6, 0)
FLOATS = 0


@dataclass(frozen=True)
class Config:
    """grid: the integers, or the floats.  observer: what the range of a group is: "minmax", "percentile" or "mse"."""

    grid: Grid | FloatGrid
    observer: str = "minmax"

    def __post_init__(self) -> None:
        if isinstance(self.grid, FloatGrid):
            floating.check_observer(self.observer, floating.OBSERVERS)
        else:
            observer(self.observer)


def by_rows(config: Config) -> bool:
    if isinstance(config.grid, FloatGrid):
        return config.grid.height == 1 and (not config.grid.by_tensor or config.grid.reach is not None)
    return config.grid.group_size != PER_TENSOR


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> AffineTensor | FloatTensor:
    """A weight (out, in) on the grid. Raises BadInput when the group size does not divide its columns."""
    if isinstance(config.grid, FloatGrid):
        return floating.quantize(weight, config.grid, config.observer)
    grid, observe = config.grid, observer(config.observer)
    if config.observer == "minmax":
        return kernels.quantize(weight, grid)
    values = weight.astype(np.float32)
    steps = (1, 1) if grid.group_size == PER_TENSOR else (len(values), grid.groups(values.shape[1]))
    low, high = observe(values.reshape(steps[0] * steps[1], -1), grid)
    scale, zero_point = affine.fit(low.reshape(steps), high.reshape(steps), grid)
    return AffineTensor(affine.encode(values, scale, zero_point, grid), scale, zero_point, grid)
