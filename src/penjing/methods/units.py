"""Which units go whole: neurons of an MLP, heads of attention; and what is left moved to make up for them.

A unit is some columns of the matrix that reads it (an MLP's down, attention's o), with the rows that make them
elsewhere. Ways to choose, by what of the output goes with a unit:

    random  the control
    l1, l2  the norm of all weights that go; needs no data
    wanda   ‖W_u x_u‖ as if columns were independent: Σ_j ‖W_:j‖² ‖x_j‖² (Sun et al., 2023, arXiv 2306.11695)
    obs     the error that stays when all other columns make up for it, tr(W_u ([H⁻¹]_uu)⁻¹ W_uᵀ), which is optimal
            brain surgery by groups (Hassibi and Stork, 1993; as "ZipLM", Kurtic et al., 2023, arXiv 2302.04089):
            greedy, with H⁻¹ and W brought up to date as units go

With H = xᵀx / n of the reader's input, the columns that are kept (K) are best set to W' = W H_:K H_KK⁻¹, the least
squares fit of the old output on the inputs that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadRecipe, nearest
from . import linalg, options
from .statistics import Statistics

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]
WAYS = ("l1", "l2", "random", "wanda", "obs")
ROUNDS = 32  # H⁻¹ is brought up to date so many times at most; with fewer units than that, after each
# Bytes that `choose` and `refit` take at most for each weight, and for each of (in, in).
MEMORY = (24, 32)


@dataclass(frozen=True)
class Config:
    """way: one of `WAYS`.  damping: share of the mean diagonal added to the hessian's.  seed: for random."""

    way: str = "obs"
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise BadRecipe(f"method={self.way!r}: units are chosen by one of these; {nearest(self.way, WAYS)}")
        options.number("damping", self.damping, 0, 1)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics of the reader's input that it takes."""
        return {"wanda": ("input_norm",), "obs": ("hessian",)}.get(self.way, ())


def choose(
    weight: NDArray[Any],
    columns: Indices,
    keep: int,
    makers: Sequence[NDArray[Any]],
    statistics: Statistics,
    config: Config,
    sections: int = 1,
) -> Indices:
    """The units that stay, ascending: ``keep`` of each of ``sections`` equal runs of units.

    weight: the reader's (out, in).  columns: (units, size), those of each unit.  makers: matrices (units, n), a row all
    that makes a unit, for l1 and l2.
    """
    count = len(columns)
    if config.way == "obs":
        return _by_surgery(weight, columns, keep, statistics, config, sections)
    if config.way == "random":
        scores = np.random.default_rng(config.seed).random(count)
    elif config.way == "wanda":
        norms = np.square(statistics.need("input_norm", weight.shape[1]).astype(np.float64))
        scores = (_column_squares(weight) * norms)[columns].sum(axis=1)
    else:
        power = 1 if config.way == "l1" else 2
        parts = [np.ascontiguousarray(weight.T[columns]).reshape(count, -1), *makers]
        scores = np.sum([np.power(np.abs(part.astype(np.float64)), power).sum(axis=1) for part in parts], axis=0)
    order = np.argsort(-scores.reshape(sections, -1), axis=1, kind="stable")[:, :keep]
    return _numbers(order, count // sections)


def _numbers(chosen: Indices, each: int) -> Indices:
    """Units by their number in each section (sections, keep) → numbers among all, ascending."""
    return np.sort((chosen + np.arange(len(chosen))[:, None] * each).reshape(-1))


def _column_squares(weight: NDArray[Any]) -> Doubles:
    w = weight.astype(np.float32)
    found: Doubles = np.einsum("oi,oi->i", w, w, dtype=np.float64)
    return found


def _by_surgery(
    weight: NDArray[Any], columns: Indices, keep: int, statistics: Statistics, config: Config, sections: int
) -> Indices:
    w = weight.astype(np.float64)
    inverse = linalg.inverse(statistics, weight.shape[1], config.damping)
    alive = np.ones((sections, len(columns) // sections), np.bool_)
    excess = alive.shape[1] - keep
    step = max(1, -(-excess * sections // ROUNDS))
    while (left := int((alive.sum(axis=1) - keep).sum())) > 0:
        costs = _costs(w, inverse, columns, alive.reshape(-1)).reshape(alive.shape)
        gone = _cheapest(costs, alive, keep, min(step, left))
        alive.reshape(-1)[gone] = False
        _remove(w, inverse, columns[gone].reshape(-1))
    return np.flatnonzero(alive)


def _costs(w: Doubles, inverse: Doubles, columns: Indices, alive: NDArray[np.bool_]) -> Doubles:
    """What each unit's going costs the output once all others have made up for it; infinite for those that went."""
    found = np.full(len(columns), np.inf)
    if columns.shape[1] == 1:
        at = columns[alive, 0]
        found[alive] = np.einsum("oi,oi->i", w[:, at], w[:, at]) / np.diagonal(inverse)[at]
        return found
    for unit in np.flatnonzero(alive):
        at = columns[unit]
        found[unit] = np.einsum("io,io->", w[:, at].T, np.linalg.solve(inverse[np.ix_(at, at)], w[:, at].T))
    return found


def _cheapest(costs: Doubles, alive: NDArray[np.bool_], keep: int, most: int) -> Indices:
    """Up to ``most`` units that cost least, of sections that have more than they keep."""
    room = alive.sum(axis=1) - keep
    each, found = costs.shape[1], list[int]()
    for unit in np.argsort(costs, axis=None, kind="stable"):
        if len(found) == most:
            break
        if room[unit // each] > 0:
            room[unit // each] -= 1
            found.append(int(unit))
    return np.asarray(found, np.int64)


def _remove(w: Doubles, inverse: Doubles, at: Indices) -> None:
    """Take columns out of the reader and of H⁻¹, all others making up for them; in place."""
    share = np.linalg.solve(inverse[np.ix_(at, at)], inverse[at])
    w -= w[:, at] @ share
    inverse -= inverse[:, at] @ share
    w[:, at] = 0


def refit(weight: NDArray[Any], kept: Indices, statistics: Statistics, damping: float) -> NDArray[Any]:
    """The kept columns (out, kept) of a weight, moved so that they make up best for those that go; the dtype stays."""
    hessian = statistics.need("hessian", weight.shape[1])
    gone = np.setdiff1d(np.arange(weight.shape[1]), kept)
    own = hessian[np.ix_(kept, kept)].astype(np.float64)
    own.flat[:: len(own) + 1] += max(linalg.ridge(hessian, damping), float(np.finfo(np.float32).tiny))
    share = np.linalg.solve(own, hessian[np.ix_(kept, gone)].astype(np.float64))
    return (weight[:, kept].astype(np.float64) + weight[:, gone].astype(np.float64) @ share.T).astype(weight.dtype)
