"""The tensors of one file of the result: read, solved and encoded, with or without calibration."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from .checkpoint import storage
from .checkpoint.floats import input_step
from .checkpoint.plan import Plan, Shard, scale_dtype
from .checkpoint.safetensors import Chunks, Tensor
from .checkpoint.storage import Weight
from .formats import floats
from .formats.floats import FloatTensor
from .methods import apply
from .methods.apply import Solution
from .methods.statistics import Statistics
from .recipe import Rule

if TYPE_CHECKING:
    from .calibrate import Calibrator, Tick

# Reads a module's weight, or some of its rows: (name of the tensor, rows)
Read = Callable[[str, slice], NDArray[Any]]


@dataclass
class Contents:
    """What a file will hold.

    zeros: module → weights pruned.  clipped: module → the share of its weights that its steps do not reach.  verdicts:
    module → what calibration found of it.  recovered: block → errors of its output before and after it was trained.
    cache: attention → what rounding its keys and values loses (see `kv_cache.encode`).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    zeros: dict[str, int] = field(default_factory=dict)
    clipped: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    recovered: dict[str, dict[str, float]] = field(default_factory=dict)
    cache: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, plan: Plan, module: str, whole: Solution, largest_input: float | None = None) -> None:
        rule = plan.rules[module]
        if rule.prune is not None:
            self.zeros[module] = storage.count_zeros(whole)
        stored = storage.encode(whole, rule.quantize, sparse=plan.is_sparse(module))
        if largest_input is not None:
            stored |= input_step(largest_input, plan.weight(module).step_dtype)
        self.tensors |= {f"{module}.{part}": array for part, array in stored.items()}


def solve_shard(plan: Plan, shard: Shard, calibrator: Calibrator | None, tick: Tick) -> Contents:
    """All tensors of a file. tick: is told the share of the file's bytes that a step of the work stands for."""
    contents = Contents({name: _copy(plan, name) for name in shard.copies})
    size = max(1, plan.input_bytes(shard))
    plainly: list[str] = []
    for block in shard.blocks:
        modules = [name.removesuffix(".weight") for name in block.tensors if name.removesuffix(".weight") in plan.rules]
        if calibrator is None or not calibrator.needed(block.name):
            plainly += modules
            continue
        share = sum(plan.checkpoint.infos[name].nbytes for name in block.tensors) / size
        _calibrated(plan, contents, block.name, modules, calibrator, _part_of(tick, share))
    for module, whole, clipped in _solved_plainly(plan, plainly):
        contents.add(plan, module, whole)
        if clipped:
            contents.clipped[module] = clipped
        if apply.needs(plan.rules[module]):
            contents.verdicts[module] = {"uncalibrated": True, "checksum": storage.checksum(whole)}
    return contents


def _part_of(tick: Tick, share: float) -> Tick:
    return lambda part: tick(part * share)


def _calibrated(
    plan: Plan, contents: Contents, block: str, modules: list[str], calibrator: Calibrator, tick: Tick
) -> None:
    from .calibrate import compress_block

    def solve(rule: Rule, module: str, weight: NDArray[Any], statistics: Statistics) -> Solution:
        reach = _reach(plan, module, lambda name, rows: opened.get(name)[rows])
        return _solve(plan, rule, module, weight, statistics, reach)

    if calibrator.teacher is not None:
        calibrator.teacher.go_through(calibrator.order.index(block), calibrator.tokens)

    def recovery(solutions: Mapping[str, Solution]) -> dict[str, Solution]:
        assert calibrator.teacher is not None
        integers = {module: each for module, each in solutions.items() if not isinstance(each, FloatTensor)}
        found, contents.recovered[block] = calibrator.teacher.recover(opened, integers)
        opened.changed |= {name for name in found if name.removesuffix(".weight") not in plan.rules}
        return {name.removesuffix(".weight"): solved for name, solved in found.items() if name not in opened.changed}

    with calibrator.open(block, tick) as opened:
        asked = recovery if calibrator.teacher is not None else None
        for module, whole, verdict in compress_block(opened, modules, plan.rules, solve, asked):
            contents.add(plan, module, whole, verdict.get("largest_input"))
            if clipped := verdict.pop("clipped", 0.0):
                contents.clipped[module] = clipped
            contents.verdicts[module] = verdict | {"checksum": storage.checksum(whole)}
        contents.tensors |= {name: opened.get(name) for name in opened.changed if name in contents.tensors}
        for attention, steps, lost in opened.steps_of_cache():
            contents.tensors |= {f"{attention}.{part}": array for part, array in steps.items()}
            contents.cache[attention] = lost
        for module in opened.starved:
            contents.verdicts[module]["starved"] = True
        for module in opened.unfolded:
            contents.verdicts[module]["unfolded"] = True


