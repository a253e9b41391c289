"""HQQ: half-quadratic quantization, without data (Badri and Shaji, 2023, "Half-Quadratic Quantization").

Least Σ |w − ŵ|^p with p < 1, which forgives the few large errors that outliers make. A split of the error into a sparse
part e and the rest makes it solvable in turns: e is the shrunk error, sign(r) · max(0, |r| − |r|^(p−1) / β), and the
grid is then fitted to w − e by least squares. The paper moves a zero point that is a float; zero points of our formats
are integers, so here it is the step that moves, and on an asymmetric grid the zero point with it, to the nearest
integer. β grows by 1 % a turn. Errors are counted in steps, so that p and β mean the same for weights of any size. A
group keeps the best of all turns, and ends after a few that are no better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats import affine
from ..formats.affine import PER_TENSOR, AffineTensor, Grid
from . import options
from .statistics import Statistics
from .steps import stored

NEEDS: tuple[str, ...] = ()
MEMORY = (24, 0)
Floats = NDArray[np.float32]
GROWTH = np.float32(1.01)
PATIENCE = 3  # turns that are no better before a group ends
_CHUNK = 1 << 18  # weights at a time


@dataclass(frozen=True)
class Config:
    """grid: the integers.  power: p, in (0, 1].  beta: β at first.  turns: at most."""

    grid: Grid
    power: float = 0.7
    beta: float = 10.0
    turns: int = 20

    def __post_init__(self) -> None:
        options.number("power", self.power, 0.01, 1)
        options.number("beta", self.beta, 1e-3, 1e6)
        options.whole("turns", self.turns, 1, 1000)


def by_rows(config: Config) -> bool:
    return config.grid.group_size != PER_TENSOR


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> AffineTensor:
    """A weight (out, in) on the grid; BadInput when the group size does not divide its columns."""
    grid, (out, columns) = config.grid, weight.shape
    shape = (1, 1) if grid.group_size == PER_TENSOR else (out, grid.groups(columns))
    values = weight.astype(np.float32)
    rows = values.reshape(shape[0] * shape[1], -1)
    height = max(1, _CHUNK // rows.shape[1])
    parts = [fit(rows[low : low + height], config) for low in range(0, len(rows), height)]
    scale = np.concatenate([part[0] for part in parts]).reshape(shape)
    zero = None if grid.symmetric else np.concatenate([part[1] for part in parts]).reshape(shape).astype(np.int8)
    return AffineTensor(affine.encode(values, scale, zero, grid), scale, zero, grid)


def fit(values: Floats, config: Config) -> tuple[Floats, Floats]:
    """Rows of values (rows, n) → steps and zero points (rows, 1), both float32."""
    grid = config.grid
    scale, fitted = affine.fit(values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True), grid)
    zero = np.zeros_like(scale) if fitted is None else fitted.astype(np.float32)
    first, beta, waited = scale, np.float32(config.beta), np.zeros(scale.shape, np.int64)
    best_scale, best_zero, least = scale, zero, np.full(scale.shape, np.inf, np.float32)
    for _ in range(config.turns):
        q = np.clip(np.rint(values / scale + zero), grid.qmin, grid.qmax)
        left = values - (q - zero) * scale
        size = np.abs(left) / first
        norm = np.power(size, np.float32(config.power)).sum(axis=1, keepdims=True)
        better = (norm < least * np.float32(1 - 1e-6)) & (waited < PATIENCE)
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
        least = np.where(better, norm, least)
        waited = np.where(better, 0, waited + 1)
        if (waited >= PATIENCE).all():
            break
        sparse = np.sign(left) * shrink(size, float(beta), config.power) * first
        scale, zero = _refit(values - sparse, q, scale, zero, grid)
        beta *= GROWTH
    return best_scale, best_zero


def shrink(size: Floats, beta: float, power: float) -> Floats:
    """max(0, r − r^(p−1) / β) for r ≥ 0: the sparse part of errors."""
    with np.errstate(divide="ignore", over="ignore"):
        shrunk: Floats = np.maximum(0, size - np.power(size, np.float32(power - 1)) / np.float32(beta))
    return shrunk


def _refit(target: Floats, q: Floats, scale: Floats, zero: Floats, grid: Grid) -> tuple[Floats, Floats]:
    """Step and zero point with the least squared error to the target for these codes; what cannot be fitted stays."""
    if grid.symmetric:
        along, power = (target * q).sum(axis=1, keepdims=True), (q * q).sum(axis=1, keepdims=True)
        moved = along / np.maximum(power, 1)
        return np.where(moved > 0, stored(moved, grid), scale), zero
    q_mean, t_mean = q.mean(axis=1, keepdims=True), target.mean(axis=1, keepdims=True)
    spread = ((q - q_mean) ** 2).sum(axis=1, keepdims=True)
    slope = ((q - q_mean) * (target - t_mean)).sum(axis=1, keepdims=True) / np.maximum(spread, np.float32(1e-12))
    fits = slope > 0
    step = np.where(fits, slope, scale)
    moved_zero = np.clip(np.rint(q_mean - t_mean / step), grid.qmin, grid.qmax)
    centred = q - moved_zero  # the zero point was rounded: the step once more, for it
    along, power = (target * centred).sum(axis=1, keepdims=True), (centred * centred).sum(axis=1, keepdims=True)
    again = along / np.maximum(power, np.float32(1e-12))
    fits &= again > 0
    return np.where(fits, stored(again, grid), scale), np.where(fits, moved_zero, zero)
