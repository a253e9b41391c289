"""A rule applied to a weight: prune, then quantize, with the methods that the rule names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.affine import AffineTensor, Grid
from ..recipe import Prune, Quantize, Rule
from . import Statistics, pruner, quantizer
from .observers import observer


def solve(
    rule: Rule, weight: NDArray[Any], statistics: Statistics, *, scale_dtype: str, seed: int
) -> NDArray[Any] | AffineTensor:
    """A weight (out, in) as the rule wants it: with zeros, on a grid, or both.

    scale_dtype: what steps are stored in.  seed: for methods that draw.
    """
    if rule.prune is not None:
        weight = pruner(rule.prune.method).solve(weight, statistics, _prune_config(rule.prune, seed))
    if rule.quantize is None:
        return weight
    config = _quantize_config(rule.quantize, scale_dtype)
    solved: AffineTensor = quantizer(rule.quantize.method).solve(weight, statistics, config)
    return solved


def check(rule: Rule) -> None:
    """BadRecipe for a method or an observer that there is not."""
    if rule.prune is not None:
        pruner(rule.prune.method)
    if rule.quantize is not None:
        quantizer(rule.quantize.method)
        observer(rule.quantize.observer)


def by_rows(rule: Rule) -> bool:
    """May a weight be solved some rows at a time, with the same result?"""
    apart = rule.prune is None or pruner(rule.prune.method).by_rows(_prune_config(rule.prune, 0))
    if rule.quantize is not None:
        apart = apart and quantizer(rule.quantize.method).by_rows(_quantize_config(rule.quantize, "float32"))
    return bool(apart)


def join(parts: Sequence[NDArray[Any] | AffineTensor]) -> NDArray[Any] | AffineTensor:
    """Rows that were solved apart, in order, as one weight."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part for part in parts if isinstance(part, AffineTensor)]
    if not tensors:
        return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])
    zeros = [part.zero_point for part in tensors if part.zero_point is not None]
    return AffineTensor(
        np.concatenate([part.codes for part in tensors]),
        np.concatenate([part.scale for part in tensors]),
        np.concatenate(zeros) if zeros else None,
        tensors[0].grid,
    )


def _prune_config(prune: Prune, seed: int) -> Any:
    return pruner(prune.method).Config(prune.share, prune.scope, prune.keep, seed)


def _quantize_config(quantize: Quantize, scale_dtype: str) -> Any:
    grid = Grid(quantize.bits, quantize.group_size, quantize.symmetric, scale_dtype)
    return quantizer(quantize.method).Config(grid, quantize.observer)
