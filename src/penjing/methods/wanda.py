"""Wanda: a weight counts by its magnitude times the norm of its input (Sun et al., 2023, arXiv 2306.11695).

It is SparseGPT's criterion with the diagonal of the hessian alone, and leaves the survivors as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import masks
from .magnitude import Config, by_rows
from .statistics import Statistics

__all__ = ["MEMORY", "NEEDS", "Config", "by_rows", "solve"]
NEEDS: tuple[str, ...] = ("input_norm",)
MEMORY = (14, 0)


def solve(weight: NDArray[Any], statistics: Statistics, config: Config) -> NDArray[Any]:
    """A weight (out, in) with zeros where |w_ij| · ‖x_j‖ is least in its row, as in the paper, or in all."""
    columns = weight.shape[1]
    masks.check_pattern(config.pattern, columns)
    scores = np.abs(weight.astype(np.float32)) * statistics.need("input_norm", columns)
    if config.scope == "tensor" and config.pattern is None:  # counted over all weights, not by rows
        kept = masks.keep(scores.reshape(1, -1), round(config.sparsity * scores.size), "row", None).reshape(
            scores.shape
        )
    else:
        kept = masks.keep(scores, round(config.sparsity * columns), "row", config.pattern)
    return np.where(kept, weight, np.zeros((), weight.dtype))
