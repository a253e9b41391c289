"""AutoRound's sign-gradient rounding, on one layer's own loss (Cheng et al., 2023, arXiv 2309.05516).

A weight is rounded as round(w / s + v), |v| ≤ 1/2, and the steps s are shrunk by a factor a; v and a go down the sign
of the gradient with straight-through rounding, in strides that shrink linearly to none. The paper takes the gradient
from a block's outputs on batches of text; here the loss of the layer alone is tr(E H Eᵀ) with H over all the text, and
its gradient is closed: −2 E H by the rounded weight. On an asymmetric grid both ends of the range shrink by one factor.
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

NEEDS: tuple[str, ...] = ("hessian",)
MEMORY = (40, 6)
Floats = NDArray[np.float32]
ROWS = 1024  # at a time: rows do not depend on one another
LEAST_SHARE = np.float32(0.5)


@dataclass(frozen=True)
class Config:
    """grid: the integers.  iterations: of the descent, whose first stride is 1 / iterations."""

    grid: Grid
    iterations: int = 200

    def __post_init__(self) -> None:
        options.whole("iterations", self.iterations, 1, 10000)


def by_rows(config: Config) -> bool:
    return False  # as gptq


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> AffineTensor:
    """A weight (out, in) on the grid; of all iterations each row keeps its best, the first of which is rtn's."""
    hessian = statistics.need("hessian", weight.shape[1]).astype(np.float32, copy=False)
    values = weight.astype(np.float32)
    scale, zero = affine.fit(*affine.ranges(values, config.grid), config.grid)
    if config.grid.group_size == PER_TENSOR:
        return _descend(values, scale, zero, hessian, config)
    parts = []
    for low in range(0, len(values), ROWS):
        at = slice(low, low + ROWS)
        parts.append(_descend(values[at], scale[at], None if zero is None else zero[at], hessian, config))
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return AffineTensor(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate(zeros) if zeros else None,
        config.grid,
    )


def _descend(
    values: Floats, widest: Floats, zero: NDArray[np.int8] | None, hessian: Floats, config: Config
) -> AffineTensor:
    grid, (out, columns) = config.grid, values.shape
    whole = grid.group_size == PER_TENSOR
    grouped = values.reshape(1, 1, -1) if whole else values.reshape(out, grid.groups(columns), -1)
    z = np.float32(0) if zero is None else zero.astype(np.float32)[..., None]
    nudge, share = np.zeros_like(grouped), np.ones((*grouped.shape[:2], 1), np.float32)
    least = np.full(1 if whole else out, np.inf)
    best_codes, best_scale = np.zeros(values.shape, np.int8), widest.copy()
    for iteration in range(config.iterations + 1):
        scale = stored(widest[..., None] * share, grid)
        exact = grouped * (1 / scale)  # as encoding does it, so that ties fall to the same side
        free = np.rint(exact + nudge + z)
        q = np.clip(free, grid.qmin, grid.qmax)
        error = (grouped - (q - z) * scale).reshape(values.shape)
        turned = error @ hessian
        losses = np.einsum("oi,oi->o", turned, error, dtype=np.float64)
        better = losses.sum(keepdims=True) < least if whole else losses < least
        least = np.where(better, losses.sum(keepdims=True) if whole else losses, least)
        best_codes = np.where(better[:, None], q.reshape(values.shape).astype(np.int8), best_codes)
        best_scale = np.where(better[:, None], scale[..., 0], best_scale)
        if iteration == config.iterations:
            break
        stride = np.float32((1 - iteration / config.iterations) / config.iterations)
        slope = turned.reshape(grouped.shape)  # of −loss / 2 by the rounded weight
        inside = free == q
        # by v: s where nothing is clipped; by s: (q − z) less what the code moves back, w / s
        by_scale = (slope * (q - z - np.where(inside, exact, 0))).sum(axis=2, keepdims=True)
        nudge = np.clip(nudge + stride * np.sign(slope) * inside, np.float32(-0.5), np.float32(0.5))
        share = np.clip(share + stride * np.sign(by_scale), LEAST_SHARE, 1)
    return AffineTensor(best_codes, best_scale, zero, grid)
