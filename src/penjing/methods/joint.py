"""Pruned and quantized in one solve over the hessian, the mask chosen knowing what quantization costs.

A weight that is kept is rounded, which costs (w − Q(w))² / [H⁻¹]_kk. So what pruning it costs *beyond* that,

    (w_k² − (w_k − Q(w_k))²) / [H⁻¹]_kk

decides who goes: a weight that would round to zero anyway goes for free. Weights go in the stages of `gradual`, or for
an N:M pattern block by block as in `sparsegpt`, whichever loses less. The survivors are then rounded with feedback
among themselves, as in `gptq`, and their codes and steps brought to where they are best for this mask (`refine`). The
error is always measured from the original weight, never from a pruned one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..formats.affine import AffineTensor, Grid
from . import gptq, gradual, linalg, masks, sparsegpt
from .feedback import by_columns
from .refine import refine
from .rounding import Rounder
from .statistics import Statistics

NEEDS: tuple[str, ...] = ("hessian",)
MEMORY = (52, 8)
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Config:
    """grid, observer, damping: as for gptq.  sparsity, scope, pattern, stages: as for gradual.  sweeps: as for both."""

    grid: Grid
    sparsity: float
    scope: Literal["row", "tensor"] = "row"
    pattern: tuple[int, int] | None = None
    observer: str = "importance"
    damping: float = 0.01
    stages: int = 16
    sweeps: int = 3

    def __post_init__(self) -> None:
        self.pruning, self.rounding  # noqa: B018  both check their settings

    @property
    def pruning(self) -> gradual.Config:
        return gradual.Config(
            self.sparsity, self.scope, self.pattern, damping=self.damping, stages=self.stages, sweeps=self.sweeps
        )

    @property
    def rounding(self) -> gptq.Config:
        return gptq.Config(self.grid, self.observer, self.damping, act_order=True, sweeps=self.sweeps)


def by_rows(config: Config) -> bool:
    return False  # as gptq


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> AffineTensor:
    """A weight (out, in) on the grid, with codes that decode to exactly 0 where it was pruned."""
    out, columns = weight.shape
    masks.check_pattern(config.pattern, columns)
    rounder, turned = Rounder(config.grid, out, columns), by_columns(weight)
    inverse, _ = linalg.inverse_diagonal(statistics, columns, config.damping)
    group = np.arange(columns) // rounder.width

    def rounding_error(at: slice, values: Floats) -> Floats:
        if len(values) == columns:  # steps follow the survivors; a block's are those of the weight as it was
            gptq.fit_all(rounder, values, (values != 0) / inverse[:, None], config.observer)
        error: Floats = values - rounder.nearest(rounder.all_steps(group[at]), values)
        return error * error

    if config.pattern is None:
        survivors, kept = gradual.in_stages(turned, statistics, config.pruning, rounding_error)
    else:
        gptq.fit_all(rounder, turned, 1 / inverse, config.observer)
        by_blocks = sparsegpt.Config(config.sparsity, config.scope, config.pattern, 0, config.damping, config.sweeps)
        survivors, kept = sparsegpt.in_order(turned, statistics, by_blocks, rounding_error)
    factored = linalg.factor(statistics, columns, config.damping, act_order=True)
    centred = gptq.round_in_order(rounder, survivors, kept, factored, config.rounding)
    hessian = statistics["hessian"]
    refine(rounder, centred, turned, hessian, linalg.ridge(hessian, factored.damping), config.sweeps, kept)
    return rounder.tensor(centred)
