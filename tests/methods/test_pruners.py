"""Pruners against straightforward formulas, exact greedy pruning, and the best of all masks."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from realistic import hessian, layer, loss
from realistic import statistics as measured

from penjing.errors import BadInput, BadRecipe
from penjing.methods import gradual, magnitude, masks, obs, pruner, sparsegpt, wanda
from penjing.methods.statistics import Statistics

WITH_DATA = ["wanda", "sparsegpt", "gradual", "obs"]


def damped(statistics: Statistics, damping: float = 0.01) -> np.ndarray:
    h = statistics["hessian"].astype(np.float64)
    return h + damping * np.diag(h).mean() * np.eye(len(h))


def refitted(weight: np.ndarray, kept: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The best values for a mask: the normal equations of each row."""
    best = np.zeros(weight.shape)
    for row, (w, mask) in enumerate(zip(weight.astype(np.float64), kept, strict=True)):
        best[row, mask] = np.linalg.solve(h[np.ix_(mask, mask)], h[mask] @ w)
    return best


@pytest.mark.parametrize("method", WITH_DATA)
@pytest.mark.parametrize("columns", [1, 4, 30, 300])
def test_as_many_go_as_asked(method: str, columns: int) -> None:
    weight, _, statistics = layer(7, columns, columns)
    module = pruner(method)
    for sparsity in (0.1, 0.5, 0.75):
        solved = module.solve(weight.astype(ml_dtypes.bfloat16), statistics, module.Config(sparsity))
        assert solved.dtype == ml_dtypes.bfloat16
        assert ((solved == 0).sum(axis=1) == round(sparsity * columns)).all()
    if method != "obs":
        solved = module.solve(weight, statistics, module.Config(0.4, "tensor"))
        assert (solved == 0).sum() == round(0.4 * weight.size)


@pytest.mark.parametrize("method", WITH_DATA)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 3), (1, 150)])
def test_n_of_each_m_stay(method: str, pattern: tuple[int, int]) -> None:
    n, m = pattern
    weight, _, statistics = layer(5, 6 * m if m < 100 else 2 * m, m)
    module = pruner(method)
    config = module.Config(1 - n / m, pattern=pattern)
    solved = module.solve(weight, statistics, config)
    assert ((solved.reshape(-1, m) != 0).sum(axis=1) == n).all()
    with pytest.raises(BadInput, match=f"pattern {n}:{m} does not divide"):
        module.solve(weight[:, :-1].copy(), layer(1, weight.shape[1] - 1, 0)[2], config)


def test_masks_keep_counts_where_scores_are_equal_or_zero() -> None:
    scores = np.zeros((2, 10))
    scores[1, 3] = 1
    kept = masks.keep(scores, 6, "row", None)
    assert (kept.sum(axis=1) == 4).all()
    assert kept[1, 3]


