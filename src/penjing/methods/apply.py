"""A rule applied to a weight: prune, then quantize, or both in one, with the methods that the rule names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, BadRecipe, nearest
from ..formats import affine
from ..formats.affine import PER_TENSOR, AffineTensor, Grid
from ..formats.floats import FloatGrid, FloatTensor
from ..recipe import Prune, Quantize, Rule
from . import JOINT, linalg, pruner, quantizer, transform
from .statistics import Statistics, evenly

# What a rule says in its own fields, and not among a method's options.
FIELDS = ("grid", "observer", "sparsity", "scope", "pattern", "seed")
# What a weight becomes: the same with zeros, or codes on a grid.
Solution = NDArray[Any] | AffineTensor | FloatTensor


def solve(
    rule: Rule,
    weight: NDArray[Any],
    statistics: Statistics,
    *,
    scale_dtype: str,
    seed: int,
    reach: float | None = None,
) -> Solution:
    """A weight (out, in) as the rule wants it: with zeros, on a grid, or both. Its transform is the caller's to fold.

    scale_dtype: what steps are stored in.  seed: for methods that draw.  reach: the largest number that a step of the
    whole tensor is to hold (`Quantize.needs_reach`), where these are some rows, or share it; None is the weight's own.
    """
    solved: Solution = weight
    for module, config in _steps(rule, scale_dtype, seed, reach):
        solved = module.solve(solved, statistics, config)
    return solved


def check(rule: Rule) -> None:
    """BadRecipe for a method, an observer or an option that there is not, or that the method cannot do."""
    try:
        for module, config in _steps(rule, "float32", 0):
            module.by_rows(config)
        if rule.transform is not None:
            transform_config(rule, "float32")
    except BadInput as error:
        raise BadRecipe(str(error)) from None


def needs(rule: Rule) -> tuple[str, ...]:
    """The statistics of a layer's input that the rule's methods need."""
    modules = [module for module, _ in _steps(rule, "float32", 0)]
    if rule.transform is not None:
        modules.append(transform(rule.transform.method))
    own = ("absmax",) if static_inputs(rule) else ()
    return tuple(sorted({name for module in modules for name in module.NEEDS} | {*own}))


def static_inputs(rule: Rule) -> bool:
    """Is a step for the layer's input to be found by calibration?"""
    return rule.quantize is not None and rule.quantize.activations == "fp8-static"


def by_rows(rule: Rule) -> bool:
    """May a weight be solved some rows at a time, with the same result? `solve` is then given its reach."""
    return all(module.by_rows(config) for module, config in _steps(rule, "float32", 0, 1.0))


def transform_config(rule: Rule, scale_dtype: str) -> Any:
    """The config of the rule's transform; one that rounds on trial rounds as the rule will."""
    if rule.transform is None or rule.quantize is None:
        raise BadRecipe("a transform stands before quantization: give the rule both")
    fixed = {"grid": _grid(rule.quantize, scale_dtype)}
    method = transform(rule.transform.method)
    _check_floats(rule.transform.method, method, rule.quantize)
    return _config(rule.transform.method, method, fixed, rule.transform.options)


def plain(rule: Rule) -> Rule:
    """The rule that rounds to nearest and prunes by magnitude where another does so in a better way."""
    quantize, prune = rule.quantize, rule.prune
    return Rule(
        rule.targets,
        quantize and dataclasses.replace(quantize, method="rtn", observer=None, options={}),
        prune and Prune("l1", prune.sparsity, prune.pattern, prune.scope),
    )


def judge(
    weight: NDArray[Any], solved: Solution, statistics: Statistics, rule: Rule, rows: int = 256
) -> dict[str, float]:
    """What a solution loses of the layer's output, and what rounding (and magnitude pruning) alone would have lost.

    Needs the hessian, or input_norm, which is the root of its diagonal. ``loss`` and ``plain_loss`` are shares of
    tr(W H Wᵀ), over at most so many rows, evenly chosen: a loss above the plain one is a layer to do again or to keep.
    ``damping`` is there when the methods had to raise it.
    """
    if "hessian" in statistics:
        hessian = statistics.need("hessian", weight.shape[1])
    else:
        hessian = np.square(statistics.need("input_norm", weight.shape[1]))
    simple = solve(plain(rule), weight, Statistics(), scale_dtype="float32", seed=0)
    some = evenly(len(weight), rows)
    both = linalg.relative_losses(weight[some], [decoded_rows(each, some) for each in (solved, simple)], hessian)
    return dict(zip(("loss", "plain_loss"), both, strict=True)) | linalg.damping_used(statistics)


def clips(rule: Rule) -> bool:
    """May a rule's grid leave out weights at the ends? Rounding over the whole range leaves out none."""
    quantize = rule.quantize
    return quantize is not None and not (quantize.method == "rtn" and quantize.observer in (None, "minmax"))


def clipped(weight: NDArray[Any], solved: Solution, rows: int = 256) -> float:
    """The share of weights that lie beyond the range of their step by more than half of it: clipped, not rounded.

    Of floats those beyond the largest code by more than half of what lies between it and the next smaller one.

    Of at most so many rows, evenly chosen; 0 where nothing is on a grid.
    """
    if isinstance(solved, np.ndarray):
        return 0.0
    some = evenly(len(weight), rows)
    if isinstance(solved, FloatTensor):
        return _clipped_floats(weight[some].astype(np.float32), solved.rows(some))
    values, part, grid = weight[some].astype(np.float32), solved.rows(some), solved.grid
    step = affine.spread(part.scale, values.shape)
    zero = 0 if part.zero_point is None else affine.spread(part.zero_point, values.shape).astype(np.float32)
    place = values / step + zero
    half = np.float32(0.501)  # a weight half a step away may have been rounded either way
    return float(((place > grid.qmax + half) | (place < grid.qmin - half)).mean())


