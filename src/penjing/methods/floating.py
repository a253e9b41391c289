"""Columns and groups of a weight onto floats of 8 or 4 bits times steps: what `rtn` and `gptq` do on a `FloatGrid`.

Steps put the largest number of what shares them on the largest code ("minmax"), or the share of it with the least
squared error ("mse"), each square weighted by what an error in its column costs ("importance"). GPTQ and its sweeps go
column by column as on integers (see `feedback`), with steps that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadRecipe, nearest
from ..formats import floats
from ..formats.affine import spread
from ..formats.floats import FloatGrid, FloatTensor
from . import linalg
from .feedback import Descent, Forward, blocks, by_columns

Floats = NDArray[np.float32]
OBSERVERS = ("minmax", "mse")
IMPORTANCE = "importance"
# Tried shares of min-max, as many as can differ: of a power of two, half and twice it; of E4M3, some of its neighbours.
SHARES = {"mxfp4": (0.5, 1.0, 2.0), "nvfp4": (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3)}


def check_observer(name: str, known: tuple[str, ...] = (*OBSERVERS, IMPORTANCE)) -> None:
    if name not in known:
        raise BadRecipe(f"observer={name!r} is not one that floats have: {nearest(str(name), known)}")


def quantize(weight: NDArray[Any], grid: FloatGrid, observer: str) -> FloatTensor:
    """A weight (out, in), each number rounded to nearest. BadInput where blocks do not divide its columns."""
    divisor = floats.divisor_of(weight, grid)
    return floats.encode(weight, fit(weight, grid, divisor, observer, None), divisor, grid)


def fit(weight: NDArray[Any], grid: FloatGrid, divisor: np.float32, observer: str, importance: Floats | None) -> Floats:
    """The steps of a weight (out, in), as stored: (out, groups) or (1, 1). importance: ≥ 0, (in,); None: all alike.

    Only formats with small groups are searched: where a row shares a step, the mantissa of E4M3 makes the shares alike.
    """
    reach = floats.ranges(weight, grid)
    found = grid.steps(reach, divisor)
    if observer != "minmax" and grid.kind in SHARES:
        for rows in floats.slabs(found.shape[0], weight.shape[1]):
            found[rows] = _search(weight[rows], reach[rows], grid, divisor, importance)
    return found


def _search(
    weight: NDArray[Any], reach: Floats, grid: FloatGrid, divisor: np.float32, importance: Floats | None
) -> Floats:
    values = weight.astype(np.float32).reshape(*reach.shape, -1)
    cost = np.float32(1) if importance is None else importance.reshape(1, reach.shape[1], -1)
    least, best = np.full(reach.shape, np.inf, np.float32), np.ones_like(reach)
    for share in SHARES[grid.kind]:
        steps = grid.steps(reach * np.float32(share), divisor)
        at = (steps / divisor)[..., None]
        error = (np.square(grid.nearest(values / at) * at - values) * cost).sum(axis=2)
        best, least = np.where(error < least, steps, best), np.minimum(error, least)
    return best


@dataclass(frozen=True)
class Steps:
    """What columns are rounded to. scale: (n, out), the step of each number."""

    grid: FloatGrid
    scale: Floats


def settle(
    base: Floats, coupling: Floats, reference: Floats, kept: NDArray[np.bool_] | None, steps: Steps
) -> tuple[Floats, Floats]:
    """As `kernels.settle`, on floats → what columns became, in place of codes, and error; both (n, out)."""
    rounded, error = np.empty_like(base), np.zeros_like(base)
    for i, scale in enumerate(steps.scale):
        best = base[i] + coupling[:i, i] @ error[:i]
        rounded[i] = steps.grid.nearest(best / scale) * scale
        if kept is not None:
            rounded[i] *= kept[i]
        error[i] = reference[i] - rounded[i]
    return rounded, error


def gptq(
    weight: NDArray[Any], hessian: Floats, factored: linalg.Factor, grid: FloatGrid, observer: str, sweeps: int
) -> FloatTensor:
    """A weight (out, in) by GPTQ, then by sweeps of coordinate descent over its codes."""
    divisor, turned = floats.divisor_of(weight, grid), by_columns(weight)
    cost = np.empty_like(factored.diagonal)  # of an error in a column, once the columns to come make up for it
    cost[factored.order] = factored.diagonal
    scale = fit(weight, grid, divisor, observer, cost)
    steps = np.ascontiguousarray(spread(scale / divisor, (weight.shape[0], weight.shape[1])).T)
    kept = None if turned.all() else turned != 0
    rounded, order = np.empty_like(turned), factored.order
    forward = Forward(turned[order], factored, settle)
    for start, stop in blocks(len(turned), len(turned)):
        at = order[start:stop]
        mask = None if kept is None else kept[at]
        rounded[at] = forward.settle(start, forward.base(start, stop), mask, Steps(grid, steps[at]))
    descent = Descent(turned, turned - rounded, hessian, linalg.ridge(hessian, factored.damping), settle)
    for _ in range(sweeps):
        for start, stop in blocks(len(turned), len(turned)):
            columns = slice(start, stop)
            mask = None if kept is None else kept[columns]
            slope = descent.slope(start, stop)
            rounded[columns] = descent.settle(start, slope, mask, Steps(grid, steps[columns]))
    return floats.encode(np.ascontiguousarray(rounded.T), scale, divisor, grid)
