"""What goes as a whole: layers, neurons, heads, experts, chosen before the rest is compressed.

First the layers go that change the hidden states least (`layers`); then, in each block that is left, the units that the
block's output misses least, with what stays moved to make up for them (`narrow`). What was chosen lies in the journal's
folder, whole or not at all, and the rest of the program sees the smaller model through a `View`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..checkpoint.view import View
from ..models.resize import Asked, Resize, resize
from ..recipe import Recipe
from .layers import Layers
from .narrow import Narrowing

if TYPE_CHECKING:
    from ..calibrate import Calibrator

# Makes what calibrates a model, with its hidden states in a folder.
Open = Callable[[Checkpoint, Path], "Calibrator"]
Say = Callable[[str], None]
MULTIPLE = 64  # what neurons are kept in multiples of, for the kernels' sake

__all__ = ["Open", "Shrinking"]


class Shrinking:
    """A model that is being made smaller as its recipe says under ``shrink``.

    folder: the journal's.  open: None where no data is needed.  calibrator: of the model as it was, None without data.
    found: what was chosen and what it cost, for penjing.json.
    Raises BadRecipe and Unsupported for what makes no model of the family.
    """

    def __init__(self, whole: Checkpoint, recipe: Recipe, folder: Path, open: Open | None) -> None:
        assert recipe.shrink is not None
        self.whole, self.recipe, self.asked, self.folder, self._open = whole, recipe, recipe.shrink, folder, open
        self.layers = Layers(whole, recipe.shrink)
        self.calibrator = None if open is None else open(whole, folder)
        self.budget = 0
        self.found: dict[str, Any] = {}

    def fit(self, room: int) -> dict[str, int]:
        """What choosing takes in memory, by term, in bytes; statistics are given what is left of the room."""
        narrowing = Narrowing(self._narrow(_seen(self._shorten(self.layers.first))), self.asked.method, self.folder)
        if self.calibrator is None:
            return {"one layer narrowed": narrowing.bytes_without_data()}
        from ..calibrate import needs_of_units

        its = needs_of_units(self.calibrator, narrowing.readers())
        terms = {
            "a block": its.weights,
            "one layer narrowed, or a batch": max(its.solving + its.largest, its.activations),
        }
        self.budget = max(its.largest, min(its.statistics, room - sum(terms.values())))
        return terms | {"statistics": self.budget}

    def provisional(self) -> View:
        """The smaller model before anything is chosen: its first layers and units. Names and shapes are right."""
        return _seen(self._narrow(_seen(self._shorten(self.layers.first))))

    def decide(self, say: Say, ready: Callable[[Calibrator], None]) -> View:
        """Choose, or read what was chosen before a run was killed → the smaller model.

        ready: is called with every calibrator before it is used.
        """
        if self.calibrator is not None:
            ready(self.calibrator)
        kept = self.layers.choose(self.folder / "influence.json", self.calibrator, say)
        self.found = {"layers": kept, "influence": self.layers.influence}
        shorter = _seen(self._shorten(kept))
        smaller = self._narrow(shorter)
        self.found["sizes"] = sizes = _sizes(self.whole.config, smaller.config)
        say(f"shrinking: {', '.join(f'{key} {before} → {after}' for key, (before, after) in sizes.items())}")
        if not self.asked.narrows:
            return shorter
        narrowing = Narrowing(smaller, self.asked.method, self.folder)
        calibrator = self.calibrator
        if self._open is not None and len(kept) < self.layers.count and not narrowing.finished:
            calibrator = self._open(shorter, self.folder)
            ready(calibrator)
        if calibrator is not None:
            calibrator.budget = self.budget
        pieces = narrowing.run(calibrator)
        self.found["lost"] = narrowing.lost
        return View(shorter, smaller.config, pieces)

    def _shorten(self, layers: list[int]) -> Resize:
        return resize(self.whole, Asked(tuple(layers)))

    def _narrow(self, shorter: Checkpoint) -> Resize:
        asked = self.asked
        groups = {rule.quantize.group_size for rule in self.recipe.rules if rule.quantize is not None}
        multiples = (MULTIPLE, *(size for size in groups if size > 0)) if asked.multiple is None else ()
        blocks = tuple(range(len(self.layers.first)))
        return resize(shorter, Asked(blocks, asked.neurons, asked.heads, asked.experts, asked.multiple or 1, multiples))


def _seen(smaller: Resize) -> View:
    return View(smaller.checkpoint, smaller.config, smaller.pieces({}))


def _sizes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Numbers of config.json that are other ones now."""
    old, new = (each.get("text_config") or each for each in (before, after))
    return {
        key: (old[key], value)
        for key, value in new.items()
        if type(value) is int and type(old.get(key)) is int and old[key] != value
    }
