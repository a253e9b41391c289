"""Columns decided on one after the other: the native loop against the reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from penjing import kernels
from penjing.formats.affine import Grid
from penjing.kernels import Steps, reference


@pytest.mark.parametrize(("n", "out"), [(1, 1), (7, 5), (128, 300), (150, 128), (3, 1000)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_native_is_the_reference(n: int, out: int, masked: bool, groups: int) -> None:
    rng = np.random.default_rng((n, out))
    base, wanted = (rng.standard_normal((n, out)).astype(np.float32) for _ in range(2))
    coupling = rng.standard_normal((n, n)).astype(np.float32) / n
    kept = rng.random((n, out)) < 0.5 if masked else None
    steps = None
    if groups:
        scale = np.exp(rng.standard_normal((groups, out))).astype(np.float32) / 4
        low = np.full((groups, out), -5, np.float32)
        steps = Steps(scale, low, low + 7, rng.integers(0, groups, n).astype(np.int32))
    ours = kernels.settle(base, coupling, wanted, kept, steps)
    twin = reference.settle(base, coupling, wanted, kept, steps)
    np.testing.assert_array_equal(ours[1], twin[1])
    assert (ours[0] is None) == (steps is None)
    if steps is not None:
        np.testing.assert_array_equal(ours[0], twin[0])
        assert ours[0].min() >= -5
        assert ours[0].max() <= 2


def test_wrong_shapes_are_refused() -> None:
    square, wide = np.zeros((3, 3), np.float32), np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match="coupling"):
        kernels.settle(wide, wide, wide)
    with pytest.raises(ValueError, match="reference"):
        kernels.settle(wide, square, square)
    with pytest.raises(ValueError, match="kept"):
        kernels.settle(wide, square, wide, np.ones((2, 4), bool))
    one = np.ones((1, 4), np.float32)
    with pytest.raises(ValueError, match="no steps"):
        kernels.settle(wide, square, wide, None, Steps(one, one, one, np.array([0, 1, 0], np.int32)))


@pytest.mark.parametrize(("n", "out"), [(1, 1), (7, 5), (128, 300), (130, 16), (600, 33), (3, 1000)])
@pytest.mark.parametrize("grid", [Grid(4, -1), Grid(3, -1, symmetric=False), Grid(8, -1, scale_dtype="bfloat16")])
@pytest.mark.parametrize("importances", ["one a column", "one a weight"])
def test_searched_steps_are_those_of_the_reference(n: int, out: int, grid: Grid, importances: str) -> None:
    rng = np.random.default_rng((n, out))
    values = rng.standard_normal((n, out)).astype(np.float32)
    importance = rng.random((n, out if importances == "one a weight" else 1)).astype(np.float32)
    importance[rng.random(importance.shape) < 0.3] = 0
    values[:, 0] = 0
    trials = np.linspace(0.5, 1.1, 7, dtype=np.float32), np.array((0.95, 1, 1.05), np.float32)
    ours = kernels.search_steps(values, importance, grid, *trials)
    for one, other in zip(ours, reference.search_steps(values, importance, grid, *trials), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_search_of_wrong_shapes_is_refused() -> None:
    few = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="importance"):
        kernels.search_steps(np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32), Grid(4, -1), few, few)
