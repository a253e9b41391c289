"""A block compressed on what comes into its layers: solved, judged against plain rounding, and passed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..methods import apply
from ..methods.apply import Solution
from ..methods.statistics import Statistics
from ..recipe import Rule
from .stream import OpenBlock

Verdict = dict[str, Any]
# How a weight is solved by a rule: (rule, module, weight, statistics) → the solution
Solve = Callable[[Rule, str, NDArray[Any], Statistics], Solution]


def compress_block(
    block: OpenBlock,
    modules: Sequence[str],
    rules: Mapping[str, Rule],
    solve: Solve,
    recovery: Callable[[Mapping[str, Solution]], Mapping[str, Solution]] | None = None,
) -> list[tuple[str, Solution, Verdict]]:
    """Each module of an open block with its solution and what that loses; the block is passed on, compressed.

    recovery: is given the solutions while the block computes with them → those that it trained to something better.

    A verdict has ``loss`` and ``plain_loss`` where a hessian or norms of the input were collected (see `apply.judge`),
    ``kept_plain`` where the solution was worse than rounding, which stands in its place, ``uncalibrated`` where no
    input was seen, and ``clipped``, the share of weights that its steps do not reach; ``largest_input`` where a rule
    wants a step for the input.
    """
    done: dict[str, Solution] = {}
    verdicts: dict[str, Verdict] = {}

    def put(module: str) -> None:
        solved = done[module]
        block.set(f"{module}.weight", solved if isinstance(solved, np.ndarray) else solved.decode())

    def without_data(some: Iterable[str]) -> None:
        for module in some:
            rule = rules[module]
            blind = bool(apply.needs(rule))
            rule = apply.plain(rule) if blind else rule
            weight = block.get(f"{module}.weight")
            done[module] = solve(rule, module, weight, Statistics())
            verdicts[module] = _with_clipped({"uncalibrated": True} if blind else {}, rule, weight, done[module])
            if block.in_turn:
                put(module)

    block.prepare(in_turn=recovery is None)
    without_data(module for module in modules if not apply.needs(rules[module]))
    for each, statistics in block.inputs():
        for module in each.modules:
            weight = block.get(f"{module}.weight")
            solved, verdict = _best(rules[module], module, weight, statistics, solve)
            if module in block.plain_losses:  # of the weight as it was before its transform
                verdict["plain_loss"] = block.plain_losses[module]
            if apply.static_inputs(rules[module]):
                verdict["largest_input"] = float(statistics["absmax"].max())
            done[module] = solved
            verdicts[module] = _with_clipped(verdict, rules[module], weight, solved)
            if block.in_turn:
                put(module)
    without_data(module for module in modules if module not in done)
    if not block.in_turn:
        for module in done:
            put(module)
    if recovery is not None:
        done |= recovery(done)
    block.advance()
    return [(module, done[module], verdict) for module, verdict in verdicts.items()]


def _with_clipped(verdict: Verdict, rule: Rule, weight: NDArray[Any], solved: Solution) -> Verdict:
    return verdict | {"clipped": apply.clipped(weight, solved)} if apply.clips(rule) else verdict


def _best(
    rule: Rule, module: str, weight: NDArray[Any], statistics: Statistics, solve: Solve
) -> tuple[Solution, Verdict]:
    solved = solve(rule, module, weight, statistics)
    if "hessian" not in statistics and "input_norm" not in statistics:
        return solved, {}
    verdict: Verdict = dict(apply.judge(weight, solved, statistics, rule))
    if verdict["loss"] > verdict["plain_loss"]:
        return solve(apply.plain(rule), module, weight, Statistics()), verdict | {"kept_plain": True}
    return solved, verdict
