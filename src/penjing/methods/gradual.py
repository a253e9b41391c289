"""Pruned in stages, the survivors refitted between them: most of what exact OBS gains, at the cost of matrix products.

OBS (Hassibi and Stork, 1993; OBC, arXiv 2208.11580) removes one weight at a time, the one with the least w_k² /
[H⁻¹]_kk, and moves all others to make up for it: (in)³ a row. Here many go at once, in stages that get smaller (the
cubic schedule of Zhu and Gupta, arXiv 1710.01878), ranked by the same saliency with the hessian's own inverse; between
two stages one sweep of coordinate descent brings the survivors to where they are best, so that weights whose part
another can play go early and those that took over stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import linalg, magnitude, masks, options
from .feedback import Descent, by_columns
from .sparsegpt import Spared, refit
from .statistics import Statistics

NEEDS: tuple[str, ...] = ("hessian",)
MEMORY = (44, 6)
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Config(magnitude.Config):
    """As magnitude's.  damping: as for sparsegpt.  stages: of pruning.  sweeps: over the survivors at last."""

    damping: float = 0.01
    stages: int = 16
    sweeps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        options.number("damping", self.damping, 0, 1)
        options.whole("stages", self.stages, 1, 1000)
        options.whole("sweeps", self.sweeps, 0, 100)


def by_rows(config: Config) -> bool:
    return False  # as gptq


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> NDArray[Any]:
    """A weight (out, in) with zeros, its other values moved to make up for them; the dtype stays."""
    turned = by_columns(weight)
    values, _ = in_stages(turned, statistics, config, None)
    return np.ascontiguousarray(values.T).astype(weight.dtype)


def in_stages(
    weight: Floats, statistics: Statistics, config: Config, spared: Spared | None
) -> tuple[Floats, NDArray[np.bool_]]:
    """A weight (in, out) → its survivors where they are best, 0 elsewhere, and what was kept: (in, out) each.

    spared: of columns and their values, the squared error that each would cost if it stayed; None: none.
    """
    masks.check_pattern(config.pattern, len(weight))
    inverse, damping = linalg.inverse_diagonal(statistics, len(weight), config.damping)
    hessian = statistics["hessian"]
    descent = Descent(weight, np.zeros_like(weight), hessian, linalg.ridge(hessian, damping))
    kept, values = np.ones(weight.shape, np.bool_), weight
    total = config.sparsity if config.pattern is None else 1 - config.pattern[0] / config.pattern[1]
    for stage in range(1, config.stages + 1):
        cost = values * values
        if spared is not None:
            cost = np.maximum(cost - spared(slice(0, len(weight)), values), 0)
        # what went before has the saliency 0, and stays gone
        saliency = np.where(kept, np.maximum(cost / inverse[:, None], np.float32(1e-30)), np.float32(0))
        kept = _keep(saliency, total * (1 - (1 - stage / config.stages) ** 3), config)
        values = refit(descent, kept, 1 if stage < config.stages else 1 + config.sweeps)
    return values, kept


def _keep(saliency: Floats, share: float, config: Config) -> NDArray[np.bool_]:
    """The share with the least saliency (in, out) goes, of each row or of all; with N:M only what may go in its M."""
    columns, out = saliency.shape
    if config.pattern is not None:
        stays = masks.keep(np.ascontiguousarray(saliency.T), 0, "row", config.pattern).T
        saliency = np.where(stays, np.float32(np.finfo(np.float32).max), saliency)
    elif config.scope == "tensor":
        kept = masks.keep(saliency.reshape(1, -1), round(share * saliency.size), "row", None)
        return kept.reshape(columns, out)
    return masks.keep(np.ascontiguousarray(saliency.T), round(share * columns), "row", None).T
