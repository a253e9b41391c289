"""How sparse each layer should be, so that all together are as sparse as asked. Pure functions of numbers.

Sizes are weights a layer; the mean is over weights, so that a large layer counts as what it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput

Doubles = NDArray[np.float64]
MOST = 0.99  # no layer loses more than that
MANTISSA = 4
BINS = 256 << MANTISSA


def uniform(sizes: Sequence[int], mean: float) -> Doubles:
    """The same share everywhere."""
    _check(sizes, sizes, mean)
    return np.full(len(sizes), float(mean))


def outlier_ratio(parts: Callable[[], Iterable[tuple[NDArray[Any], NDArray[Any]]]], threshold: float = 5.0) -> float:
    """The share of a block's weights whose |w_ij| · ‖x_j‖ is more than ``threshold`` times the mean of all of them.

    parts: gives the block's weights (out, in), each with the norms of its input (in,); it is called twice.
    """
    total, count, above = 0.0, 0, 0
    for weight, norm in parts():
        total += float(scores(weight, norm).sum(dtype=np.float64))
        count += weight.size
    for weight, norm in parts():
        above += int((scores(weight, norm) > threshold * total / max(count, 1)).sum())
    return above / max(count, 1)


def scores(weight: NDArray[Any], norm: NDArray[Any] | None) -> NDArray[np.float32]:
    """|w_ij| · ‖x_j‖ (out, in); |w_ij| where nothing is known of the input."""
    found = np.abs(weight.astype(np.float32))
    if norm is not None:
        found *= norm
    return found


def histogram(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many of some numbers ≥ 0 lie in each of `BINS`: by exponent and the first `MANTISSA` bits after it."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).ravel() >> (23 - MANTISSA)
    return np.bincount(bits, minlength=BINS)


def by_threshold(counts: NDArray[Any], mean: float) -> Doubles:
    """Global pruning: the share of each layer that lies below one threshold for all.

    counts: (layers, bins), a `histogram` of each layer's scores. A bin is split in every layer alike.
    """
    sizes = counts.sum(axis=1)
    _check(counts, sizes.tolist(), mean)
    edges = np.pad(np.cumsum(counts, axis=1), ((0, 0), (1, 0))) / sizes[:, None]
    weights = sizes / sizes.sum()

    def shares(place: float) -> Doubles:
        low = min(int(place), counts.shape[1] - 1)
        found: Doubles = edges[:, low] + (place - low) * (edges[:, low + 1] - edges[:, low])
        return np.minimum(found, MOST)

    low, high = 0.0, float(counts.shape[1])
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shares(middle) @ weights) < mean else (low, middle)
    return shares(high)


def by_outliers(ratios: Sequence[float], sizes: Sequence[int], mean: float, spread: float = 0.08) -> Doubles:
    """OWL: layers with more outliers keep more (Yin et al., 2023, arXiv 2310.05175).

    ratios: `outlier_ratio` of each layer (or of each block, as in the paper).  spread: the paper's λ: the layer with
    the fewest outliers and the one with the most lie 2 λ apart.
    """
    _check(ratios, sizes, mean)
    outliers = np.asarray(ratios, np.float64)
    width = outliers.max() - outliers.min()
    wish = -2 * spread * (outliers - outliers.min()) / width if width > 0 else np.zeros(len(outliers))
    return _level(wish, sizes, mean)


def by_sensitivity(shares: Sequence[float], losses: NDArray[Any], sizes: Sequence[int], mean: float) -> Doubles:
    """The shares that together lose least, from losses measured layer by layer.

    shares: (levels,) ascending, that were tried.  losses: (layers, levels), what each costs at each share. Between two
    shares a layer's loss is taken as linear and, where it bends the wrong way, as its lower convex hull; the best is
    then to spend each next weight where it costs least, which is exact. Raises BadInput when the mean is out of reach.
    """
    _check(losses, sizes, mean)
    grid, costs, weights = np.asarray(shares, np.float64), np.asarray(losses, np.float64), np.asarray(sizes, np.float64)
    if costs.shape != (len(sizes), len(grid)) or len(grid) < 2 or (np.diff(grid) <= 0).any():
        raise BadInput(f"losses of shape {costs.shape}: give one for each of {len(sizes)} layers and each rising share")
    if not grid[0] <= mean <= grid[-1]:
        raise BadInput(f"a mean sparsity of {mean}: losses were measured from {grid[0]:g} to {grid[-1]:g}")
    pieces = []
    for layer, cost in enumerate(costs):
        corners = _hull(grid, cost)
        for low, high in itertools.pairwise(corners):
            part = (grid[high] - grid[low]) * weights[layer]
            pieces.append(((cost[high] - cost[low]) / part, layer, part))
    found, left = np.full(len(costs), grid[0]), (mean - grid[0]) * weights.sum()
    for _, layer, part in sorted(pieces):
        taken = min(part, left)
        found[layer] += taken / weights[layer]
        left -= taken
    return found


def _hull(x: Doubles, y: Doubles) -> list[int]:
    """Indices of the lower convex hull's corners."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return corners


def _level(wish: Doubles, sizes: Sequence[int], mean: float) -> Doubles:
    """Wishes shifted alike, and clipped to [0, `MOST`], so that their mean over weights is as asked."""
    weights = np.asarray(sizes, np.float64) / np.sum(sizes, dtype=np.float64)
    low, high = -wish.max() - 1, MOST - wish.min() + 1
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(np.clip(wish + middle, 0, MOST) @ weights) < mean else (low, middle)
    found: Doubles = np.clip(wish + high, 0, MOST)
    return found


def _check(layers: Any, sizes: Sequence[int], mean: float) -> None:
    if len(layers) != len(sizes) or not len(sizes) or min(sizes) < 1:
        raise BadInput(f"{len(layers)} layers and {len(sizes)} sizes: give each layer's number of weights")
    if not 0 <= mean <= MOST:
        raise BadInput(f"a mean sparsity of {mean}: give 0 to {MOST}")
