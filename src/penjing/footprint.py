"""What a run takes in memory and on the disk, counted before it begins: kept, made smaller, or refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import hardware
from .checkpoint.journal import Journal
from .checkpoint.plan import CHUNK_BYTES, SLACK_BYTES, Plan
from .errors import OutOfBudget
from .methods import apply

if TYPE_CHECKING:
    from .calibrate import Calibrator
    from .shrink import Shrinking

SMALLEST_CHUNK = 1 << 20


@dataclass(frozen=True)
class Footprint:
    """The most that a run holds at once: name of a term → bytes."""

    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    def at_least(self, other: Footprint) -> Footprint:
        """The larger of two, which are not there at the same time."""
        return max(self, other, key=lambda each: each.total)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.terms.items())
        return f"memory: at most {_size(self.total)} ({parts})"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"


def fit(plan: Plan, calibrator: Calibrator | None, limit: int | None) -> tuple[Plan, Calibrator | None, Footprint]:
    """A plan that keeps the limit, its calibrator, and what both need at most.

    Where that helps, less is read at a time, the text goes through a block twice and is not held in it, statistics are
    collected in several runs, less text goes through at a time, and the model is not trained as a whole in the end.
    limit: bytes; None: what this machine, or the control group, has left. Raises OutOfBudget with the numbers.
    """
    here, most = _limits(limit)
    found = []
    for original, hold, batch in _ways(calibrator):
        if calibrator is not None:
            calibrator.original, calibrator.batch, calibrator.at_once = original, batch, hold
        # without a limit what is not needed may take half of the machine: other programs are no reason for other bytes
        more = hold or original is not None
        enough = min(most, hardware.memory_limit_bytes() // 2) if more and limit is None else most
        chunk = CHUNK_BYTES
        while chunk >= SMALLEST_CHUNK:
            smaller = dataclasses.replace(plan, chunk_bytes=chunk)
            found.append(_footprint(smaller, calibrator, here, most))
            if found[-1].total <= enough:
                return smaller, calibrator, found[-1]
            chunk //= 2
    least = min(found, key=lambda each: each.total)
    hints = "smaller files (--shard-size) or a higher limit would do"
    if calibrator is not None:
        hints = f"a shorter --sequence-length, a higher limit, or a method without data would do; {least}"
    raise OutOfBudget(f"{_said(limit, most)}: this model and recipe need {least.total} bytes at least; {hints}")


def _ways(calibrator: Calibrator | None) -> list[tuple[Calibrator | None, bool, int]]:
    """Whom the whole is trained to be like, is all of the text held in the middle of a block, and how many rows go
    through at a time; the best and the fastest first."""
    if calibrator is None:
        return [(None, False, 0)]
    ways = [(False, batch) for batch in calibrator.batches]
    ways = [(True, calibrator.batches[0]), *ways] if calibrator.may_hold else ways
    return [(original, *way) for original in dict.fromkeys((calibrator.original, None)) for way in ways]


def _limits(limit: int | None) -> tuple[int, int]:
    """What the interpreter takes, and what all together may take."""
    here = hardware.peak_memory_bytes()
    return here, here + hardware.memory_available_bytes() if limit is None else limit


def _said(limit: int | None, most: int) -> str:
    return f"memory_limit={limit} bytes" if limit is not None else f"{most} bytes of memory are available"


def fit_shrinking(shrinking: Shrinking, limit: int | None) -> Footprint:
    """What choosing what goes takes at most; OutOfBudget with the numbers when the limit is below that."""
    here, most = _limits(limit)
    terms = {"interpreter": here, "files and parts": SLACK_BYTES}
    found = Footprint(terms | shrinking.fit(most - sum(terms.values())))
    if found.total > most:
        raise OutOfBudget(
            f"{_said(limit, most)}: shrinking this model needs {found.total} bytes at least; a shorter"
            f" --sequence-length, a higher limit, or the method l2, which needs no data, would do; {found}"
        )
    return found


def _footprint(plan: Plan, calibrator: Calibrator | None, here: int, limit: int) -> Footprint:
    """The terms for one size of parts; gives the calibrator what the limit leaves for its statistics."""
    plainly = {
        module: apply.by_rows(plan.rules[module])
        for shard in plan.shards
        for block in shard.blocks
        if calibrator is None or not calibrator.needed(block.name)
        for module in (name.removesuffix(".weight") for name in block.tensors)
        if module in plan.rules
    }
    terms = {"interpreter": here, "files and parts": plan.memory_bytes(plainly)}
    if calibrator is not None:
        from .calibrate import distil_bytes, needs, recovery_bytes

        its = needs(calibrator, plan.rules)
        terms |= {
            "a block": its.weights,
            "one layer solved, or a batch": max(its.solving, its.activations),
        }
        if calibrator.teacher is not None:
            terms["recovery"] = recovery_bytes(calibrator)
        if calibrator.at_once:
            terms["text held in a block"] = its.held
        left = limit - sum(terms.values())
        calibrator.budget = its.largest if calibrator.at_once else max(its.largest, min(its.statistics, left))
        terms["statistics"] = calibrator.budget
        if calibrator.original is not None and plan.recipe.recover is not None:
            whole = {"both models, trained": distil_bytes(calibrator, plan.recipe.recover)}
            first = {name: terms[name] for name in ("interpreter", "files and parts")}
            return Footprint(terms).at_least(Footprint(first | whole))
    return Footprint(terms)


def check_disk(plan: Plan, journal: Journal, calibrators: Sequence[Calibrator]) -> None:
    """OutOfBudget when the files that are left to write, and the hidden states between blocks, do not fit.

    calibrators: of the run's parts, which follow one another and leave no hidden states behind.
    """
    left = sum(plan.output_bytes(shard) for shard in plan.shards if journal.finished(shard.name) is None)
    if any(each.original is not None for each in calibrators):  # new files beside the old ones
        left += sum(plan.output_bytes(shard) for shard in plan.shards)
    hidden = max(((3 if each.teacher is None else 5) * each.hidden_bytes() for each in calibrators), default=0)
    free = shutil.disk_usage(journal.output).free
    if left + hidden > free:
        raise OutOfBudget(f"{journal.output}: {left + hidden} bytes are needed on the disk, {free} are free")
