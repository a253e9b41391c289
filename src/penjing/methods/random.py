"""Random pruning: which weights go is drawn by seed. The baseline that any other method must beat."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from .magnitude import Config
from .statistics import Statistics

NEEDS: tuple[str, ...] = ()
MEMORY = (12, 0)


def by_rows(config: Config) -> bool:
    return False


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> NDArray[Any]:
    """A weight (out, in) with zeros at places that depend on its shape, the seed and nothing else."""
    ranks = np.random.default_rng(config.seed).random(weight.shape, np.float32) + np.float32(1)
    kept = kernels.prune(ranks, config.sparsity, config.scope, config.pattern) != 0
    return np.where(kept, weight, np.zeros((), weight.dtype))
