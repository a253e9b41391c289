"""GPTQ against the paper's recursion worked independently, brute force, and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from realistic import hessian, layer, loss

from penjing import kernels
from penjing.errors import BadInput, BadRecipe
from penjing.formats.affine import Grid
from penjing.methods import gptq, rtn, sparsegpt
from penjing.methods.statistics import Statistics


def textbook(weight: np.ndarray, h: np.ndarray, damping: float, order: np.ndarray, grid: Grid) -> np.ndarray:
    """OBQ with a fixed order, float64: round a column, move the rest by the inverse hessian, take the column out of it.

    Steps of each row from the weight as it is, min-max. After Frantar et al., 2022, equations (1) to (3).
    """
    w = weight.astype(np.float64).copy()
    inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(len(h)))
    fitted = rtn.solve(weight, Statistics(), rtn.Config(grid))
    scale = np.repeat(fitted.scale.astype(np.float64), weight.shape[1] // fitted.scale.shape[1], axis=1)
    zero = 0.0
    if fitted.zero_point is not None:
        zero = np.repeat(fitted.zero_point.astype(np.float64), weight.shape[1] // fitted.scale.shape[1], axis=1)
    zero = np.broadcast_to(zero, weight.shape)
    done = np.zeros_like(w)
    for p in order:
        q = np.clip(np.rint(w[:, p] / scale[:, p] + zero[:, p]), grid.qmin, grid.qmax)
        done[:, p] = (q - zero[:, p]) * scale[:, p]
        w -= np.outer((w[:, p] - done[:, p]) / inverse[p, p], inverse[p])
        inverse -= np.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        inverse[p, p] = 1  # never read again
    return done


@pytest.mark.usefixtures("float_sums")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("columns", "group", "act_order"),
    [(24, -1, False), (300, -1, False), (24, -1, True), (300, -1, True), (300, 100, True), (288, 32, True)],
)
def test_codes_are_those_of_the_papers_recursion(columns: int, group: int, act_order: bool, symmetric: bool) -> None:
    weight, _, statistics = layer(9, columns, columns)
    h = statistics["hessian"].astype(np.float64)
    grid = Grid(4, group, symmetric)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(columns)
    tensor = gptq.solve(weight, statistics, gptq.Config(grid, "minmax", 0.01, act_order, sweeps=0))
    expected = textbook(weight, h, 0.01, order, grid)
    same = np.isclose(tensor.decode(), expected, rtol=1e-3, atol=1e-6)
    # a value on the border of two codes may fall to either in float32, and a row goes another way from there
    assert same.all(axis=1).sum() >= 8
    assert loss(weight, tensor.decode(), h) == pytest.approx(loss(weight, expected, h), rel=0.05)


def test_steps_of_a_group_follow_the_errors_before_it() -> None:
    """Without act_order the second group is fitted to where its weights have moved: two runs by hand."""
    weight, _, statistics = layer(5, 32, 3)
    h = statistics["hessian"].astype(np.float64)
    tensor = gptq.solve(weight, statistics, gptq.Config(Grid(4, 16), "minmax", 0.01, act_order=False, sweeps=0))
    damped = h + 0.01 * np.diag(h).mean() * np.eye(32)
    first = weight[:, :16].astype(np.float64) - tensor.decode()[:, :16]
    # the best place of the second half, all at once, for the errors of the first: its own normal equations
    moved = weight[:, 16:] + first @ damped[:16, 16:] @ np.linalg.inv(damped[16:, 16:])
    reach = np.abs(moved).max(axis=1) / 7.5
    np.testing.assert_allclose(tensor.scale[:, 1], reach, rtol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_between_the_best_of_all_roundings_and_rounding_to_nearest(seed: int) -> None:
    weight, _, statistics = layer(3, 6, seed)
    h, grid = statistics["hessian"], Grid(2, -1)
    nearest = rtn.solve(weight, statistics, rtn.Config(grid))
    found = gptq.solve(weight, statistics, gptq.Config(grid, "minmax", 1e-4, sweeps=0))
    np.testing.assert_array_equal(found.scale, nearest.scale)
    codes = np.array(list(itertools.product(range(grid.qmin, grid.qmax + 1), repeat=6)))
    best = sum(
        min(loss(row[None], (codes[i : i + 1] * step), h) for i in range(len(codes)))
        for row, step in zip(weight, nearest.scale, strict=True)
    )
    assert best * 0.999 <= loss(weight, found.decode(), h)
    assert loss(weight, found.decode(), h) <= loss(weight, nearest.decode(), h) * 1.001


@pytest.mark.parametrize("group", [-1, 0, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_uncorrelated_inputs_leave_rounding_to_nearest(group: int, symmetric: bool) -> None:
    weight = layer(7, 32, 1)[0]
    h = hessian(np.diag(np.exp(np.random.default_rng(0).standard_normal(32))))
    grid = Grid(3, group, symmetric)
    for sweeps in (0, 2):
        tensor = gptq.solve(weight, h, gptq.Config(grid, "minmax", sweeps=sweeps))
        if sweeps == 0 or group == 0:
            nearest = rtn.solve(weight, h, rtn.Config(grid))
            np.testing.assert_array_equal(tensor.scale, nearest.scale)
            np.testing.assert_array_equal(tensor.codes, nearest.codes)


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, -1, False), Grid(2, 16, False), Grid(4, 256)], ids=str)
def test_sweeps_never_lose(grid: Grid) -> None:
    weight, _, statistics = layer(40, 256, 2)
    h = statistics["hessian"]
    damped = h + 0.01 * np.diag(h).mean() * np.eye(256)
    losses = [
        loss(weight, gptq.solve(weight, statistics, gptq.Config(grid, sweeps=sweeps)).decode(), damped)
        for sweeps in (0, 1, 2, 4, 8)
    ]
    assert (np.diff(losses) <= 1e-4 * losses[0]).all()
    assert losses[-1] < losses[0] * 0.99
    assert losses[0] < 0.75 * loss(weight, rtn.solve(weight, statistics, rtn.Config(grid)).decode(), damped)


def test_sweeps_never_lose_where_one_direction_holds_most_of_the_input() -> None:
    """Slopes are small differences of large sums then, which bfloat16 would lose."""
    rng = np.random.default_rng(0)
    along = rng.standard_normal((2048, 1)) * rng.standard_normal(1024)
    x = rng.standard_normal((2048, 1024)) + 10 * along
    weight, h = rng.standard_normal((64, 1024)).astype(np.float32), x.T @ x / len(x)
    damped = h + 0.01 * np.diag(h).mean() * np.eye(1024)
    losses = [
        loss(weight, gptq.solve(weight, hessian(h), gptq.Config(Grid(3, 128), sweeps=sweeps)).decode(), damped)
        for sweeps in (0, 1, 2)
    ]
    assert (np.diff(losses) <= 0).all()


@pytest.mark.skipif(not kernels.has_pairs(), reason="this machine does not multiply pairs of bfloat16")
@pytest.mark.parametrize("outlier", [1, 100])
@pytest.mark.parametrize("act_order", [False, True])
def test_sums_in_pairs_lose_next_to_nothing(act_order: bool, outlier: float, request: pytest.FixtureRequest) -> None:
    """outlier: how many times as large one column of the input is, on which all others depend a little."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2048, 512)) + 0.3 * rng.standard_normal((2048, 1))
    x[:, 77] *= outlier
    weight, h = rng.standard_normal((96, 512)).astype(np.float32), x.T @ x / len(x)

    def lost() -> float:
        solved = gptq.solve(weight, hessian(h), gptq.Config(Grid(3, 128), act_order=act_order, sweeps=0))
        return loss(weight, solved.decode(), h)

    in_pairs = lost()
    request.getfixturevalue("float_sums")
    assert in_pairs == pytest.approx(lost(), rel=0.01)


