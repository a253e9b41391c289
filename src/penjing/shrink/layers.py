"""Which layers of a model go: those that are named, or those of the least influence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint import Checkpoint
from ..checkpoint.atomic import write_json
from ..errors import BadRecipe
from ..models.families import read_family
from ..recipe import Shrink

if TYPE_CHECKING:
    from ..calibrate import Calibrator


class Layers:
    """count: of the model's layers.  first: the numbers of those that stay as long as nothing was measured.

    influence: what was measured of each, None where nothing had to be.
    """

    def __init__(self, whole: Checkpoint, asked: Shrink) -> None:
        config = read_family(whole, whole.config)
        self.count = config.layers
        self.named = asked.layers if isinstance(asked.layers, tuple) else ()
        self.gone = asked.layers if isinstance(asked.layers, int) else len(asked.layers)
        self.influence: list[float] | None = None
        if self.gone >= self.count or any(number >= self.count for number in self.named):
            raise BadRecipe(
                f"layers={asked.layers}: the model has {self.count}, numbered from 0, of which one at least must stay"
            )
        shapes = {tuple(linear.shape for linear in block.linears) for block in config.blocks}
        if self.measured and len(shapes) > 1:
            raise BadRecipe(
                f"layers={asked.layers}: the layers of this model differ in size; name those that go: [4, 7]"
            )
        self.first = [number for number in range(self.count) if number not in self.named]
        self.first = self.first[: self.count - self.gone]

    @property
    def measured(self) -> bool:
        """Must influence be measured?"""
        return self.gone > 0 and not self.named

    def choose(self, note: Path, calibrator: Calibrator | None, say: Callable[[str], None]) -> list[int]:
        """The numbers of the layers that stay.  note: where influences are kept as they are measured."""
        if not self.measured:
            return self.first
        self.influence = scores = self._measure(note, calibrator, say)
        least = sorted(np.argsort(scores, kind="stable")[: self.gone].tolist())
        say(f"layers {', '.join(f'{number} ({scores[number]:.3f})' for number in least)} go: of the least influence")
        return [number for number in range(self.count) if number not in least]

    def _measure(self, note: Path, calibrator: Calibrator | None, say: Callable[[str], None]) -> list[float]:
        scores: list[float] = json.loads(note.read_text()) if note.exists() else []
        if len(scores) == self.count or calibrator is None:
            return scores
        from ..calibrate.influence import block_influence

        say(f"measuring the influence of {self.count} layers")
        calibrator.collect({})
        for block in calibrator.order[len(scores) :]:
            calibrator.forget_before(block)
            scores.append(block_influence(calibrator, block))
            write_json(note, scores)
        calibrator.forget_all()
        return scores
