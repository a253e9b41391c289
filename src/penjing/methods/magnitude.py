"""Magnitude pruning: the weights nearest to zero go.

L1 ranks a weight by |w| and L2 by w², which is the same order: for single weights and N:M the two give the same mask.
They differ where groups are ranked (filters, heads, neurons: Σ|w| against √Σw²), which `penjing.prune` does on modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from .. import kernels
from ..errors import BadRecipe
from .statistics import Statistics

NEEDS: tuple[str, ...] = ()
MEMORY = (8, 0)


@dataclass(frozen=True)
class Config:
    """sparsity: the share that goes, in (0, 1).  scope: ranked within a row or within the tensor.

    pattern: (n, m) keeps n of each m consecutive weights of a row, and decides the sparsity; None leaves it free.
    """

    sparsity: float
    scope: Literal["row", "tensor"] = "row"
    pattern: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise BadRecipe(f"sparsity={self.sparsity}: give the share of weights to remove, between 0 and 1")
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1]:
            raise BadRecipe(f"pattern {self.pattern[0]}:{self.pattern[1]}: N of M are kept, with 0 < N < M")


def by_rows(config: Config) -> bool:
    return config.pattern is not None or config.scope == "row"


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> NDArray[Any]:
    """A weight (out, in) with zeros in place of the smallest magnitudes; of equal ones the first goes first."""
    return kernels.prune(weight, config.sparsity, config.scope, config.pattern)
