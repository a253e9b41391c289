"""SmoothQuant: outliers of the input moved into the weights, so that both fit on 8 bits (Xiao et al., 2022,
2211.10438).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import options
from .scaling import Floats, check_readers
from .statistics import Statistics

NEEDS: tuple[str, ...] = ("absmax",)


@dataclass(frozen=True)
class Config:
    """strength: the paper's α, how much of the difficulty goes into the weights; 0 none, 1 all."""

    strength: float = 0.5

    def __post_init__(self) -> None:
        options.number("strength", self.strength, 0, 1)


def solve(weights: Sequence[NDArray[Any]], statistics: Statistics, config: Config) -> Floats:
    """Weights (out_i, in) that read one input → s_j = max |x_j|^α / max |w_j|^(1−α) (in,), 1 where either is 0."""
    columns = check_readers(weights)
    inputs = statistics.need("absmax", columns).astype(np.float64)
    largest = np.max([np.abs(weight.astype(np.float32)).max(axis=0) for weight in weights], axis=0).astype(np.float64)
    seen = (inputs > 0) & (largest > 0)
    inputs, largest = np.where(seen, inputs, 1), np.where(seen, largest, 1)
    found: Floats = (inputs**config.strength / largest ** (1 - config.strength)).astype(np.float32)
    return np.where(seen, found, np.float32(1))
