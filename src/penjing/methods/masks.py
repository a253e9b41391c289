"""Which weights stay, from scores: the smallest go, counted in each row or over all rows, or n of each m stay."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..errors import BadInput

_LEAST = np.finfo(np.float32).tiny


def check_pattern(pattern: tuple[int, int] | None, columns: int) -> None:
    """BadInput unless an N:M pattern divides the columns."""
    if pattern is not None and columns % pattern[1]:
        raise BadInput(f"pattern {pattern[0]}:{pattern[1]} does not divide {columns} columns")


def keep(
    scores: NDArray[Any], gone: int, scope: Literal["row", "tensor"], pattern: tuple[int, int] | None
) -> NDArray[np.bool_]:
    """Scores ≥ 0 (rows, n) → True for what stays; of equal scores the first goes first.

    gone: how many of a row's n go (scope "row"), or on average over the rows (scope "tensor", rounded over all);
    with a pattern (n, m) the count follows from it.
    """
    raised = np.maximum(scores.astype(np.float32), _LEAST)  # so that 0 marks what went, and nothing else
    kept: NDArray[np.bool_] = kernels.prune(raised, gone / scores.shape[1], scope, pattern) != 0
    return kept
