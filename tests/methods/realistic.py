"""Weights and inputs that look like a real layer's: correlated columns, a few of them large, heavy tails."""

from __future__ import annotations

import numpy as np

from penjing.methods.statistics import KINDS, Collector, Statistics


def layer(
    out: int, columns: int, seed: int, rows: int | None = None, dead: tuple[int, ...] = ()
) -> tuple[np.ndarray, np.ndarray, Statistics]:
    """A weight (out, in), rows of its input (n, in), and all statistics of them."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, columns + 1) ** -0.5
    mix = rng.standard_normal((columns, columns)) * spectrum[:, None]
    x = rng.standard_normal((rows or 8 * columns, columns)) @ mix * np.exp(0.5 * rng.standard_normal(columns))
    x[:, rng.integers(columns)] *= 8
    x[:, list(dead)] = 0
    x = x.astype(np.float32)
    weight = rng.standard_t(5, (out, columns)).astype(np.float32) * np.float32(0.05)
    return weight, x, statistics(x)


def statistics(x: np.ndarray) -> Statistics:
    collector = Collector(x.shape[1], KINDS)
    collector.add(x)
    return collector.statistics()


def hessian(h: np.ndarray) -> Statistics:
    return Statistics({"hessian": h.astype(np.float32)})


def loss(weight: np.ndarray, solved: np.ndarray, h: np.ndarray) -> float:
    """tr(E H Eᵀ), written out in float64."""
    error = weight.astype(np.float64) - solved.astype(np.float64)
    return float(np.trace(error @ h.astype(np.float64) @ error.T))
