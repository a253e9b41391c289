"""OBC: exact optimal-brain-surgeon pruning, one weight at a time (Frantar et al., 2022, arXiv 2208.11580).

In each row the weight with the least w_p² / [H⁻¹]_pp goes, the others move by −w_p / [H⁻¹]_pp · [H⁻¹]_:p, and p is
taken out of H⁻¹. The best greedy pruning there is, at (in)³ a row: for layers of up to `MOST` columns, and to judge
others by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, BadRecipe
from . import linalg, magnitude, masks, options
from .statistics import Statistics

NEEDS: tuple[str, ...] = ("hessian",)
MEMORY = (8, 40)
MOST = 1024


@dataclass(frozen=True)
class Config(magnitude.Config):
    """As magnitude's, with scope "row".  damping: share of the mean diagonal added to the hessian's."""

    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        options.number("damping", self.damping, 0, 1)
        if self.scope != "row":
            raise BadRecipe("scope=tensor: obs prunes each row by itself; give row")


def by_rows(config: Config) -> bool:
    return True


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> NDArray[Any]:
    """A weight (out, in) with zeros, its other values moved to make up for them; the dtype stays."""
    columns = weight.shape[1]
    if columns > MOST:
        raise BadInput(
            f"{columns} columns: obs takes (in)³ steps a row, up to {MOST} columns; gradual comes close to it"
        )
    masks.check_pattern(config.pattern, columns)
    inverse = linalg.inverse(statistics, columns, config.damping)
    rows = [_prune_row(row.astype(np.float64), inverse.copy(), config) for row in weight]
    return np.stack(rows).astype(weight.dtype)


def _prune_row(w: NDArray[np.float64], inverse: NDArray[np.float64], config: Config) -> NDArray[np.float64]:
    """One row (in,), and its own inverse of the hessian, which is used up."""
    keep, of = config.pattern or (0, len(w))
    gone = np.zeros(len(w), np.bool_)
    count = round(config.sparsity * len(w)) if config.pattern is None else len(w) // of * (of - keep)
    for _ in range(count):
        diagonal = np.diagonal(inverse)
        full = np.repeat(gone.reshape(-1, of).sum(axis=1) >= of - keep, of)  # this M has lost all that it may
        cost = np.where(gone | full, np.inf, w * w / np.where(gone, 1, diagonal))
        p = int(np.argmin(cost))
        column = inverse[:, p] / inverse[p, p]
        w = w - w[p] * column
        inverse -= np.outer(column, inverse[p])
        gone[p] = True
        w[gone] = 0
    return w
