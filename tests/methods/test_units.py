"""Units that go whole, against least squares on the inputs themselves and a search of all that could go."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from penjing.errors import BadRecipe
from penjing.methods import units
from penjing.methods.statistics import Statistics

RANDOM = np.random.default_rng(0)
OUT, UNITS, SIZE, ROWS = 7, 6, 2, 200
X = (RANDOM.standard_normal((ROWS, 4)) @ RANDOM.standard_normal((4, UNITS * SIZE))) + 0.3 * RANDOM.standard_normal(
    (ROWS, UNITS * SIZE)
)
W = RANDOM.standard_normal((OUT, UNITS * SIZE)).astype(np.float32)
SEEN = Statistics(
    {"hessian": (X.T @ X / ROWS).astype(np.float32), "input_norm": np.sqrt((X**2).mean(0)).astype(np.float32)}
)
COLUMNS = np.arange(UNITS * SIZE).reshape(UNITS, SIZE)
NONE = units.Config("obs", damping=0)


def error(kept_units: tuple[int, ...] | np.ndarray) -> float:
    """Of the output, when the columns that are kept are fitted to it by least squares."""
    kept = COLUMNS[list(kept_units)].reshape(-1)
    fit = np.linalg.lstsq(X[:, kept], X @ W.T, rcond=None)[0]
    return float(np.square(X @ W.T - X[:, kept] @ fit).sum())


def test_what_stays_is_moved_to_the_least_squares_fit() -> None:
    kept = np.array([0, 1, 4, 5, 6, 9, 11])
    expected = np.linalg.lstsq(X[:, kept], X @ W.T, rcond=None)[0].T
    np.testing.assert_allclose(units.refit(W, kept, SEEN, 0.0), expected, atol=2e-3)


def test_damping_keeps_the_weights_that_stay_near() -> None:
    """min ‖(W − W')X‖² / n + λ ‖W − W'‖², as ridge regression on stacked rows."""
    kept, ridge = np.array([0, 2, 3, 7]), 0.1 * np.diagonal(SEEN["hessian"]).mean()
    target = np.concatenate([X @ W.T / np.sqrt(ROWS), np.sqrt(ridge) * W.T])
    stacked = np.concatenate([X / np.sqrt(ROWS), np.sqrt(ridge) * np.eye(X.shape[1])])[:, kept]
    expected = np.linalg.lstsq(stacked, target, rcond=None)[0].T
    np.testing.assert_allclose(units.refit(W, kept, SEEN, 0.1), expected, atol=1e-4)


def test_surgery_is_greedy_on_the_error_that_least_squares_leaves() -> None:
    alive = list(range(UNITS))
    while len(alive) > 2:
        alive.remove(min(alive, key=lambda unit: error([u for u in alive if u != unit])))  # type: ignore[arg-type]
        found = units.choose(W, COLUMNS, len(alive), [], SEEN, NONE)
        assert found.tolist() == alive


def test_single_columns_are_chosen_as_units_of_one() -> None:
    one_each = np.arange(UNITS * SIZE)[:, None]

    def fitted(kept: list[int]) -> float:
        fit = np.linalg.lstsq(X[:, kept], X @ W.T, rcond=None)[0]
        return float(np.square(X @ W.T - X[:, kept] @ fit).sum())

    alive = list(range(UNITS * SIZE))
    while len(alive) > 5:
        alive.remove(min(alive, key=lambda unit: fitted([u for u in alive if u != unit])))
    assert units.choose(W, one_each, 5, [], SEEN, NONE).tolist() == alive


def test_sections_keep_the_same_number_each() -> None:
    """With two sections of three units, one of each stays: the best pair of all nine."""
    found = units.choose(W, COLUMNS, 1, [], SEEN, NONE, sections=2)
    assert found[0] < 3 <= found[1]
    pairs = sorted(itertools.product(range(3), range(3, 6)), key=error)
    assert tuple(found) in pairs[:3]  # greedy need not find the very best
    for way in ("l2", "wanda", "random"):
        one, two = units.choose(W, COLUMNS, 1, [], SEEN, units.Config(way), sections=2)
        assert one < 3 <= two


def test_wanda_and_norms_by_their_formulas() -> None:
    squares = [np.square(W[:, at] * np.sqrt((X[:, at] ** 2).mean(0))).sum() for at in COLUMNS]
    wanda = units.choose(W, COLUMNS, 4, [], SEEN, units.Config("wanda"))
    assert wanda.tolist() == sorted(np.argsort(squares)[-4:].tolist())
    maker = RANDOM.standard_normal((UNITS, 5)) * 3
    for way, power in (("l1", 1), ("l2", 2)):
        scores = [(np.abs(W[:, at]) ** power).sum() + (np.abs(maker[u]) ** power).sum() for u, at in enumerate(COLUMNS)]
        found = units.choose(W, COLUMNS, 3, [maker], Statistics(), units.Config(way))
        assert found.tolist() == sorted(np.argsort(scores)[-3:].tolist())


def test_columns_that_nothing_comes_to_go_first() -> None:
    x = X.copy()
    x[:, COLUMNS[2]] = 0
    seen = Statistics({"hessian": (x.T @ x / ROWS).astype(np.float32)})
    assert 2 not in units.choose(W, COLUMNS, UNITS - 1, [], seen, units.Config("obs"))
    kept = np.setdiff1d(np.arange(UNITS * SIZE), COLUMNS[2])
    np.testing.assert_allclose(units.refit(W, kept, seen, 0.01), W[:, kept], atol=1e-6)


def test_many_units_go_in_rounds() -> None:
    """More units than rounds: the choice is near the one-by-one one, and the count is right."""
    random = np.random.default_rng(1)
    x, w = random.standard_normal((400, 120)) @ random.standard_normal((120, 120)), random.standard_normal((9, 120))
    seen = Statistics({"hessian": (x.T @ x / 400).astype(np.float32)})
    columns = np.arange(120)[:, None]
    found = units.choose(w.astype(np.float32), columns, 40, [], seen, units.Config("obs"))
    assert len(found) == len(set(found.tolist())) == 40

    def left(kept: np.ndarray) -> float:
        fit = np.linalg.lstsq(x[:, kept], x @ w.T, rcond=None)[0]
        return float(np.square(x @ w.T - x[:, kept] @ fit).sum())

    drawn = np.mean([left(random.permutation(120)[:40]) for _ in range(20)])
    assert left(found) < 0.6 * drawn


@pytest.mark.parametrize("settings", [{"way": "wonda"}, {"damping": -1.0}])
def test_wrong_settings_are_one_line(settings: dict) -> None:
    with pytest.raises(BadRecipe):
        units.Config(**settings)
