"""Columns decided on one after the other, each error made up for by the columns to come; then by all of them.

`Forward` goes once through the columns in the order of a `linalg.Factor` (GPTQ, SparseGPT, their joint form). `Descent`
goes on from there: cyclic coordinate descent on the same loss, as in QuantEase (Behdin et al., 2023), where a column is
decided on again with the errors of all others known; no step of it can raise the loss, but for the rounding of its
slope. Work between blocks of columns is a matrix product, the most of it for several blocks at once; what goes on
inside a block is `kernels.settle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from .. import kernels
from .linalg import ENOUGH_DAMPING, Factor
from .statistics import evenly

Floats = NDArray[np.float32]
# As `kernels.settle`, on integers, floats or neither: (base, coupling, reference, kept, steps) → codes, errors
Settle = Callable[..., tuple[Any, Floats]]
BLOCK = 128
# Columns whose part of the errors outside of them is found at once: few rows multiply at a third of the speed.
WIDE = 512
# A part of the loss: where columns that go where a rounded slope shows them would lose more, slopes are not rounded.
DOUBT = 0.1


def by_columns(weight: NDArray[Any], order: NDArray[np.int64] | None = None) -> Floats:
    """A weight (out, in) as float32 (in, out), its columns in that order."""
    turned = weight.T if order is None else weight.T[order]
    return np.ascontiguousarray(turned, np.float32)


def blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `BLOCK` columns that cross no border of groups."""
    for first in range(0, columns, group):
        for start in range(first, min(first + group, columns), BLOCK):
            yield start, min(start + BLOCK, first + group, columns)


class Ahead:
    """Blocks of aᵀe, in order, while e (in, out) changes in the columns that were asked for last: float32.

    What does not change meanwhile is found for `WIDE` columns at once.
    """

    def __init__(self, a: Floats, e: Floats) -> None:
        self._a, self._e = a, e
        self._wide, self._last, self._others = slice(0, 0), 0, e[:0]

    def product(self, start: int, stop: int, rows: int) -> Floats:
        """Columns [start, stop) of a, transposed, times e; e is zero but for its first rows: (stop − start, out)."""
        if start < self._last or stop > self._wide.stop:
            self._wide = slice(start, min(max(stop, start + WIDE), len(self._e)))
            own = self._e[self._wide].copy()
            self._e[self._wide] = 0
            self._others = self._a[:rows, self._wide].T @ self._e[:rows]
            self._e[self._wide] = own
        self._last = start
        within = slice(self._wide.start, min(self._wide.stop, rows))
        found: Floats = self._a[within, start:stop].T @ self._e[within]
        found += self._others[start - self._wide.start : stop - self._wide.start]
        return found


class InPairs:
    """As `Ahead`, rounded to bfloat16 and multiplied in pairs: at 2.2 times the speed, with no need to go ahead."""

    def __init__(self, a: Floats, e: Floats) -> None:
        self._a, self._e, self._packed, self._asked = a, e, kernels.PairMatrix(e), (0, 0)

    def product(self, start: int, stop: int, rows: int) -> Floats:
        self._packed.put(self._e, *self._asked)
        self._asked = start, stop
        return self._packed.product(self._a[:rows], start, stop)


class Forward:
    """weight: (in, out), columns in the factor's order; error = weight − what was settled, the same shape.

    What errors move is summed in pairs where damping keeps a column from being moved far: then a layer's loss is
    0.998 to 1.002 × what it is by float32 (the demo's layers at 3 and 4 bits; 1.0000 in the mean).
    """

    def __init__(self, weight: Floats, factor: Factor, settle: Settle = kernels.settle) -> None:
        self.weight, self.unit, self._settle = weight, factor.unit, settle
        self.error = np.zeros_like(weight)
        pairs = kernels.has_pairs() and factor.damping >= ENOUGH_DAMPING
        self._sums = (InPairs if pairs else Ahead)(factor.unit, self.error)

    def base(self, start: int, stop: int) -> Floats:
        """Columns [start, stop) moved by the errors of all before them, which are settled: (stop − start, out)."""
        moved = self._sums.product(start, stop, start)
        moved += self.weight[start:stop]
        return moved

    def best(self, start: int, base: Floats) -> Floats:
        """Where the columns of a base would best be put if none of them were changed any further: (n, out)."""
        at = slice(start, start + len(base))
        _, error = kernels.settle(base, self.unit[at, at], self.weight[at])
        return self.weight[at] - error

    def settle(self, start: int, block: Floats, kept: NDArray[np.bool_] | None, steps: Any) -> Any:
        """Decide on a block that `base` gave, column by column → centred codes int16 (n, out); None without steps."""
        at = slice(start, start + len(block))
        codes, self.error[at] = self._settle(block, self.unit[at, at], self.weight[at], kept, steps)
        return codes