def test_wanda_is_its_formula() -> None:
    weight, x, statistics = layer(6, 20, 2)
    scores = np.abs(weight) * np.linalg.norm(x.astype(np.float64), axis=0)
    for scope in ("row", "tensor"):
        solved = wanda.solve(weight, statistics, wanda.Config(0.5, scope))  # type: ignore[arg-type]
        flat = scores if scope == "row" else scores.reshape(1, -1)
        gone = np.argsort(flat, axis=1)[:, : flat.shape[1] // 2]
        expected = np.ones(flat.shape, bool)
        np.put_along_axis(expected, gone, False, axis=1)
        np.testing.assert_array_equal(solved != 0, expected.reshape(weight.shape))
        np.testing.assert_array_equal(solved[solved != 0], weight[solved != 0])


@pytest.mark.usefixtures("float_sums")
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sparsegpt_is_the_papers_algorithm(pattern: tuple[int, int] | None) -> None:
    """Algorithm 1 of the paper in float64, with the Cholesky factor of the inverse; 3 blocks of 128."""
    weight, _, statistics = layer(4, 384, 3)
    upper = np.linalg.cholesky(np.linalg.inv(damped(statistics))).T
    w, kept = weight.astype(np.float64), np.ones(weight.shape, bool)
    for k in range(384):
        width = 128 if pattern is None else pattern[1]
        if k % width == 0:
            scores = w[:, k : k + width] ** 2 / np.diag(upper)[k : k + width] ** 2
            gone = np.argsort(scores, axis=1)[:, : width // 2]
            np.put_along_axis(kept[:, k : k + width], gone, False, axis=1)
        error = np.where(kept[:, k], 0, w[:, k]) / upper[k, k]
        w[:, k:] -= np.outer(error, upper[k, k:])
    solved = sparsegpt.solve(weight, statistics, sparsegpt.Config(0.5, pattern=pattern, sweeps=0))
    same = (solved != 0) == kept
    assert same.mean() > 0.995
    rows = same.all(axis=1)
    np.testing.assert_allclose(solved[rows], np.where(kept, w, 0)[rows], rtol=1e-2, atol=1e-4)
    assert loss(weight, solved, damped(statistics)) == pytest.approx(
        loss(weight, np.where(kept, w, 0), damped(statistics)), rel=0.02
    )


def test_uncorrelated_inputs_leave_wandas_order_and_the_weights_as_they_are() -> None:
    weight = layer(5, 96, 4)[0]
    variance = np.exp(np.random.default_rng(1).standard_normal(96)).astype(np.float32)
    both = Statistics({"hessian": np.diag(variance), "input_norm": np.sqrt(variance)})
    expected = wanda.solve(weight, both, wanda.Config(0.5))
    for module in (sparsegpt, gradual, obs):
        solved = module.solve(weight, both, module.Config(0.5, damping=0.0))
        np.testing.assert_allclose(solved, expected, rtol=1e-6)


def test_enough_sweeps_reach_the_best_values_for_the_mask() -> None:
    weight, _, statistics = layer(6, 40, 5)
    h = damped(statistics)
    for module in (sparsegpt, gradual):
        solved = module.solve(weight, statistics, module.Config(0.5, sweeps=100))
        best = refitted(weight, solved != 0, h)
        assert loss(weight, solved, h) == pytest.approx(loss(weight, best, h), rel=1e-2)


def test_obs_is_exact_greedy_pruning() -> None:
    """One at a time, the weight whose loss after refitting all others is least: by solving each from scratch."""
    weight, _, statistics = layer(3, 12, 6)
    h = damped(statistics)
    solved = obs.solve(weight, statistics, obs.Config(0.5))
    for w, found in zip(weight, solved, strict=True):
        kept = np.ones(12, bool)
        for _ in range(6):
            without = {}
            for p in np.flatnonzero(kept):
                mask = kept.copy()
                mask[p] = False
                without[p] = loss(w[None], refitted(w[None], mask[None], h), h)
            kept[min(without, key=without.__getitem__)] = False
        np.testing.assert_array_equal(found != 0, kept)
        np.testing.assert_allclose(found, refitted(w[None], kept[None], h)[0], rtol=1e-3, atol=1e-5)


def test_against_the_best_of_all_masks_and_each_other() -> None:
    """The best mask for every layer; in the mean over layers exact greedy, gradual, sparsegpt, wanda, magnitude."""
    totals = dict.fromkeys(("best", *WITH_DATA[::-1], "l1"), 0.0)
    for seed in range(8):
        weight, _, statistics = layer(2, 10, seed)
        h = damped(statistics)
        choices = [np.isin(np.arange(10), each) for each in itertools.combinations(range(10), 5)]
        best = sum(min(loss(w[None], refitted(w[None], c[None], h), h) for c in choices) for w in weight)
        for name in totals:
            if name != "best":
                module = pruner(name)
                lost = loss(weight, module.solve(weight, statistics, module.Config(0.5)), h)
                assert lost >= best * (1 - 1e-4)
                totals[name] += lost / loss(weight, 0 * weight, h)
        totals["best"] += best / loss(weight, 0 * weight, h)
    assert totals["best"] <= totals["obs"] <= totals["gradual"] * 1.05
    assert max(totals["obs"], totals["gradual"]) < totals["sparsegpt"] < totals["wanda"] < totals["l1"]


@pytest.mark.parametrize("seed", range(3))
def test_gradual_comes_close_to_exact_greedy(seed: int) -> None:
    weight, _, statistics = layer(8, 96, seed)
    h = damped(statistics)
    exact = loss(weight, obs.solve(weight, statistics, obs.Config(0.5)), h)
    staged = loss(weight, gradual.solve(weight, statistics, gradual.Config(0.5, stages=32, sweeps=20)), h)
    paper = loss(weight, sparsegpt.solve(weight, statistics, sparsegpt.Config(0.5, sweeps=0)), h)
    assert exact <= staged <= 1.3 * exact
    assert staged < 0.8 * paper


def test_dead_inputs_cost_nothing() -> None:
    """Wanda lets them go first; the others lose no more than they would without those columns."""
    weight, x, statistics = layer(6, 48, 7, dead=(3, 11))
    solved = wanda.solve(weight, statistics, wanda.Config(0.25))
    assert (solved[:, [3, 11]] == 0).all()
    alive = np.delete(np.arange(48), [3, 11])
    fewer = measured(x[:, alive])
    for module in (sparsegpt, gradual, obs):
        lost = loss(weight, module.solve(weight, statistics, module.Config(12 / 48)), statistics["hessian"])
        without = module.solve(np.ascontiguousarray(weight[:, alive]), fewer, module.Config(10 / 46))
        assert lost < 1.5 * loss(weight[:, alive], without, fewer["hessian"])


def test_fewer_rows_than_columns_and_no_input_at_all() -> None:
    weight, _, statistics = layer(6, 48, 7, rows=9)
    for module in (sparsegpt, gradual):
        lost = loss(weight, module.solve(weight, statistics, module.Config(0.5)), statistics["hessian"])
        assert lost < 0.1 * loss(weight, 0 * weight, statistics["hessian"])
        solved = module.solve(weight, hessian(np.zeros((48, 48))), module.Config(0.5))
        np.testing.assert_allclose(solved, magnitude.solve(weight, Statistics(), magnitude.Config(0.5)), rtol=1e-6)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(BadRecipe, match="scope=tensor: obs prunes each row"):
        obs.Config(0.5, "tensor")
    with pytest.raises(BadInput, match="1025 columns: obs takes"):
        obs.solve(np.zeros((1, 1025), np.float32), Statistics(), obs.Config(0.5))
    with pytest.raises(BadRecipe, match="stages=0: give a whole number from 1"):
        gradual.Config(0.5, stages=0)
    with pytest.raises(BadRecipe, match="between 0 and 1"):
        sparsegpt.Config(1.5)
    with pytest.raises(BadInput, match="needs calibration"):
        wanda.solve(np.zeros((2, 4), np.float32), Statistics(), wanda.Config(0.5))
