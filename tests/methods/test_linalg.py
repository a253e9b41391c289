"""The factor and what follows from it, against numpy's own decompositions in float64."""

from __future__ import annotations

import numpy as np
import pytest
from realistic import hessian, layer

from penjing.errors import BadInput
from penjing.methods import linalg


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [1, 5, 300, 530])
def test_the_factor_is_the_damped_hessian(columns: int, act_order: bool) -> None:
    _, _, statistics = layer(1, columns, 0)
    h = statistics["hessian"].astype(np.float64)
    found = linalg.factor(statistics, columns, 0.01, act_order)
    m, d = found.unit.astype(np.float64), found.diagonal.astype(np.float64)
    damped = h + 0.01 * np.diag(h).mean() * np.eye(columns)
    np.testing.assert_allclose((m * d) @ m.T, damped[np.ix_(found.order, found.order)], rtol=1e-4, atol=1e-5 * h.max())
    assert (np.tril(m, -1) == 0).all()
    np.testing.assert_allclose(np.diag(m), 1, rtol=1e-6)
    if act_order:
        assert (np.diff(np.diag(h)[found.order]) <= 0).all()
    diagonal, used = linalg.inverse_diagonal(statistics, columns, 0.01)
    assert used == found.damping == 0.01
    np.testing.assert_allclose(diagonal, np.diag(np.linalg.inv(damped)), rtol=1e-4)
    np.testing.assert_allclose(linalg.inverse(statistics, columns, 0.01) @ damped, np.eye(columns), atol=1e-7)


def test_layers_of_one_input_share_the_factor() -> None:
    _, _, statistics = layer(1, 20, 0)
    first = linalg.factor(statistics, 20, 0.01, True)
    assert linalg.factor(statistics, 20, 0.01, True) is first
    assert linalg.damping_used(statistics) == {"damping": 0.01}


def test_damping_grows_until_it_is_enough() -> None:
    """Two equal columns: singular, which no rounding hides when nothing is added."""
    h = np.ones((4, 4))
    assert linalg.factor(hessian(h), 4, 0.0, False).damping == pytest.approx(1e-3)
    below = h - 0.05 * np.eye(4)  # not even semidefinite: float32 sums can do that
    assert linalg.factor(hessian(below), 4, 0.01, False).damping == pytest.approx(0.1)
    assert linalg.factor(hessian(np.zeros((3, 3))), 3, 0.01, False).damping == 0.01  # nothing was seen: the identity


def test_the_factor_is_float64s_where_float32_is_not_enough() -> None:
    """One direction with nearly all of the input: the other pivots are what rounding leaves of it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1200, 600))
    x += 3e3 * rng.standard_normal((1200, 1)) * np.ones(600)
    h = (x.T @ x / len(x)).astype(np.float32).astype(np.float64)
    for damping, close in ((1e-2, 2e-2), (1e-5, 1e-6)):
        found = linalg.factor(hessian(h), 600, damping, False)
        damped = h + damping * np.diag(h).mean() * np.eye(600)
        lower = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        np.testing.assert_allclose(found.diagonal, np.diag(lower) ** 2, rtol=close)
        assert found.damping == damping


def test_float32_is_not_believed_where_it_finds_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """b + a on the diagonal, b beside it: with k columns to come, a pivot is a + b a / (a + k b)."""
    monkeypatch.setattr(linalg, "ENOUGH_DAMPING", 0)
    n, b, damping = 600, 2.0**23, 1e-9
    found = linalg.factor(hessian(b * np.ones((n, n)) + np.eye(n)), n, damping, False)
    a = 1 + damping * (b + 1)
    assert found.damping == damping
    np.testing.assert_allclose(found.diagonal, a + b * a / (a + np.arange(n)[::-1] * b), rtol=1e-5)


def test_what_is_no_hessian_is_refused() -> None:
    with pytest.raises(BadInput, match="negative diagonal"):
        linalg.factor(hessian(-np.eye(3)), 3, 0.01, False)
    with pytest.raises(BadInput, match="not positive definite, even with 10 of"):
        linalg.factor(hessian(np.array([[1.0, 99.0], [99.0, 1.0]])), 2, 0.01, False)


def test_losses_are_the_mean_squared_error_of_the_output() -> None:
    weight, x, statistics = layer(6, 20, 1)
    other = np.round(weight * 20) / 20
    lost = x.astype(np.float64) @ (weight - other).astype(np.float64).T
    np.testing.assert_allclose(linalg.losses(weight - other, statistics["hessian"]), (lost**2).mean(axis=0), rtol=1e-4)
    whole = x.astype(np.float64) @ weight.astype(np.float64).T
    share = (lost**2).sum() / (whole**2).sum()
    assert linalg.relative_loss(weight, other, statistics["hessian"]) == pytest.approx(share, rel=1e-4)
    assert linalg.relative_loss(weight, other, np.zeros((20, 20))) == 0
