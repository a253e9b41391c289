"""A job of `penjing compress` before its loop: all that is known of it from headers, and what is chosen by data.

What it writes and what it takes is settled once, for the model as it will be. Where that gets smaller first, names and
shapes are known before what goes is chosen: a run that memory has no room for is refused before hours of choosing, and
what decides the bytes, the batch among it, is in the journal's identity before any are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, budget
from .checkpoint import Checkpoint
from .checkpoint.folder import CONFIG, INDEX
from .checkpoint.journal import ARTIFACT, fingerprint
from .checkpoint.plan import Plan, make_plan
from .errors import BadRecipe, Unsupported
from .footprint import fit, fit_shrinking
from .methods import apply
from .models.tokenizer import Tokenizer
from .overlap import sketch
from .recipe import Recipe, Rule
from .rotate import Rotated
from .shrink import Shrinking

if TYPE_CHECKING:
    from .calibrate import Calibrator

Report = Callable[[float, float], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Text:
    """What is calibrated on, and where: files, rows, their length, the seed that chooses them, and the device.

    None stands for what `calibrate.Calibration` takes by itself.
    """

    files: tuple[Path, ...]
    samples: int | None
    length: int | None
    seed: int
    device: str

    def open(self, seen: Checkpoint, rules: Mapping[str, Rule], folder: Path) -> Calibrator:
        """What gives methods the statistics that they need of a model; its hidden states lie in the folder."""
        try:
            from .calibrate import Calibration, open_calibrator
        except ModuleNotFoundError as error:
            raise Unsupported(
                f"methods that need calibration compute with {error.name}: pip install 'penjing[compress]';"
                " rtn and hqq, l1, l2 and random need no data"
            ) from None
        calibration = Calibration(self.files, self.samples, self.length, self.seed)
        return open_calibrator(seen, calibration, rules, folder, self.device)


class Job:
    """What a run does to a checkpoint, and what it takes.

    folder: the journal's.  bitmask, shard_bytes: see `compress`.  limit: bytes of memory; None is what there is.
    plan, calibrator: of the model as it will be; where it shrinks, of its provisional form until `begin`.  footprint:
    the most that all of it takes.  Raises OutOfBudget where that is too much, BadRecipe and Unsupported.
    """

    def __init__(
        self,
        whole: Checkpoint,
        recipe: Recipe,
        folder: Path,
        text: Text,
        bitmask: bool,
        shard_bytes: int,
        limit: int | None,
    ) -> None:
        for rule in recipe.rules:
            apply.check(rule)
            if recipe.recover is not None and rule.quantize is not None and rule.quantize.format != "int":
                raise BadRecipe(f"recover: it trains integers; leave it out with format={rule.quantize.format}")
        self.whole, self.recipe, self.folder, self.text, self.limit = whole, recipe, folder, text, limit
        self._bitmask, self._shard_bytes = bitmask, shard_bytes
        self._shrinking = self._open_shrinking()
        seen = self._rotated(whole if self._shrinking is None else self._shrinking.provisional())
        self.plan, self.calibrator, self.footprint = fit(*self._open(seen), limit)
        self._measuring = self._open_measuring(seen)
        if self._measuring is not None:
            on_trial = dataclasses.replace(self.plan, rules=dict.fromkeys(self.plan.rules, budget.TRIAL))
            self.footprint = self.footprint.at_least(fit(on_trial, self._measuring, limit)[2])
        if self._shrinking is not None:
            self.footprint = self.footprint.at_least(fit_shrinking(self._shrinking, limit))

    def _open_shrinking(self) -> Shrinking | None:
        """What makes the model smaller before it is compressed, where the recipe asks for it."""
        if self.recipe.shrink is None:
            return None
        with_data = self.recipe.shrink.needs_data
        open = (lambda seen, at: self.text.open(seen, {}, at)) if with_data else None
        return Shrinking(self.whole, self.recipe, self.folder, open)

    def _rotated(self, seen: Checkpoint) -> Checkpoint:
        """A model along the axes that the recipe's seed draws, where it asks for that; the same stream for all."""
        return Rotated(seen, self.recipe.seed) if self.recipe.rotate else seen

    def _open(self, seen: Checkpoint) -> tuple[Plan, Calibrator | None]:
        """The plan for a model and, where a method needs data, what calibrates it."""
        plan = make_plan(seen, self.recipe, bitmask=self._bitmask, shard_bytes=self._shard_bytes)
        recovered = self.recipe.recover is not None
        watched = self.recipe.kv_cache is not None
        if not recovered and not watched and not any(apply.needs(rule) for rule in plan.rules.values()):
            return plan, None
        calibrator = self.text.open(seen, plan.rules, self.folder)
        _check_static_inputs(plan, calibrator)
        if watched:
            calibrator.watch_cache()
        if recovered:
            self._teach(calibrator)
        return plan, calibrator

    def _open_measuring(self, seen: Checkpoint) -> Calibrator | None:
        """What a budget is measured by, where one needs data."""
        if not any(budget.needs_data(rule) for rule in budget.measured(self.plan.rules)):
            return None
        calibrator = self.text.open(seen, {}, self.folder / "budget")
        budget.ask(calibrator, self.plan.rules)
        return calibrator

    def _teach(self, calibrator: Calibrator) -> None:
        """Give a calibrator the original to be like, at the ends of the layers that stay."""
        from .calibrate.distil import may_distil
        from .calibrate.recover import Teacher

        assert self.recipe.recover is not None
        asked = self.recipe.recover
        original = self.text.open(self._rotated(self.whole), {}, self.folder / "teacher")
        if asked.distill and self.recipe.kv_cache is None and may_distil(calibrator) and may_distil(original):
            calibrator.original = original
        if not asked.epochs:
            return
        shrinking, every = self._shrinking, range(len(original.order))
        layers = every if shrinking is None else shrinking.found.get("layers", shrinking.layers.first)
        calibrator.teacher = Teacher(original, [*layers, len(original.order)][1:], asked)
        calibrator.collect({})

    @property
    def calibrated(self) -> Calibrator | None:
        """Who sees the text first."""
        if self.calibrator is None and self._shrinking is not None and self._shrinking.calibrator is not None:
            return self._shrinking.calibrator
        return self.calibrator or self._measuring

    @property
    def calibrators(self) -> list[Calibrator]:
        """All that see the text, one after another: choosing what goes, measuring for a budget, compressing."""
        first = None if self._shrinking is None else self._shrinking.calibrator
        return [each for each in (first, self._measuring, self.calibrator) if each is not None]

    def calibrated_text(self) -> list[int]:
        """The sketch of the text that is calibrated on (see `overlap`); empty for the model's own."""
        if self.calibrated is None or self.calibrated.own is not None:
            return []
        tokenizer = Tokenizer(self.whole.path)
        return sketch(tokenizer.decode(row) for row in self.calibrated.tokens.tolist())

    @property
    def shrunk(self) -> dict[str, Any] | None:
        """What went as a whole and what that cost, once it was chosen."""
        return None if self._shrinking is None else self._shrinking.found

    @property
    def undistilled(self) -> str | None:
        """Why the model is not trained as a whole, where that was asked for."""
        asked = self.recipe.recover
        if asked is None or not asked.distill or self.calibrator is None or self.calibrator.original is not None:
            return None
        if self.recipe.kv_cache is not None:
            return (
                f"{self.whole.path}: distill is left out, because it would move what steps of the cache were found for"
            )
        from .calibrate.distil import may_distil

        fits = "it and its original do not fit in memory as a whole"
        graph = "transformers' graph of it gives no probabilities, or not from tensors as they are stored"
        return f"{self.whole.path}: distill is left out, because {fits if may_distil(self.calibrator) else graph}"

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on; with calibration also what that depends on."""
        identity: dict[str, Any] = {
            "model": fingerprint(self.whole),
            "recipe": self.recipe.to_json(),
            "storage": "bitmask" if self.plan.bitmask else "dense",
            "files": [shard.name for shard in self.plan.shards],
            "version": __version__,
        }
        if self._measuring is not None:
            identity["budget_batch"] = self._measuring.batch
        if self.calibrator is not None and self.recipe.recover is not None and self.recipe.recover.distill:
            identity["distilled"] = self.calibrator.original is not None
        return identity if self.calibrated is None else identity | self.calibrated.identity()

    @property
    def files(self) -> list[str]:
        """Every name that a run writes into the folder."""
        shards = [shard.name for shard in self.plan.shards]
        index = [INDEX] if len(shards) > 1 else []
        return [*shards, *index, *self.whole.side_files, ARTIFACT, CONFIG]

    def begin(self, report: Report, say: Say) -> None:
        """Choose what goes, or read what was chosen before a run was killed; have the text that the model writes.

        Then each layer's share of a sparsity is decided, where the recipe asks for that.
        """
        if self.calibrated is not None and (own := self.calibrated.own) is not None:
            say(
                f"NO CALIBRATION TEXT: the model writes {own.samples} × {own.length} tokens itself;"
                " --calibration FILE with text like what it will see would be better"
            )
        if self._shrinking is not None:
            chosen = self._shrinking.decide(say, lambda each: each.prepare(self.limit, report))
            self._follow(self._rotated(chosen))
        if self.calibrator is not None:
            self.calibrator.prepare(self.limit, report)
        self._share_out(report, say)

    def _share_out(self, report: Report, say: Say) -> None:
        """Decide each layer's share of a sparsity, on the same text as all the rest."""
        if (measuring := self._measuring) is not None:
            measuring.folder.mkdir(exist_ok=True)
            first = self.calibrated or measuring
            if first is measuring:
                first.prepare(self.limit, report)
            measuring.tokens = first.tokens
        rules = budget.decide(self.plan, self._measuring, say)
        self.plan = dataclasses.replace(self.plan, rules=rules)
        if self.calibrator is not None:
            self.calibrator.rules = rules

    def _follow(self, chosen: Checkpoint) -> None:
        """The same job on what was chosen: alike in every shape, it takes what was found that it takes.

        It is not fitted again: memory that choosing has given back would be counted twice, and another batch would
        give other bytes than the identity says.
        """
        before, settled = self.calibrator, self.plan.chunk_bytes
        plan, self.calibrator = self._open(chosen)
        self.plan = dataclasses.replace(plan, chunk_bytes=settled)
        if self.calibrator is not None and before is not None:
            self.calibrator.go_as(before)
        if (measured := self._measuring) is not None:
            self._measuring = self._open_measuring(chosen)
            assert self._measuring is not None
            self._measuring.go_as(measured)


def _check_static_inputs(plan: Plan, calibrator: Calibrator) -> None:
    """BadRecipe for a layer that no block shows the input of, where its step is to be found by that."""
    seen = {name for block in calibrator.order for name in calibrator.wanted(block)}
    for module, rule in plan.rules.items():
        if apply.static_inputs(rule) and f"{module}.weight" not in seen:
            raise BadRecipe(
                f"activations=fp8-static: {module} lies outside the blocks that calibration goes through, so its input"
                " is not seen; ignore it, or give it a rule with activations=fp8"
            )
