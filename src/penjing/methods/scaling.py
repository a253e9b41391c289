"""Transforms by scaling: the same function written with other weights, easier to round.

A transform finds a scale s > 0 for each column of an input that several layers share: ``solve(weights, statistics,
config) → scale float32 (in,)``. Whoever calls folds it: the readers' columns are multiplied by it, and what makes the
input (a norm's gain, or the rows of the layer before, its bias with them) is divided by it, so that x / s comes in.
What was collected on x then holds for x / s by `scaled`. Pure functions of arrays; which layers read what is known to
the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from .statistics import Statistics

Floats = NDArray[np.float32]


def into_columns(weight: NDArray[Any], scale: Floats) -> NDArray[Any]:
    """A reader's weight (out, in) with its columns times s; the dtype stays."""
    return (weight.astype(np.float32) * scale).astype(weight.dtype)


def out_of_rows(producer: NDArray[Any], scale: Floats) -> NDArray[Any]:
    """What makes the input, divided by s: a gain or a bias (in,), or a weight (in, …) whose rows make it."""
    divided: NDArray[Any] = producer.astype(np.float32) / scale.reshape(-1, *[1] * (producer.ndim - 1))
    return divided.astype(producer.dtype)


def scaled(statistics: Statistics, scale: Floats) -> Statistics:
    """The statistics of x / s from those of x."""
    found = {name: value / scale for name, value in statistics.items() if name != "hessian"}
    if "hessian" in statistics:
        found["hessian"] = statistics["hessian"] / (scale[:, None] * scale)
    return Statistics(found)


def check_readers(weights: Sequence[NDArray[Any]]) -> int:
    """Columns of weights that read the same input; BadInput when there are none or they differ."""
    widths = {weight.shape[1] for weight in weights}
    if len(widths) != 1:
        raise BadInput(f"a transform is for layers that read one input; these have {sorted(widths)} columns")
    return int(widths.pop())


def level(scale: NDArray[Any]) -> Floats:
    """A scale with its geometric middle at 1: √(largest · smallest) divides it. Zeros and infinities become 1."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        usable = np.isfinite(scale) & (scale > 0)
    if not usable.any():
        return np.ones(scale.shape, np.float32)
    middle = np.sqrt(float(scale[usable].max()) * float(scale[usable].min()))
    found: Floats = np.where(usable, scale / middle, 1).astype(np.float32)
    return found
