"""SparseGPT: weights go block by block of columns, and the columns to come make up for them (arXiv 2301.00774).

Frantar and Alistarh, 2023. A weight counts by w² / [H⁻¹]_kk over the columns not yet decided, which in the factor H = M
D Mᵀ (see `linalg`) is w² · D_k. ``sweeps`` of coordinate descent then bring the survivors to where they are best for
this mask (the paper's update lets an error be made up for by later columns only); 0 is the paper's method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import linalg, magnitude, masks, options
from .feedback import BLOCK, Descent, Forward, blocks, by_columns
from .statistics import Statistics

NEEDS: tuple[str, ...] = ("hessian",)
MEMORY = (26, 10)
Floats = NDArray[np.float32]
Spared = Callable[[slice, Floats], Floats]


@dataclass(frozen=True)
class Config(magnitude.Config):
    """As magnitude's; scope "tensor" ranks the weights of a block of 128 columns together.

    damping: share of the mean diagonal added to the hessian's; ten, a hundred, a thousand times that where it must.
    """

    damping: float = 0.01
    sweeps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        options.number("damping", self.damping, 0, 1)
        options.whole("sweeps", self.sweeps, 0, 100)


def by_rows(config: Config) -> bool:
    return False  # as gptq


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> NDArray[Any]:
    """A weight (out, in) with zeros, its other values moved to make up for them; the dtype stays."""
    values, _ = in_order(by_columns(weight), statistics, config, None)
    return np.ascontiguousarray(values.T).astype(weight.dtype)


def in_order(
    weight: Floats, statistics: Statistics, config: Config, spared: Spared | None
) -> tuple[Floats, NDArray[np.bool_]]:
    """A weight (in, out) → its survivors where they are best, 0 elsewhere, and what was kept: (in, out) each.

    spared: of columns and their values, the squared error that each would cost if it stayed; None: none.
    """
    columns = len(weight)
    masks.check_pattern(config.pattern, columns)
    factored = linalg.factor(statistics, columns, config.damping, act_order=False)
    forward, kept = Forward(weight, factored), np.empty(weight.shape, np.bool_)
    for start, stop in _blocks(config.pattern, columns):
        for at, base in _parts(forward, start, stop, config.pattern):
            values = forward.best(at.start, base)
            cost = values * values if spared is None else np.maximum(values * values - spared(at, values), 0)
            kept[at] = _choose(cost * factored.diagonal[at, None], at, config)
            forward.settle(at.start, base, kept[at], None)
    hessian = statistics["hessian"]
    descent = Descent(weight, forward.error, hessian, linalg.ridge(hessian, factored.damping))
    return refit(descent, kept, config.sweeps), kept


def refit(descent: Descent, kept: NDArray[np.bool_], sweeps: int) -> Floats:
    """Survivors (in, out) after so many sweeps towards where they are best, 0 for the others."""
    columns = len(kept)
    for _ in range(sweeps):
        for start, stop in blocks(columns, columns):
            descent.settle(start, descent.slope(start, stop), kept[start:stop], None)
    return np.where(kept, descent.weight - descent.error, np.float32(0))


def _blocks(pattern: tuple[int, int] | None, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of about `BLOCK` columns that cut no M of a pattern apart."""
    width = BLOCK if pattern is None else pattern[1] * max(1, BLOCK // pattern[1])
    for start in range(0, columns, width):
        yield start, min(start + width, columns)


def _parts(forward: Forward, start: int, stop: int, pattern: tuple[int, int] | None) -> Iterator[tuple[slice, Floats]]:
    """A block's columns and their base: the block at once, or with N:M the columns of one M at a time.

    So each choice of an M knows the errors before it. Settle each before the next.
    """
    block = forward.base(start, stop)
    width = stop - start if pattern is None else pattern[1]
    for low in range(start, stop, width):
        high = min(low + width, stop)
        before, at = slice(start, low), slice(low, high)
        yield at, block[low - start : high - start] + forward.unit[before, at].T @ forward.error[before]


def _choose(scores: Floats, at: slice, config: magnitude.Config) -> NDArray[np.bool_]:
    """What stays of scores (n, out) in columns ``at``; the blocks' counts add up to round(sparsity · columns)."""
    gone = round(config.sparsity * at.stop) - round(config.sparsity * at.start)
    if config.scope == "tensor" and config.pattern is None:
        share = round(config.sparsity * at.stop * scores.shape[1]) - round(config.sparsity * at.start * scores.shape[1])
        return masks.keep(scores.reshape(1, -1), share, "row", None).reshape(scores.shape)
    kept: NDArray[np.bool_] = masks.keep(np.ascontiguousarray(scores.T), gone, "row", config.pattern).T
    return kept
