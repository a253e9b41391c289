"""Which share of each layer's weights goes, where the recipe gives a mean for all: measured before the run.

outliers      OWL: blocks with more outliers keep more
sensitivity   blocks whose output suffers more keep more: each is pruned alone to several shares, and run
global        one threshold for the scores of all weights

The two first see every block of the original on the calibration text, and measure it over all of its modules whose
rules ask for that. Scores are |w| · ‖x‖, or |w| for a pruner that needs no data. What was measured of a block is noted
in a folder of the journal's, whole or not at all: a run that was killed finds it there, and shares out as before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .checkpoint.atomic import write_json
from .checkpoint.blocks import layer_of
from .checkpoint.plan import Plan
from .methods import budgets, pruner, wanda
from .methods.statistics import Statistics
from .recipe import Prune, Rule

if TYPE_CHECKING:
    from .calibrate import Calibrator, OpenBlock

# Shares that a block is pruned to on trial; from one to the next its loss is taken as linear.
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, budgets.MOST)
LEAST = 1e-6  # a share that removes nothing, for methods that take none of 0
TRIAL = Rule(("*",), prune=Prune("wanda"))  # what measuring takes of memory, at most


def measured(rules: Mapping[str, Rule]) -> dict[Rule, list[str]]:
    """Rules that give a mean to be shared out → their modules, in order."""
    found: dict[Rule, list[str]] = {}
    for module, rule in sorted(rules.items()):
        if rule.prune is not None and rule.prune.budget != "uniform":
            found.setdefault(rule, []).append(module)
    return found


def needs_data(rule: Rule) -> bool:
    """Must the input of the rule's modules be known to share out its mean?"""
    prune = rule.prune
    assert prune is not None
    return prune.budget != "global" or bool(pruner(prune.method).NEEDS)


def ask(calibrator: Calibrator, rules: Mapping[str, Rule]) -> None:
    """Have a calibrator without rules of its own collect what `decide` reads."""
    modules = [module for rule, some in measured(rules).items() if needs_data(rule) for module in some]
    calibrator.exact = True
    calibrator.collect({f"{module}.weight": ("input_norm",) for module in modules})


def decide(plan: Plan, calibrator: Calibrator | None, say: Callable[[str], None]) -> dict[str, Rule]:
    """Module → its rule, with the share that is its own.  calibrator: see `ask`; None where no rule needs data."""
    rules, asked = dict(plan.rules), measured(plan.rules)
    notes = _notes(plan, asked, calibrator, say) if asked else {}
    for rule, modules in asked.items():
        assert rule.prune is not None
        by_module = rule.prune.budget == "global"
        groups: dict[str, list[str]] = {}
        for module in modules:
            unit = module if by_module else layer_of(module)
            groups.setdefault(unit if unit in notes[rule.prune.budget] else "", []).append(module)
        outside = groups.pop("", [])  # what no text came to keeps the mean
        shares = _shares(rule.prune, [notes[rule.prune.budget][unit] for unit in groups], _sizes(plan, groups))
        say(f"budget {rule.prune.budget}: {_said(shares)}")
        given = {module: share for unit, share in zip(groups, shares, strict=True) for module in groups[unit]}
        for module in [*given, *outside]:
            share = min(max(float(given.get(module, rule.prune.sparsity)), LEAST), budgets.MOST)
            prune = dataclasses.replace(rule.prune, sparsity=share, budget="uniform")
            rules[module] = dataclasses.replace(rule, prune=prune)
    return rules


def _said(shares: NDArray[np.float64]) -> str:
    return (
        f"{shares.min():.1%} to {shares.max():.1%} of each of {len(shares)} go" if len(shares) else "nothing to share"
    )


def _sizes(plan: Plan, groups: Mapping[str, list[str]]) -> list[int]:
    return [sum(plan.weight(module).size for module in modules) for modules in groups.values()]