def _solved_plainly(plan: Plan, modules: Iterable[str]) -> Iterator[tuple[str, Solution, float]]:
    """Modules without statistics, each some rows at a time where its method allows it, with the share that is clipped.

    Those whose methods need data lie outside the blocks (a head, say); they are rounded to nearest.
    """
    pieces = [(module, rows) for module in modules for rows in row_ranges(plan, module)]

    @functools.cache
    def reach(module: str) -> float | None:
        return _reach(plan, module, plan.checkpoint.read)

    def solved() -> Iterator[tuple[str, Solution, float]]:
        for (module, _), weight in _read_ahead(plan, pieces):
            rule = _without_data(plan, module)
            part = _solve(plan, rule, module, weight, Statistics(), reach(module))
            yield module, part, len(weight) * apply.clipped(weight, part, 64) if apply.clips(rule) else 0.0

    for module, group in itertools.groupby(solved(), key=lambda item: item[0]):
        parts = list(group)
        yield (
            module,
            apply.join([part for _, part, _ in parts]),
            sum(c for *_, c in parts) / plan.weight(module).shape[0],
        )


def _read_ahead(plan: Plan, pieces: Iterable[tuple[str, slice]]) -> Iterator[tuple[tuple[str, slice], NDArray[Any]]]:
    """Rows of weights, the next ones being read while the last ones are computed on."""
    with ThreadPoolExecutor(1, "penjing-read") as reader:
        waiting: tuple[tuple[str, slice], Future[NDArray[Any]]] | None = None
        for piece in pieces:
            ahead = (piece, reader.submit(plan.checkpoint.read, f"{piece[0]}.weight", piece[1]))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = ahead
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _copy(plan: Plan, name: str) -> Chunks:
    """A tensor that is written as it is read, in parts."""
    info = plan.checkpoint.infos[name]
    ranges = plan.row_ranges(info) if info.shape else (None,)
    return Chunks(info.dtype, info.shape, (plan.checkpoint.read(name, rows) for rows in ranges))


def _solve(
    plan: Plan, rule: Rule, module: str, rows: NDArray[Any], statistics: Statistics, reach: float | None
) -> Solution:
    """What a rule makes of a module's weight, or of some rows of it."""
    seed, dtype = zlib.crc32(module.encode(), plan.recipe.seed & 0xFFFFFFFF), scale_dtype(plan.weight(module))
    return apply.solve(rule, rows, statistics, scale_dtype=dtype, seed=seed, reach=reach)


def _reach(plan: Plan, module: str, read: Read) -> float | None:
    """The largest weight of all that share a module's step for the tensor; None where it has no such step."""
    quantize = plan.rules[module].quantize
    if quantize is None or not quantize.needs_reach:
        return None
    pieces = [(f"{each}.weight", rows) for each in plan.fused(module) for rows in plan.row_ranges(plan.weight(each))]
    return max(floats.largest(read(name, rows)) for name, rows in pieces)


def solved_again(plan: Plan, module: str) -> Iterator[tuple[slice, Weight]]:
    """What a module's rows were solved to without data, computed from the original once more."""
    reach = _reach(plan, module, plan.checkpoint.read)
    for rows in row_ranges(plan, module):
        weight = plan.checkpoint.read(f"{module}.weight", rows)
        yield rows, _solve(plan, plan.rules[module], module, weight, Statistics(), reach)


def row_ranges(plan: Plan, module: str) -> Iterator[slice]:
    return plan.row_ranges(plan.weight(module), apply.by_rows(_without_data(plan, module)))


def _without_data(plan: Plan, module: str) -> Rule:
    rule = plan.rules[module]
    return apply.plain(rule) if apply.needs(rule) else rule
