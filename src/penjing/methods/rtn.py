"""Round to nearest: each group's range is put on the grid, each weight goes to the nearest code. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..formats import affine
from ..formats.affine import PER_TENSOR, AffineTensor, Grid
from .observers import observer
from .statistics import Statistics

NEEDS: tuple[str, ...] = ()
MEMORY = (6, 0)


@dataclass(frozen=True)
class Config:
    """grid: the integers.  observer: what the range of a group is: "minmax", "percentile" or "mse"."""

    grid: Grid
    observer: str = "minmax"

    def __post_init__(self) -> None:
        observer(self.observer)


def by_rows(config: Config) -> bool:
    return config.grid.group_size != PER_TENSOR


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> AffineTensor:
    """A weight (out, in) on the grid. Raises BadInput when the group size does not divide its columns."""
    grid, observe = config.grid, observer(config.observer)
    if config.observer == "minmax":
        return kernels.quantize(weight, grid)
    values = weight.astype(np.float32)
    steps = (1, 1) if grid.group_size == PER_TENSOR else (len(values), grid.groups(values.shape[1]))
    low, high = observe(values.reshape(steps[0] * steps[1], -1), grid)
    scale, zero_point = affine.fit(low.reshape(steps), high.reshape(steps), grid)
    return AffineTensor(affine.encode(values, scale, zero_point, grid), scale, zero_point, grid)
