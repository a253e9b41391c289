"""What a run takes in memory and on the disk, counted before it begins: kept, made smaller, or refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import hardware
from .checkpoint.journal import Journal
from .checkpoint.plan import CHUNK_BYTES, Plan
from .errors import OutOfBudget
from .methods import apply

if TYPE_CHECKING:
    from .calibrate import Calibrator

SMALLEST_CHUNK = 1 << 20


@dataclass(frozen=True)
class Footprint:
    """The most that a run holds at once: name of a term → bytes."""

    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.terms.items())
        return f"memory: at most {_size(self.total)} ({parts})"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"


def fit(plan: Plan, calibrator: Calibrator | None, limit: int | None) -> tuple[Plan, Footprint]:
    """A plan that keeps the limit, and what it needs at most.

    Where that helps, less is read at a time, and statistics are collected in several runs. limit: bytes; None: what
    this machine, or the control group, has left. Raises OutOfBudget with the numbers.
    """
    here = hardware.peak_memory_bytes()
    most = here + hardware.memory_available_bytes() if limit is None else limit
    chunk, found = CHUNK_BYTES, []
    while chunk >= SMALLEST_CHUNK:
        smaller = dataclasses.replace(plan, chunk_bytes=chunk)
        found.append(_footprint(smaller, calibrator, here, most))
        if found[-1].total <= most:
            return smaller, found[-1]
        chunk //= 2
    least = min(found, key=lambda each: each.total)
    what = f"memory_limit={limit} bytes" if limit is not None else f"{most} bytes of memory are available"
    hints = "smaller files (--shard-size) or a higher limit would do"
    if calibrator is not None:
        hints = f"a shorter --sequence-length, a higher limit, or a method without data would do; {least}"
    raise OutOfBudget(f"{what}: this model and recipe need {least.total} bytes at least; {hints}")


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
        from .calibrate import needs

        its = needs(calibrator, plan.rules)
        terms |= {
            "a block": its.weights,
            "one layer solved, or a batch": max(its.solving + its.largest, its.activations),
        }
        left = limit - sum(terms.values())
        calibrator.budget = max(its.largest, min(its.statistics, left))
        terms["statistics"] = calibrator.budget
    return Footprint(terms)


def check_disk(plan: Plan, journal: Journal, calibrator: Calibrator | None) -> None:
    """OutOfBudget when the files that are left to write, and the hidden states between blocks, do not fit."""
    left = sum(plan.output_bytes(shard) for shard in plan.shards if journal.finished(shard.name) is None)
    hidden = 0 if calibrator is None else 3 * calibrator.hidden_bytes()
    free = shutil.disk_usage(journal.output).free
    if left + hidden > free:
        raise OutOfBudget(f"{journal.output}: {left + hidden} bytes are needed on the disk, {free} are free")
