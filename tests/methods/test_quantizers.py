"""imatrix, HQQ, AutoRound and their steps against brute force, closed forms and their published formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from realistic import hessian, layer, loss

from penjing.errors import BadInput, BadRecipe
from penjing.formats import affine
from penjing.formats.affine import Grid
from penjing.methods import autoround, hqq, imatrix, quantizer, rtn, steps
from penjing.methods.statistics import Statistics

GRIDS = [Grid(bits, -1, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
NEW = ["imatrix", "hqq", "autoround", "gptq"]


def weighted(values: np.ndarray, scale: float, zero: int, h: np.ndarray, grid: Grid) -> float:
    codes = np.clip(np.rint(values / scale + zero), grid.qmin, grid.qmax)
    return float((h * ((codes - zero) * scale - values.astype(np.float64)) ** 2).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_searched_steps_come_close_to_the_best_of_a_fine_search(grid: Grid) -> None:
    rng = np.random.default_rng(grid.bits)
    values = rng.standard_t(4, (6, 64)).astype(np.float32)
    h = np.exp(rng.standard_normal(64)).astype(np.float32)
    scale, zero = steps.search(values, h, grid)
    for row in range(6):
        found = weighted(values[row], float(scale[row, 0]), 0 if zero is None else int(zero[row, 0]), h, grid)
        reach = np.abs(values[row]).max()
        zeros = [0] if grid.symmetric else range(max(grid.qmin, -20), min(grid.qmax, 20) + 1)
        tried = reach * 2 / (grid.qmax - grid.qmin) * np.linspace(0.3, 1.2, 300)
        if grid.bits == 8:  # 300 tries of a step and some of a zero point must not be luckier than a search may be
            tried = tried[::30]
            zeros = zeros if grid.symmetric else [int(zero[row, 0])]
        best = min(weighted(values[row], float(s), z, h, grid) for s in tried for z in zeros)
        assert found <= best * (1.1 if grid.bits < 4 else 1.25)  # of 8 bits the finest tuning is luck


def test_what_does_not_count_does_not_widen_a_range() -> None:
    values = np.array([[0.5, -0.25, 100.0, 0.125]], np.float32)
    scale, _ = steps.search(values, np.array([1, 1, 0, 1]), Grid(4, -1))
    assert scale[0, 0] < 0.1
    zeros, _ = steps.search(np.zeros((2, 4), np.float32), None, Grid(4, -1))
    np.testing.assert_array_equal(zeros, 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 0, 16])
def test_imatrix_loses_less_of_what_matters(group: int, symmetric: bool) -> None:
    weight, _, statistics = layer(20, 64, 1)
    grid = Grid(3, group, symmetric)
    h = np.square(statistics["input_norm"])
    tensor = imatrix.solve(weight, statistics, imatrix.Config(grid))
    lost = (h * (tensor.decode() - weight) ** 2).sum()
    for observer in ("minmax", "mse"):
        plain = rtn.solve(weight, statistics, rtn.Config(grid, observer))
        assert lost < (h * (plain.decode() - weight) ** 2).sum()
    codes = affine.encode(weight, tensor.scale, tensor.zero_point, grid)
    np.testing.assert_array_equal(codes, tensor.codes)
    even = imatrix.solve(weight, Statistics({"input_norm": np.zeros(64)}), imatrix.Config(grid))
    ones = imatrix.solve(weight, Statistics({"input_norm": np.ones(64)}), imatrix.Config(grid))
    np.testing.assert_array_equal(even.codes, ones.codes)


def test_shrinking_is_the_papers_formula() -> None:
    size = np.array([0, 1e-3, 0.1, 0.3, 2], np.float32)
    for beta, p in ((10.0, 0.7), (2.0, 1.0)):
        expected = [max(0.0, r - (r ** (p - 1) / beta if r else np.inf)) for r in size.tolist()]
        np.testing.assert_allclose(hqq.shrink(size, beta, p), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grid", [Grid(2, -1), Grid(3, -1, False), Grid(4, -1, False), Grid(4, -1)], ids=str)
def test_hqq_goes_down_to_a_fixed_point(grid: Grid) -> None:
    values = np.random.default_rng(0).standard_t(3, (30, 64)).astype(np.float32)
    first, _ = affine.fit(values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True), grid)

    def norm(turns: int) -> np.ndarray:
        scale, zero = hqq.fit(values, hqq.Config(grid, turns=turns))
        codes = np.clip(np.rint(values / scale + zero), grid.qmin, grid.qmax)
        return ((np.abs((codes - zero) * scale - values) / first) ** 0.7).sum(axis=1)

    norms = [norm(turns) for turns in (1, 2, 4, 8, 16, 200, 900, 1000)]
    for earlier, later in itertools.pairwise(norms):
        assert (later <= earlier * (1 + 1e-5)).all()
    assert norms[-2].sum() < 0.97 * norms[0].sum()
    np.testing.assert_allclose(norms[-1], norms[-2], rtol=1e-4)


def test_weights_on_a_grid_are_found_again() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(-8, 8, (6, 32)).astype(np.float32)
    codes[:, 0], codes[:, 1] = -8, 7
    weight = codes * np.float32(0.25)
    h = hessian(np.eye(32))
    both = Statistics({"hessian": h["hessian"], "input_norm": np.ones(32, np.float32)})
    for method in ("imatrix", "gptq"):
        module = quantizer(method)
        tensor = module.solve(weight, both, module.Config(Grid(4, -1)))
        np.testing.assert_allclose(tensor.decode(), weight, atol=1e-5)
    for method in NEW:
        module = quantizer(method)
        tensor = module.solve(weight + np.float32(0.5), both, module.Config(Grid(4, -1, False)))
        np.testing.assert_allclose(tensor.decode(), weight + 0.5, atol=1e-5)


def test_autoround_comes_close_to_the_best_of_all_roundings_up_and_down() -> None:
    total = least = 0.0
    for seed in range(8):
        weight, _, statistics = layer(1, 8, seed)
        h, grid = statistics["hessian"].astype(np.float64), Grid(3, -1)
        widest = rtn.solve(weight, statistics, rtn.Config(grid)).scale[0, 0]
        best = np.inf
        for share in np.linspace(0.5, 1, 51):
            below = np.floor(weight / (widest * share)) + np.array(list(itertools.product((0, 1), repeat=8)))
            error = weight - np.clip(below, -4, 3) * widest * share
            best = min(best, np.einsum("oi,ij,oj->o", error, h, error).min())
        found = autoround.solve(weight, statistics, autoround.Config(grid))
        total += loss(weight, found.decode(), h) / best
        least += 1
    assert least * 0.9 < total < least * 2.5


@pytest.mark.parametrize("grid", [Grid(3, -1), Grid(4, 16, False), Grid(2, 32), Grid(4, 0)], ids=str)
def test_autoround_is_never_worse_than_rounding_and_mostly_better(grid: Grid) -> None:
    weight, _, statistics = layer(24, 64, 4)
    h = statistics["hessian"]
    nearest = rtn.solve(weight, statistics, rtn.Config(grid)).decode()
    losses = []
    for iterations in (1, 20, 200):
        tensor = autoround.solve(weight, statistics, autoround.Config(grid, iterations))
        rows = [loss(w[None], q[None], h) for w, q in zip(weight, tensor.decode(), strict=True)]
        plain = [loss(w[None], q[None], h) for w, q in zip(weight, nearest, strict=True)]
        if grid.group_size != 0:
            assert (np.array(rows) <= np.array(plain) * 1.001).all()
        losses.append(sum(rows) / sum(plain))
    assert losses[0] <= 1.001
    assert losses[2] < 0.6
    assert losses[2] < losses[1]


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (3, 24)])
def test_odd_shapes_and_zeros(method: str, shape: tuple[int, int]) -> None:
    module = quantizer(method)
    weight, _, statistics = layer(*shape, 0)
    weight[0] = 0
    for group in (-1, 0, shape[1]):
        for symmetric in (True, False):
            tensor = module.solve(weight, statistics, module.Config(Grid(4, group, symmetric)))
            assert tensor.shape == shape
            assert np.isfinite(tensor.scale).all()
            assert (tensor.scale > 0).all()
            assert (tensor.decode()[0] == 0).all()
    with pytest.raises(BadInput, match="group_size=5 does not divide"):
        module.solve(weight, statistics, module.Config(Grid(4, 5)))


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(BadRecipe, match="power=0: give a number"):
        hqq.Config(Grid(4), power=0)
    with pytest.raises(BadRecipe, match="iterations=0: give a whole number"):
        autoround.Config(Grid(4), iterations=0)
    for method in ("imatrix", "autoround"):
        module = quantizer(method)
        with pytest.raises(BadInput, match="needs calibration"):
            module.solve(np.ones((2, 2), np.float32), Statistics(), module.Config(Grid(4, -1)))
