"""paired_change against scipy, a hand-written cluster sandwich, and by how often the interval covers the truth."""

from __future__ import annotations

import numpy as np
import pytest

from penjing.errors import BadInput, PenjingError
from penjing.stats import paired_change, t_quantile_975


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 29, 30, 99, 499, 500, 501, 1000, 10**6])
def test_quantile_agrees_with_scipy(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@pytest.mark.parametrize("samples", [2, 3, 7, 100, 2000])
def test_interval_agrees_with_scipy(samples: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(samples)
    base, other = rng.normal(3, 2, samples), rng.normal(3.1, 2, samples)
    change = paired_change(base, other)
    low, high = stats.ttest_rel(other, base).confidence_interval(0.95)
    assert (change.mean, change.low, change.high) == pytest.approx(((other - base).mean(), low, high), rel=1e-9)
    assert change.n == samples


def test_interval_covers_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        sample = rng.normal(size=8)
        change = paired_change(sample, sample + rng.normal(0.3, 1, 8))
        covered += change.low <= 0.3 <= change.high
    assert 0.935 < covered / 2000 < 0.965


def test_clusters_cover_where_samples_alone_do_not() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(30), 20)
    covered = {"clusters": 0, "samples": 0}
    for _ in range(500):
        difference = np.repeat(rng.normal(size=30), 20) + 0.1 * rng.normal(size=600)
        for kind, given in (("clusters", labels), ("samples", None)):
            change = paired_change(np.zeros(600), difference, given)
            covered[kind] += change.low <= 0 <= change.high
    assert 0.92 < covered["clusters"] / 500 < 0.98
    assert covered["samples"] / 500 < 0.6


def test_equal_clusters_are_the_interval_of_their_means() -> None:
    rng = np.random.default_rng(2)
    difference = rng.normal(size=(12, 5))
    by_cluster = paired_change(np.zeros(60), difference.ravel(), np.repeat(np.arange(12), 5))
    by_means = paired_change(np.zeros(12), difference.mean(axis=1))
    assert (by_cluster.mean, by_cluster.low, by_cluster.high) == pytest.approx(
        (by_means.mean, by_means.low, by_means.high)
    )
    assert by_cluster.n == 12


def test_one_unit_knows_no_spread() -> None:
    change = paired_change([1.0, 2.0], [2.0, 3.0], ["a", "a"])
    assert (change.mean, change.low, change.high, change.n) == (1.0, -np.inf, np.inf, 1)


@pytest.mark.parametrize(("base", "other"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_shapes_are_checked(base: list[float], other: list[float]) -> None:
    with pytest.raises(BadInput, match="equal, non-empty"):
        paired_change(base, other)


def test_clusters_of_another_length_are_refused() -> None:
    with pytest.raises(BadInput, match="one label"):
        paired_change([1.0, 2.0], [1.0, 2.0], [0])


def test_a_loss_that_is_not_finite_is_named() -> None:
    with pytest.raises(PenjingError, match="1 of 2 losses of the other model"):
        paired_change([1.0, 2.0], [1.0, np.nan])