def _shares(prune: Prune, values: Sequence[Any], sizes: Sequence[int]) -> NDArray[np.float64]:
    if not values:
        return np.zeros(0)
    if prune.budget == "outliers":
        return budgets.by_outliers(values, sizes, prune.sparsity)
    if prune.budget == "sensitivity":
        return budgets.by_sensitivity(SHARES, np.array(values), sizes, prune.sparsity)
    return budgets.by_threshold(np.array([_dense(value) for value in values]), prune.sparsity)


def _notes(
    plan: Plan, asked: Mapping[Rule, list[str]], calibrator: Calibrator | None, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Budget → block or module → what was measured of it."""
    found: dict[str, dict[str, Any]] = {}
    kinds = {module: rule for rule, modules in asked.items() for module in modules}
    with_data = {module: rule.prune.budget for module, rule in kinds.items() if rule.prune and needs_data(rule)}
    for module, rule in kinds.items():
        found.setdefault(rule.prune.budget if rule.prune else "", {})
        if module not in with_data:
            found["global"][module] = _sparse(_counts(plan, module))
    if calibrator is None:
        return found
    say(f"measuring {len(calibrator.order)} blocks for the budget")
    for number, block in enumerate(calibrator.order):
        note = calibrator.folder / f"budget-{number:05}.json"
        if not note.exists():
            calibrator.forget_before(block)
            write_json(note, _measure(calibrator, block, with_data))
        for budget, values in json.loads(note.read_text()).items():
            found[budget] |= values
    calibrator.forget_all()
    return found


def _counts(plan: Plan, module: str) -> NDArray[np.int64]:
    """The histogram of a weight's magnitudes."""
    counts = np.zeros(budgets.BINS, np.int64)
    for rows in plan.row_ranges(plan.weight(module)):
        counts += budgets.histogram(budgets.scores(plan.checkpoint.read(f"{module}.weight", rows), None))
    return counts


def _measure(calibrator: Calibrator, block: str, kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What the budgets want to know of a block, which is passed on as it is.  kinds: module → budget."""
    found: dict[str, dict[str, Any]] = {}
    with calibrator.open(block, lambda _: None) as opened:
        norms = {module: its["input_norm"] for each, its in opened.inputs() for module in each.modules}

        def of(kind: str) -> list[str]:
            return [module for module in norms if kinds.get(module) == kind]

        for module in of("global"):
            counts = budgets.histogram(budgets.scores(opened.get(f"{module}.weight"), norms[module]))
            found.setdefault("global", {})[module] = _sparse(counts)
        if some := of("outliers"):
            ratio = budgets.outlier_ratio(lambda: ((opened.get(f"{m}.weight"), norms[m]) for m in some))
            found["outliers"] = {block: ratio}
        if some := of("sensitivity"):
            found["sensitivity"] = {block: _losses(opened, calibrator.checkpoint, {m: norms[m] for m in some})}
        opened.advance()
    return found


def _losses(opened: OpenBlock, whole: Checkpoint, norms: Mapping[str, NDArray[Any]]) -> list[float]:
    """What a block's output is off by at each of `SHARES`, as a share of it, pruned by Wanda: on one batch."""
    rows = opened.batches()[0]
    right, losses = opened.run(rows), [0.0]
    size = float(right.double().square().sum())
    for share in SHARES[1:]:
        config = wanda.Config(share)
        for module, norm in norms.items():
            weight = whole.read(f"{module}.weight")
            opened.set(f"{module}.weight", wanda.solve(weight, Statistics({"input_norm": norm}), config))
        losses.append(float((opened.run(rows) - right).double().square().sum()) / max(size, 1e-30))
    for module in norms:
        opened.set(f"{module}.weight", whole.read(f"{module}.weight"))
    return losses


def _sparse(counts: NDArray[Any]) -> list[list[int]]:
    """A histogram as the places and heights of its bins that are not empty."""
    places = np.flatnonzero(counts)
    return [places.tolist(), counts[places].tolist()]


def _dense(sparse: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    counts = np.zeros(budgets.BINS, np.int64)
    counts[sparse[0]] = sparse[1]
    return counts
