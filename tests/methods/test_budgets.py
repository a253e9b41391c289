"""Budgets: the mean is as asked, OWL is its formula, and sensitivity's allocation is the best there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from penjing.errors import BadInput
from penjing.methods import budgets


def test_uniform() -> None:
    np.testing.assert_array_equal(budgets.uniform([4, 9], 0.3), [0.3, 0.3])


def test_outliers_are_counted_over_the_whole_block() -> None:
    norm = np.array([1, 1, 1, 37], np.float32)
    block = [(np.ones((2, 4), np.float32), norm), (np.full((1, 2), 30, np.float32), np.ones(2, np.float32))]
    # one matrix alone: mean 10; both: mean (80 + 60) / 10 = 14
    assert budgets.outlier_ratio(lambda: block[:1], threshold=3.0) == 0.25
    assert budgets.outlier_ratio(lambda: block, threshold=2.5) == 0.2
    assert budgets.outlier_ratio(lambda: block, threshold=2.0) == 0.4


def test_one_threshold_for_all() -> None:
    """Shares are those of a sort of all scores, to the width of a bin; the mean is exact."""
    rng = np.random.default_rng(1)
    scores = [np.abs(rng.normal(0, size, count)).astype(np.float32) for size, count in ((1, 3000), (0.3, 500))]
    counts = np.array([budgets.histogram(each) for each in scores])
    for mean in (0.1, 0.5, 0.9):
        found = budgets.by_threshold(counts, mean)
        threshold = np.quantile(np.concatenate(scores), mean)
        np.testing.assert_allclose(found, [(each < threshold).mean() for each in scores], atol=0.02)
        assert found @ [3000, 500] / 3500 == pytest.approx(mean)


def test_owl_is_its_formula() -> None:
    """Layers of one size: 1 − (scaled ratio − its mean + 1 − mean), as in the authors' description."""
    ratios = np.array([0.01, 0.04, 0.02, 0.05])
    found = budgets.by_outliers(ratios, [10] * 4, 0.7, spread=0.1)
    scaled = (ratios - ratios.min()) / (ratios.max() - ratios.min()) * 0.2
    np.testing.assert_allclose(found, 0.7 - (scaled - scaled.mean()), rtol=1e-9)
    np.testing.assert_allclose(budgets.by_outliers([0.2, 0.2], [1, 3], 0.5), 0.5)


@pytest.mark.parametrize("mean", [0.0, 0.05, 0.5, 0.95, 0.99])
def test_the_mean_over_weights_is_kept_at_the_ends_too(mean: float) -> None:
    sizes = np.array([1, 100, 10])
    found = budgets.by_outliers([0.5, 0.1, 0.0], sizes, mean, spread=0.3)
    assert found @ sizes / sizes.sum() == pytest.approx(mean, abs=1e-9)
    assert ((found >= 0) & (found <= budgets.MOST)).all()


def test_sensitivity_is_the_best_allocation() -> None:
    """Convex losses on a grid whose steps exchange one for one: all allocations, by brute force."""
    rng = np.random.default_rng(0)
    shares = np.linspace(0, 0.8, 5)
    for _ in range(20):
        losses = np.cumsum(np.cumsum(rng.random((3, 5)), axis=1), axis=1)
        for level in range(13):
            mean = min(level * 0.2 / 3, 0.8)
            found = budgets.by_sensitivity(shares, losses, [7, 7, 7], mean)
            assert found.mean() == pytest.approx(mean)
            lost = sum(np.interp(share, shares, loss) for share, loss in zip(found, losses, strict=True))
            best = min(
                sum(losses[layer, i] for layer, i in enumerate(choice))
                for choice in itertools.product(range(5), repeat=3)
                if sum(choice) == level
            )
            assert lost == pytest.approx(best)


def test_larger_layers_and_bends_the_wrong_way() -> None:
    shares = [0.0, 0.25, 0.5]
    losses = np.array([[0, 1, 1.5], [0, 0.1, 5.0]])  # the first is concave: its hull is a straight line
    found = budgets.by_sensitivity(shares, losses, [1000, 10], 0.25)
    assert found @ [1000, 10] / 1010 == pytest.approx(0.25)
    # each weight of the first costs 3 / 1000, of the second 0.4 / 10 and more: it is left alone
    np.testing.assert_allclose(found, [0.25 * 1010 / 1000, 0])


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(BadInput, match=r"mean sparsity of 1\.5"):
        budgets.uniform([1], 1.5)
    with pytest.raises(BadInput, match="1 layers and 2 sizes"):
        budgets.by_outliers([0.1], [1, 2], 0.5)
    with pytest.raises(BadInput, match="measured from 0 to 0"):
        budgets.by_sensitivity([0, 0.4], np.zeros((1, 2)), [5], 0.5)
    with pytest.raises(BadInput, match="losses of shape"):
        budgets.by_sensitivity([0.4, 0.0], np.zeros((1, 2)), [5], 0.2)