def test_after_enough_sweeps_no_single_code_can_be_better() -> None:
    weight, _, statistics = layer(4, 24, 5)
    tensor = gptq.solve(weight, statistics, gptq.Config(Grid(3, -1), damping=0.01, sweeps=100))
    h = statistics["hessian"].astype(np.float64)
    h += 0.01 * np.diag(h).mean() * np.eye(24)
    least = loss(weight, tensor.decode(), h)
    for row, column, step in itertools.product(range(4), range(24), (-1, 1)):
        codes = tensor.codes.copy()
        codes[row, column] = np.clip(codes[row, column] + step, -4, 3)
        assert loss(weight, codes * tensor.scale, h) >= least * (1 - 1e-5)


def test_pruned_weights_stay_pruned() -> None:
    weight, _, statistics = layer(10, 64, 4)
    pruned = sparsegpt.solve(weight, statistics, sparsegpt.Config(0.5))
    for grid in (Grid(4, 16), Grid(3, -1, False)):
        for act_order in (False, True):
            tensor = gptq.solve(pruned, statistics, gptq.Config(grid, act_order=act_order))
            assert (tensor.decode()[pruned == 0] == 0).all()


@pytest.mark.parametrize(("out", "columns"), [(1, 1), (1, 9), (9, 1), (130, 150)])
def test_odd_shapes_and_dead_inputs(out: int, columns: int) -> None:
    weight, _, statistics = layer(out, columns, 6, dead=(0,) if columns > 1 else ())
    for group in (-1, 0, columns):
        tensor = gptq.solve(weight, statistics, gptq.Config(Grid(4, group)))
        assert tensor.shape == weight.shape
        assert np.isfinite(tensor.decode()).all()
        if columns > 1:  # nothing comes in, nothing is passed on to it: the nearest code
            nearest = np.clip(np.rint(weight[:, 0] / tensor.scale[:, 0]), -8, 7)
            np.testing.assert_array_equal(tensor.codes[:, 0], nearest)


