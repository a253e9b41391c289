"""The change of a mean between two paired measurements, with its 95 % interval.

Both models are measured on the same samples, so the interval is that of the mean of the differences (a paired
t-interval), which is far narrower than the difference of two separate intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import BadInput, PenjingError

NORMAL_975 = 1.959963984540054
EXACT_UP_TO = 500  # degrees of freedom; beyond, the expansion below is right to ten digits


@dataclass(frozen=True)
class Change:
    """other − base: the mean, the ends of its 95 % interval, and the number of independent units behind it.

    With a single unit nothing is known about the spread: low and high are −inf and +inf.
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_change(base: ArrayLike, other: ArrayLike, clusters: ArrayLike | None = None) -> Change:
    """Mean of other − base over paired samples, with the 95 % Student-t interval of that mean.

    base, other: (samples,) measurements of the same samples, in the same order.
    clusters: (samples,) labels; samples of one label (the tokens of one window, say) count as one independent unit.
    The variance is then that of the clusters' summed residuals, times G/(G−1) for G clusters (Liang and Zeger, 1986);
    without clusters, or with one sample in each, this is the textbook paired interval.
    Raises BadInput if the shapes differ or are empty, PenjingError if a measurement is not finite.
    """
    before, after = np.asarray(base, np.float64), np.asarray(other, np.float64)
    if before.shape != after.shape or before.ndim != 1 or before.size == 0:
        raise BadInput(
            f"paired_change needs two equal, non-empty rows of samples, not {before.shape} and {after.shape}"
        )
    for name, values in (("base", before), ("other", after)):
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            raise PenjingError(f"{bad} of {values.size} losses of the {name} model are not finite")
    difference = after - before
    mean = float(difference.mean())
    sums = _sum_by(difference - mean, clusters)
    units = len(sums)
    if units == 1:
        return Change(mean, -np.inf, np.inf, 1)
    error = float(np.sqrt(units / (units - 1) * np.sum(sums**2))) / difference.size
    reach = t_quantile_975(units - 1) * error
    return Change(mean, mean - reach, mean + reach, units)


def _sum_by(values: NDArray[np.float64], clusters: ArrayLike | None) -> NDArray[np.float64]:
    if clusters is None:
        return values
    labels: NDArray[Any] = np.asarray(clusters)
    if labels.shape != values.shape:
        raise BadInput(f"clusters has shape {labels.shape}: one label for each of {values.size} samples is needed")
    return np.bincount(np.unique(labels, return_inverse=True)[1], weights=values).astype(np.float64)


def t_quantile_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with that many degrees of freedom (Abramowitz and Stegun, 26.7)."""
    if freedom > EXACT_UP_TO:
        z = NORMAL_975
        terms = [z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96]
        terms.append((3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
        return float(sum(term / freedom**power for power, term in enumerate(terms)))
    low, high = 0.0, 13.0  # the quantile of one degree of freedom is 12.7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| < t): 26.7.3 for odd and 26.7.4 for even degrees of freedom."""
    angle = np.arctan2(t, np.sqrt(freedom))
    cosine, odd = np.cos(angle), freedom % 2
    steps = np.arange(1, freedom // 2)
    ratios = 2 * steps / (2 * steps + 1) if odd else (2 * steps - 1) / (2 * steps)
    series = 1 + np.sum(np.cumprod(ratios * cosine**2)) if freedom > 1 else 0.0
    if odd:
        return float(2 / np.pi * (angle + np.sin(angle) * cosine * series))
    return float(np.sin(angle) * series)