class Descent:
    """On hessian + ridge · I (in, in), columns in their places.  weight, error: (in, out), the error as it is."""

    def __init__(
        self, weight: Floats, error: Floats, hessian: Floats, ridge: float, settle: Settle = kernels.settle
    ) -> None:
        self._settle = settle
        self.weight, self.error, self.hessian, self.ridge = weight, error, hessian, np.float32(ridge)
        self._sums: Ahead | InPairs = Ahead(hessian, error)

    def slope(self, start: int, stop: int) -> Floats:
        """Half the loss's derivative by the errors of columns [start, stop): (stop − start, out).

        Errors may change from call to call in the columns that were asked for, and in those up to the next ones.

        In pairs where the processor has them: after two sweeps a layer's loss is 1.0002 × what it is by float32 (mean
        of the demo's layers at 3 bits, 1.009 at most; without sweeps 1.049). Where one direction holds most of what
        comes in, slopes are small differences of large sums, and stay float32.
        """
        if start == 0:
            pairs = kernels.has_pairs() and not _too_rough(self.hessian, self.error, ridge=float(self.ridge))
            self._sums = (InPairs if pairs else Ahead)(self.hessian, self.error)
        found = self._sums.product(start, stop, len(self.error))
        found += self.ridge * self.error[start:stop]
        return found

    def turned(self, start: int, direction: Floats) -> Floats:
        """H d for a direction d (n, out) in columns [start, start + n), of the same columns."""
        at = slice(start, start + len(direction))
        found: Floats = self.hessian[at, at] @ direction
        found += self.ridge * direction
        return found

    def settle(self, start: int, slope: Floats, kept: NDArray[np.bool_] | None, steps: Any) -> Any:
        """Decide again on the columns of a slope, one by one → centred codes int16 (n, out), or None without steps."""
        at = slice(start, start + len(slope))
        curve = (np.diagonal(self.hessian)[at] + self.ridge)[:, None]
        share = np.where(curve > 0, 1 / np.where(curve > 0, curve, 1), np.float32(0))
        now = self.weight[at] - self.error[at]
        # where nothing comes in, the weight itself is best
        base = np.where(curve > 0, now + slope * share, self.weight[at])
        codes, moved = self._settle(base, self.hessian[at, at] * share.T, now, kept, steps)
        self.error[at] += moved
        return codes


def _too_rough(hessian: Floats, error: Floats, ridge: float, columns: int = 256, rows: int = 64) -> bool:
    """Would slopes in bfloat16 lose more than `DOUBT` of the loss? Asked of so many columns and rows, evenly chosen.

    A slope that is off by δ puts its column δ / curve beside its best place, which costs δ² / curve.
    """
    some = evenly(len(hessian), columns)
    e = np.ascontiguousarray(error[:, evenly(error.shape[1], rows)])
    slope = hessian @ e
    rounded = hessian[some].astype(bfloat16).astype(np.float32) @ e.astype(bfloat16).astype(np.float32)
    off = rounded - slope[some]
    curve = hessian[some, some, None] + np.float32(ridge)
    lost = np.square(off).sum(axis=1, keepdims=True) / np.where(curve > 0, curve, np.inf)
    loss = float(np.einsum("no,no->", slope, e)) + ridge * float(np.square(e).sum())
    return bool(lost.sum() * len(hessian) / len(some) > DOUBT * loss)