def test_fewer_rows_than_columns() -> None:
    weight, _, statistics = layer(8, 64, 7, rows=10)
    tensor = gptq.solve(weight, statistics, gptq.Config(Grid(4, 16)))
    nearest = rtn.solve(weight, statistics, rtn.Config(Grid(4, 16)))
    h = statistics["hessian"]
    assert loss(weight, tensor.decode(), h) < 0.1 * loss(weight, nearest.decode(), h)


def test_rows_do_not_depend_on_one_another() -> None:
    weight, _, statistics = layer(300, 64, 8)
    config = gptq.Config(Grid(4, 32))
    whole = gptq.solve(weight, statistics, config)
    parts = [gptq.solve(weight[low : low + 100], statistics, config).decode() for low in range(0, 300, 100)]
    same = (np.concatenate(parts) == whole.decode()).all(axis=1)
    assert same.mean() > 0.5  # the others met a tie, which products of another shape sum to the other side
    h = statistics["hessian"]
    assert loss(weight, np.concatenate(parts), h) == pytest.approx(loss(weight, whole.decode(), h), rel=0.01)


def test_what_is_wrong_is_named() -> None:
    weight, _, statistics = layer(3, 10, 0)
    with pytest.raises(BadInput, match="group_size=4 does not divide 10 columns"):
        gptq.solve(weight, statistics, gptq.Config(Grid(4, 4)))
    with pytest.raises(BadInput, match="needs calibration"):
        gptq.solve(weight, Statistics(), gptq.Config(Grid(4)))
    with pytest.raises(BadRecipe, match="damping=-1: give a number from 0 to 1"):
        gptq.Config(Grid(4), damping=-1)
    with pytest.raises(BadRecipe, match=r"sweeps=1\.5: give a whole number"):
        gptq.Config(Grid(4), sweeps=1.5)  # type: ignore[arg-type]
    with pytest.raises(BadRecipe, match="act_order=1: give true or false"):
        gptq.Config(Grid(4), act_order=1)  # type: ignore[arg-type]
    with pytest.raises(BadRecipe, match="did you mean 'importance'"):
        gptq.Config(Grid(4), observer="importanse")
