"""GPTQ: columns are rounded one after the other, and the columns to come make up for each error.

Frantar et al., 2022, "GPTQ" (arXiv 2210.17323), on the factor H = M D Mᵀ (see `linalg`), which gives the same codes as
the paper's inverse of the hessian. Groups are static where the order of columns is not that of memory, so that columns
stay in their places and any reader of the format can decode them. ``sweeps`` of coordinate descent follow (see
`refine`). Floats have static steps, and their codes alone move in the sweeps (see `floating`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.affine import AffineTensor, Grid
from ..formats.floats import FloatGrid, FloatTensor
from . import floating, linalg, options
from .feedback import Forward, blocks, by_columns
from .refine import refine
from .rounding import Rounder, check_observer
from .statistics import Statistics

NEEDS: tuple[str, ...] = ("hessian",)
MEMORY = (26, 4, 12)
FLOATS = 10
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Config:
    """grid: the integers, or the floats.  observer: the range of a group: "importance", or one of the observers.

    damping: share of the mean diagonal added to the hessian's; ten, a hundred, a thousand times that where it must.
    act_order: columns with large inputs first.  sweeps: of coordinate descent afterwards; 0 is the paper's GPTQ.
    """

    grid: Grid | FloatGrid
    observer: str = "importance"
    damping: float = 0.01
    act_order: bool = True
    sweeps: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.grid, FloatGrid):
            floating.check_observer(self.observer)
        else:
            check_observer(self.observer)
        options.number("damping", self.damping, 0, 1)
        options.flag("act_order", self.act_order)
        options.whole("sweeps", self.sweeps, 0, 100)


def by_rows(config: Config) -> bool:
    return False  # rows do not depend on one another, but products of other shapes are summed in another order


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> AffineTensor | FloatTensor:
    """A weight (out, in) on the grid. BadInput for a group size that does not divide its columns, or a bad hessian."""
    out, columns = weight.shape
    if isinstance(config.grid, FloatGrid):
        factored = linalg.factor(statistics, columns, config.damping, config.act_order)
        return floating.gptq(weight, statistics["hessian"], factored, config.grid, config.observer, config.sweeps)
    rounder = Rounder(config.grid, out, columns)
    factored = linalg.factor(statistics, columns, config.damping, config.act_order)
    hessian = statistics["hessian"]
    turned = by_columns(weight)
    kept = None if turned.all() else turned != 0
    centred = round_in_order(rounder, turned, kept, factored, config)
    refine(rounder, centred, turned, hessian, linalg.ridge(hessian, factored.damping), config.sweeps, kept)
    return rounder.tensor(centred)


def round_in_order(
    rounder: Rounder, weight: Floats, kept: NDArray[np.bool_] | None, factored: linalg.Factor, config: Config
) -> NDArray[np.int16]:
    """Centred codes of a weight, and the rounder's steps; weight, kept and codes (in, out), columns in their places."""
    centred = np.empty(weight.shape, np.int16)
    order = factored.order
    cost = np.empty_like(factored.diagonal)  # of an error in a column, once the columns to come make up for it
    cost[order] = factored.diagonal
    importance = cost if kept is None else cost[:, None] * kept
    moving = not config.act_order and rounder.groups > 1  # steps of a group wait for the errors before it
    if not moving:
        fit_all(rounder, weight, importance, config.observer)
    forward = Forward(weight[order], factored)
    for start, stop in blocks(len(weight), rounder.width if moving else len(weight)):
        if moving and start % rounder.width == 0:
            group = slice(start, start + rounder.width)
            values = forward.best(start, forward.base(group.start, group.stop))
            rounder.fit(start // rounder.width, values, importance[group], config.observer)
        at = order[start:stop]
        steps = rounder.all_steps(at // rounder.width)
        mask = None if kept is None else kept[at]
        centred[at] = forward.settle(start, forward.base(start, stop), mask, steps)
    return centred


def fit_all(rounder: Rounder, weight: Floats, importance: NDArray[Any], name: str) -> None:
    """The steps of all groups from the weight as it is: (in, out), columns in their places."""
    for group in range(rounder.groups):
        columns = slice(group * rounder.width, (group + 1) * rounder.width)
        rounder.fit(group, weight[columns], importance[columns], name)
