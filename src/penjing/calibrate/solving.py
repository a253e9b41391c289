"""A block compressed on what comes into its layers: solved, judged against plain rounding, and passed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.affine import AffineTensor
from ..methods import apply
from ..methods.statistics import Statistics
from ..recipe import Rule
from .stream import OpenBlock

Solution = NDArray[Any] | AffineTensor
Verdict = dict[str, Any]
# How a weight is solved by a rule: (rule, module, weight, statistics) → the solution
Solve = Callable[[Rule, str, NDArray[Any], Statistics], Solution]


def compress_block(
    block: OpenBlock, modules: Sequence[str], rules: Mapping[str, Rule], solve: Solve
) -> Iterator[tuple[str, Solution, Verdict]]:
    """Each module of an open block with its solution and what that loses; then the block is passed on, compressed.

    A verdict has ``loss`` and ``plain_loss`` where a hessian was collected (see `apply.judge`), ``kept_plain`` where
    the solution was worse than rounding, which stands in its place, and ``uncalibrated`` where no input was seen.
    """
    done: dict[str, Solution] = {}
    for each, statistics in block.inputs():
        for module in each.modules:
            weight = block.get(f"{module}.weight")
            solved, verdict = _best(rules[module], module, weight, statistics, solve)
            if module in block.plain_losses:  # of the weight as it was before its transform
                verdict["plain_loss"] = block.plain_losses[module]
            done[module] = solved
            yield module, solved, verdict
    for module in modules:
        if module not in done:
            rule = rules[module]
            blind = bool(apply.needs(rule))
            rule = apply.plain(rule) if blind else rule
            done[module] = solve(rule, module, block.get(f"{module}.weight"), Statistics())
            yield module, done[module], {"uncalibrated": True} if blind else {}
    for module in list(done):
        solved = done.pop(module)
        block.set(f"{module}.weight", solved if isinstance(solved, np.ndarray) else solved.decode())
    block.advance()


def _best(
    rule: Rule, module: str, weight: NDArray[Any], statistics: Statistics, solve: Solve
) -> tuple[Solution, Verdict]:
    solved = solve(rule, module, weight, statistics)
    if "hessian" not in statistics:
        return solved, {}
    verdict: Verdict = dict(apply.judge(weight, solved, statistics, rule))
    if verdict["loss"] > verdict["plain_loss"]:
        return solve(apply.plain(rule), module, weight, Statistics()), verdict | {"kept_plain": True}
    return solved, verdict
