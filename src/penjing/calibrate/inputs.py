"""Which layers of a block read the same input, and what calibration collects on each of these inputs.

One run of the block shows the sharing; further runs fill the statistics, as many inputs at a time as the memory for
them allows. A forced run shows every token to experts that the router chose too rarely.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import BadInput, PenjingError
from ..methods.statistics import PANEL, Collector, Statistics, add_products
from .block import LiveBlock, to_numpy

EXPERT = re.compile(r"^(?P<owner>.*\.experts)\.(?P<index>\d+)\.")
# An expert that saw fewer rows than its input has columns has a hessian without full rank; this share is borne.
ENOUGH = 0.25


@dataclass
class Input:
    """What one or more layers read.

    names: their weights in the checkpoint, in the order of first use; the first one's products are where it is
    seen.  columns: its width.  needs: statistics to collect.  once: was it seen exactly once in a run?
    """

    names: list[str]
    columns: int
    needs: tuple[str, ...] = ()
    once: bool = True
    modules: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return Collector.bytes_needed(self.columns, self.needs, "float32")

    @property
    def expert(self) -> tuple[str, int] | None:
        """(the experts' common name, number) of an expert's input."""
        found = EXPERT.match(self.names[0])
        return (found["owner"], int(found["index"])) if found else None


def find_inputs(block: LiveBlock, run: Callable[[Any], Any], wanted: Mapping[str, tuple[str, ...]]) -> list[Input]:
    """The inputs of a block's products in order of use, and of experts that the run did not reach.

    run: computes the block on some tokens, telling ``seen``.  wanted: weights that need statistics → which.
    """
    inputs: dict[Any, Input] = {}
    held: list[Tensor] = []  # so that no two inputs are ever in the same memory

    def seen(names: tuple[str, ...], x: Tensor) -> None:
        held.append(x)
        key = (x.data_ptr(), x.numel(), x.shape[-1])
        found = inputs.setdefault(key, Input([], x.shape[-1]))
        found.once = found.once and not set(names) & set(found.names)
        found.names += [name for name in names if name not in found.names]

    run(seen)
    merged = list(_merge(inputs.values()))
    known = {name for each in merged for name in each.names}
    unreached: dict[Any, Input] = {}
    for name in wanted:
        if name not in known and EXPERT.match(name) and (slot := block.slot_of(name)) is not None:
            columns = block.graph.checkpoint.infos[name].shape[1]
            unreached.setdefault(slot, Input([], columns, once=False)).names.append(name)
    for each in (*merged, *unreached.values()):
        each.modules = [name.removesuffix(".weight") for name in each.names if name in wanted]
        each.needs = tuple(sorted({need for name in each.names for need in wanted.get(name, ())}))
    return [each for each in (*merged, *unreached.values()) if each.needs]


def _merge(inputs: Iterable[Input]) -> Iterator[Input]:
    """Inputs of several calls of the same layers (a layer that runs twice in a block) as one."""
    merged: list[Input] = []
    for each in inputs:
        other = next((known for known in merged if set(known.names) & set(each.names)), None)
        if other is None:
            merged.append(each)
            continue
        other.names += [name for name in each.names if name not in other.names]
        other.once = False
    yield from merged


def portions(inputs: Sequence[Input], budget: int) -> list[list[Input]]:
    """Inputs in order, as many together as their statistics fit in the budget (bytes); at least one."""
    found: list[list[Input]] = []
    room = 0
    for each in inputs:
        if not found or each.nbytes > room:
            found.append([])
            room = budget
        found[-1].append(each)
        room -= each.nbytes
    return found


class _Enough(Exception):
    """All that was wanted of this run has been seen."""


class Collecting:
    """Collectors of some inputs, filled by the runs of a block that they are shown to."""

    def __init__(self, inputs: Sequence[Input], device: torch.device, dtype: torch.dtype) -> None:
        self.inputs = inputs
        self._collectors = {each.names[0]: Sums(each.columns, each.needs, device, dtype) for each in inputs}
        # where every product is made once, nothing after the last one that is wanted needs to be computed
        self._last = inputs[-1].names[0] if all(each.once for each in inputs) else None

    def count(self, each: Input) -> int:
        """Rows of an input that were seen."""
        count: int = self._collectors[each.names[0]].count
        return count

    def statistics(self, each: Input) -> Statistics:
        """What was seen of an input; it is given once, and then forgotten."""
        found: Statistics = self._collectors.pop(each.names[0]).statistics()
        return found

    def replace(self, others: Collecting) -> None:
        """Take over what others saw of the same inputs."""
        self._collectors |= others._collectors

    def run(self, block: LiveBlock, compute: Callable[[Any], Any]) -> None:
        """See one run of the block; the run ends with the last product that is of interest."""

        def seen(names: tuple[str, ...], x: Tensor) -> None:
            self.see(block, names, x)
            if self._last is not None and self._last in names:
                raise _Enough

        with suppress(_Enough):
            compute(seen)

    def see(self, block: LiveBlock, names: Sequence[str], x: Tensor) -> None:
        """See what comes into the product with some weights: (…, in). PenjingError for a NaN or an infinity."""
        for name in names:
            if (collector := self._collectors.get(name)) is not None:
                try:
                    collector.add(x.reshape(-1, x.shape[-1]))
                except BadInput as error:
                    raise PenjingError(f"{block.name}: {error}") from None


class Sums:
    """What `methods.statistics.Collector` sums up, for rows that are tensors, where they are: float32 on any device.

    dtype: what products with the rows are made in. A hessian of bfloat16 is of the rows as they are multiplied, where
    the processor has products of pairs: exact, and summed at 2.2 × the speed of float32.
    """

    def __init__(self, columns: int, needs: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> None:
        self.columns, self.count = columns, 0
        self._pairs = dtype == torch.bfloat16 and device.type == "cpu" and kernels.has_pairs()
        self._sums = {
            name: torch.zeros((columns,) * (2 if name == "hessian" else 1), dtype=torch.float32, device=device)
            for name in needs
        }

    def add(self, x: Tensor) -> None:
        """Rows (n, columns); BadInput for a NaN or an infinity."""
        only_pairs = self._pairs and self._sums.keys() == {"hessian"}  # which are made of bfloat16
        rows = x.detach() if only_pairs else x.detach().to(torch.float32)
        if _has_nonfinite(rows):
            raise BadInput("the layer's input has a NaN or an infinity: the model overflows on this text")
        self.count += len(rows)
        for name, total in self._sums.items():
            if name == "hessian" and self._pairs:
                kernels.add_gram(to_numpy(rows.to(torch.bfloat16)), total.numpy())
            elif name == "hessian" and rows.device.type == "cpu":
                add_products(total.numpy(), rows.numpy())  # 0.5 × the time of torch's own on an AVX2 machine
            elif name == "hessian":
                for low in range(0, self.columns, PANEL):  # the upper triangle of panels; the rest is its mirror
                    panel = slice(low, low + PANEL)
                    total[panel, low:].addmm_(rows[:, panel].T, rows[:, low:])
            elif name == "absmax":
                torch.maximum(total, rows.abs().amax(dim=0), out=total) if len(rows) else None
            elif name == "input_norm":
                total += rows.square().sum(dim=0)
            else:
                total += (rows.abs() if name == "absmean" else rows).sum(dim=0)

    def statistics(self) -> Statistics:
        """What was seen, on the host; it is made of the sums, which are gone then. BadInput when nothing was seen."""
        if not self.count:
            raise BadInput("the layer saw no rows: no calibration text reached it")
        found = {}
        for name, total in self._sums.items():
            if name == "hessian":
                found[name] = _whole(total.div_(self.count)).cpu().numpy()
            else:
                mean = total if name == "absmax" else total / self.count
                found[name] = (mean.sqrt() if name == "input_norm" else mean).cpu().numpy()
        return Statistics(found)


def _has_nonfinite(rows: Tensor) -> bool:
    if rows.device.type == "cpu":
        return kernels.has_nonfinite(to_numpy(rows))  # in one pass: a third of the time of torch's mask
    return not bool(torch.isfinite(rows).all())


def _whole(total: Tensor) -> Tensor:
    """The same matrix with its lower triangle filled in, in place, where the upper one of panels is there."""
    for low in range(0, len(total), PANEL):
        high = min(low + PANEL, len(total))
        corner = total[low:high, low:high]
        corner.copy_(corner.triu() + corner.triu(1).T)
        total[high:, low:high] = total[low:high, high:].T
    return total


class Forced:
    """While it lasts, every token is given to certain experts of a block, whatever the router says.

    The block's own results are worthless then. It works for experts' modules in transformers' form, whose forward is
    given ``top_k_index`` and ``top_k_weights``.
    """

    def __init__(self, block: LiveBlock, starved: Sequence[Input]) -> None:
        chosen: dict[str, set[int]] = {}
        for each in starved:
            if each.expert is not None:
                chosen.setdefault(each.expert[0], set()).add(each.expert[1])
        self._chosen = list(chosen.values())
        self._modules = [module for module in block.module.modules() if is_routed(module)]
        self._hooks: list[Any] = []

    @property
    def possible(self) -> bool:
        return len(self._modules) == len(self._chosen) == 1

    def __enter__(self) -> Forced:
        numbers = sorted(self._chosen[0])

        def to_all(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = routing(module, args, kwargs)
            index = given["top_k_index"]
            experts = torch.tensor(numbers, device=index.device).expand(len(index), -1)
            weights = given["top_k_weights"].new_full(experts.shape, 1 / len(numbers))
            return (), {**given, "top_k_index": experts, "top_k_weights": weights}

        self._hooks = [module.register_forward_pre_hook(to_all, with_kwargs=True) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def routing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module of experts was called with, by name: ``top_k_index`` and ``top_k_weights`` (tokens, k) among it."""
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def is_routed(module: nn.Module) -> bool:
    return {"top_k_index", "top_k_weights"} <= inspect.signature(module.forward).parameters.keys()


def starved(inputs: Sequence[Input], collecting: Collecting) -> list[Input]:
    """Inputs of experts that saw too few rows."""
    return [
        each for each in inputs if each.expert is not None and collecting.count(each) < max(1, ENOUGH * each.columns)
    ]
