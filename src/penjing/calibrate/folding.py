"""Scales of transforms folded into the block itself: AWQ's and SmoothQuant's, on any block.

What makes an input is found by trial: with scales that are powers of two, which change no digit, a norm's gain or the
rows of a linear layer before are divided by them and all readers multiplied, and the block is computed. If it computes
what it did, that is where scales can be folded; if nothing does, the input is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint.storage import SCALE_NAMES
from ..methods import apply, scaling, transform
from ..methods.statistics import Statistics
from ..recipe import Rule
from .block import LiveBlock
from .inputs import Input

Floats = NDArray[np.float32]
TOLERANCE = 5e-2  # of the change that scaled readers alone make: a right place takes it back, but for rounding
LEAST = 1e-5  # of the block's output: readers that change less were not reached, and nothing can be said of them
# how a vector's parameter w stands for a gain g: as it is, or g = 1 + w
OFFSETS = (0.0, 1.0)


@dataclass(frozen=True)
class Place:
    """What makes an input: tensors of the checkpoint, each of which has the scale's width as its rows.

    offset: what is added to them before they are gains.
    """

    names: tuple[str, ...]
    offset: float


class Folder:
    """Finds places in a block, and folds scales into them.

    compute: the block's output less its input, on some tokens.  readers: weights that read an input, also those that
    no rule is for.
    """

    def __init__(self, block: LiveBlock, compute: Callable[[], Tensor]) -> None:
        self.block, self.compute = block, compute
        self.changed: set[str] = set()

    def find(self, each: Input) -> Place | None:
        """Where scales of an input can be folded; None where nothing of the block makes it column by column."""
        right = self.compute()
        probe = np.exp2(np.random.default_rng(0).integers(-1, 2, each.columns)).astype(np.float32)
        wrong = self._error(each, None, probe, right)
        if wrong < LEAST * float(torch.linalg.vector_norm(right)):
            return None
        found = (
            place for place in self._candidates(each) if self._error(each, place, probe, right) < TOLERANCE * wrong
        )
        return next(found, None)

    def _error(self, each: Input, place: Place | None, probe: Floats, right: Tensor) -> float:
        """How far the block's output is off with a scale folded into a place, or with readers that are scaled alone."""
        place = place or Place((), 0.0)
        kept = {name: self.block.get(name) for name in (*each.names, *place.names)}
        self._fold(each, place, probe)
        found = self.compute()
        for name, values in kept.items():
            self.block.set(name, values)
        return float(torch.linalg.vector_norm(found - right))

    def fold(self, each: Input, place: Place, scale: Floats) -> None:
        """Let the input be x / scale, with the same output of the block."""
        self._fold(each, place, scale)
        self.changed |= {*each.names, *place.names}

    def _fold(self, each: Input, place: Place, scale: Floats) -> None:
        for name in each.names:
            self.block.set(name, scaling.into_columns(self.block.get(name), scale))
        for name in place.names:
            values = self.block.get(name)
            gain = values.astype(np.float32) + np.float32(place.offset)
            divided = scaling.out_of_rows(gain, scale) - np.float32(place.offset)
            self.block.set(name, divided.astype(values.dtype))

    def _candidates(self, each: Input) -> Iterator[Place]:
        """Modules whose output is as wide as the input: norms, then linear layers, the nearest name first."""
        infos = self.block.graph.checkpoint.infos
        weights = [name for name in self.block.names if name.endswith(".weight") and name not in each.names]
        fitting = [name for name in weights if infos[name].shape[0] == each.columns]
        for name in sorted(fitting, key=lambda name: (len(infos[name].shape), -_shared(name, each.names[0]), name)):
            bias = f"{name.removesuffix('.weight')}.bias"
            names = (name, bias) if self.block.is_live(bias) else (name,)
            for offset in OFFSETS if len(infos[name].shape) == 1 else (0.0,):
                if offset == 0 or len(names) == 1:
                    yield Place(names, offset)


def _shared(one: str, two: str) -> int:
    """Parts that two names have in common at their beginnings."""
    parts = zip(one.split("."), two.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(parts) if a != b), 0)


def scale_for(block: LiveBlock, each: Input, statistics: Statistics, rules: Mapping[str, Rule]) -> Floats | None:
    """The scale that the readers' transform finds for an input; None where their rules name none, or not the same."""
    named = {rules[module].transform for module in each.modules}
    if len(named) != 1 or None in named:
        return None
    rule = rules[each.modules[0]]
    assert rule.transform is not None
    dtype = SCALE_NAMES[block.graph.checkpoint.infos[each.names[0]].step_dtype]
    weights: Sequence[NDArray[np.float32]] = [block.get(f"{module}.weight") for module in each.modules]
    found: Floats = transform(rule.transform.method).solve(weights, statistics, apply.transform_config(rule, dtype))
    return found
