"""Columns of a weight onto the steps of an affine grid: what methods that decide column by column share.

Here a weight lies as (in, out), a column of the layer one run of memory. A code is held *centred*, q = code − zero
point, so that a weight is q · s and what is pruned is q = 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadRecipe, nearest
from ..formats import affine
from ..formats.affine import PER_TENSOR, AffineTensor, Grid
from ..kernels import Steps
from . import steps
from .observers import OBSERVERS, observer

Floats = NDArray[np.float32]
IMPORTANCE = "importance"  # steps searched with the weight of each column's input, beside the observers


def check_observer(name: str) -> None:
    known = (*OBSERVERS, IMPORTANCE)
    if name not in known:
        raise BadRecipe(f"observer={name!r} is unknown: {nearest(str(name), known)}")


def fit(values: Floats, importance: NDArray[Any] | None, grid: Grid, name: str) -> tuple[Floats, Any]:
    """Step and zero point of each row of values (rows, n) by that observer: (rows, 1) each; the latter may be None."""
    if name == IMPORTANCE:
        return steps.search(values, importance, grid)
    return affine.fit(*observer(name)(np.ascontiguousarray(values), grid), grid)


class Rounder:
    """Steps of all groups.

    scale: float32 (groups, out).  low, high: the centred codes there are, float32 (groups, out).
    """

    def __init__(self, grid: Grid, out: int, columns: int) -> None:
        self.grid, self.groups = grid, grid.groups(columns)
        self.width = columns // self.groups
        self.scale = np.ones((self.groups, out), np.float32)
        self._zero = np.zeros_like(self.scale)
        self.low, self.high = (np.full_like(self.scale, end) for end in (grid.qmin, grid.qmax))

    def fit(self, group: int, values: Floats, importance: NDArray[Any] | None, name: str) -> None:
        """The steps of a group from its values (columns, out); importance (columns,) or (columns, out)."""
        rows = values.reshape(1, -1) if self.grid.group_size == PER_TENSOR else values.T
        if importance is not None:
            if self.grid.group_size == PER_TENSOR:
                importance = np.broadcast_to(importance.reshape(len(values), -1), values.shape).reshape(1, -1)
            elif importance.ndim == 2:
                importance = importance.T
        scale, zero = fit(rows, importance, self.grid, name)
        self.scale[group] = scale[:, 0]
        if zero is not None:
            self._zero[group] = zero[:, 0]
            self.low[group], self.high[group] = self.grid.qmin - self._zero[group], self.grid.qmax - self._zero[group]

    def steps(self, group: int, columns: int) -> Steps:
        """What `kernels.settle` rounds that many columns of one group to."""
        at = slice(group, group + 1)
        return Steps(self.scale[at], self.low[at], self.high[at], np.zeros(columns, np.int32))

    def all_steps(self, group: NDArray[np.int64]) -> Steps:
        """The same for columns of any groups: ``group`` of each."""
        return Steps(self.scale, self.low, self.high, group.astype(np.int32))

    @staticmethod
    def nearest(steps: Steps, values: Floats) -> Floats:
        """What columns (n, out) round to, each by itself."""
        scale = steps.scale[steps.group]
        rounded: Floats = np.clip(np.rint(values / scale), steps.low[steps.group], steps.high[steps.group]) * scale
        return rounded

    def tensor(self, centred: NDArray[np.int16]) -> AffineTensor:
        """Centred codes int16 (in, out), columns in their places → the weight on the grid."""
        zero = self._zero.astype(np.int8)
        codes = centred if self.grid.symmetric else centred + np.repeat(zero, self.width, axis=0)
        scale, zero = np.ascontiguousarray(self.scale.T), np.ascontiguousarray(zero.T)
        if self.grid.group_size == PER_TENSOR:
            scale, zero = scale[:1], zero[:1]
        return AffineTensor(
            np.ascontiguousarray(codes.T.astype(np.int8)), scale, None if self.grid.symmetric else zero, self.grid
        )