def _clipped_floats(values: NDArray[np.float32], part: FloatTensor) -> float:
    place = np.abs(values) / affine.spread(part.scale / part.divisor, values.shape)
    beyond = part.grid.largest * np.float32(33 / 32 if part.grid.bits == 8 else 7 / 6)
    return float((place > beyond).mean())


def decoded_rows(weight: Solution, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Some rows of a solution, as numbers."""
    return weight[rows] if isinstance(weight, np.ndarray) else weight.rows(rows).decode()


def memory_bytes(rule: Rule, rows: int, columns: int) -> int:
    """What `solve` takes at most beside the weight and its statistics, the solution included."""
    steps = [module for module, _ in _steps(rule, "float32", 0)]
    each: list[tuple[int, ...]] = [module.MEMORY for module in steps]
    weights, square = rows * columns, columns * columns
    at_first = square * max((first for _, _, *more in each for first in more), default=0)
    more = 0
    if rule.quantize is not None and rule.quantize.format != "int":
        more = weights * max(getattr(module, "FLOATS", 0) for module in steps)
    return more + weights * 4 + max(weights * max(a for a, *_ in each) + square * sum(b for _, b, *_ in each), at_first)


def join(parts: Sequence[Solution]) -> Solution:
    """Rows that were solved apart, in order, as one weight."""
    if len(parts) == 1:
        return parts[0]
    if floats := [part for part in parts if isinstance(part, FloatTensor)]:
        by_tensor = floats[0].grid.group_size == PER_TENSOR
        scale = floats[0].scale if by_tensor else np.concatenate([part.scale for part in floats])
        return dataclasses.replace(floats[0], codes=np.concatenate([part.codes for part in floats]), scale=scale)
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


def _steps(rule: Rule, scale_dtype: str, seed: int, reach: float | None = None) -> list[tuple[ModuleType, Any]]:
    """The methods that solve a weight, in order, each with its config."""
    prune, quantize = rule.prune, rule.quantize
    joint = [each.method for each in (prune, quantize) if each is not None and each.method in JOINT]
    if joint and prune is not None and quantize is not None and prune.method == quantize.method:
        fixed = _pruning(prune, seed) | _rounding(quantize, scale_dtype)
        _check_floats(quantize.method, quantizer(quantize.method), quantize)
        return [_method(quantize.method, quantizer(quantize.method), fixed, {**prune.options, **quantize.options})]
    if joint:
        raise BadRecipe(f"method {joint[0]} prunes and quantizes in one: name it in both, prune and quantize")
    steps = []
    if prune is not None:
        steps.append(_method(prune.method, pruner(prune.method), _pruning(prune, seed), prune.options))
    if quantize is not None:
        fixed = _rounding(quantize, scale_dtype, reach)
        _check_floats(quantize.method, quantizer(quantize.method), quantize)
        steps.append(_method(quantize.method, quantizer(quantize.method), fixed, quantize.options))
    return steps


def _check_floats(name: str, module: ModuleType, quantize: Quantize) -> None:
    """BadRecipe where floats are asked of a method that puts weights on a grid of integers alone."""
    on_grid = any(field.name == "grid" for field in fields(module.Config))
    if quantize.format != "int" and on_grid and not hasattr(module, "FLOATS"):
        raise BadRecipe(f"method {name} makes integers; format={quantize.format} takes rtn, or gptq with text")


def _pruning(prune: Prune, seed: int) -> dict[str, Any]:
    return {"sparsity": prune.share, "scope": prune.scope, "pattern": prune.keep, "seed": seed}


def _rounding(quantize: Quantize, scale_dtype: str, reach: float | None = None) -> dict[str, Any]:
    return {"grid": _grid(quantize, scale_dtype, reach), "observer": quantize.observer}


def _grid(quantize: Quantize, scale_dtype: str, reach: float | None = None) -> Grid | FloatGrid:
    if quantize.format != "int":
        return FloatGrid(quantize.format, quantize.group_size, scale_dtype, reach)
    return Grid(quantize.bits, quantize.group_size, quantize.symmetric, scale_dtype)


def _method(
    name: str, module: ModuleType, fixed: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[ModuleType, Any]:
    return module, _config(name, module, fixed, options)


def _config(name: str, module: ModuleType, fixed: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A method's Config from what the rule says; the method's own default where that is None."""
    own = [field.name for field in fields(module.Config)]
    if fixed.get("observer") is not None and "observer" not in own:
        raise BadRecipe(f"observer={fixed['observer']!r}: method {name} finds its steps in its own way; leave it out")
    known = [option for option in own if option not in FIELDS]
    for option in options:
        if option not in known:
            rest = nearest(option, known) if known else "it has none"
            raise BadRecipe(f"method {name} has no option {option!r}; {rest}")
    given = {field: value for field, value in fixed.items() if field in own and value is not None}
    return module.Config(**given, **options)
