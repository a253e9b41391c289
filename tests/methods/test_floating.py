"""Rounding and GPTQ on floats: the paper's recursion worked independently, brute force over steps, weights in parts."""

from __future__ import annotations

import numpy as np
import pytest
from realistic import layer, loss

from penjing.errors import BadRecipe
from penjing.formats.floats import FloatGrid, FloatTensor
from penjing.methods import apply, awq, floating, gptq, rtn
from penjing.methods.statistics import Statistics
from penjing.presets import build

NUMBERS = {4: np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]), 8: None}
GRIDS = [FloatGrid("fp8", -1), FloatGrid("fp8", 0), FloatGrid("mxfp4", 32), FloatGrid("nvfp4", 16)]
IDS = ["fp8", "fp8-tensor", "mxfp4", "nvfp4"]


def e4m3() -> np.ndarray:
    codes = np.arange(127)
    return np.where(codes < 8, codes * 2.0**-9, (1 + codes % 8 / 8) * 2.0 ** (codes // 8 - 7))


def nearest(values: np.ndarray, bits: int) -> np.ndarray:
    """By distance to all numbers of the format."""
    numbers = NUMBERS[4] if bits == 4 else e4m3()
    return np.sign(values) * numbers[np.abs(np.abs(values)[..., None] - numbers).argmin(axis=-1)]


def steps_of(tensor: FloatTensor) -> np.ndarray:
    steps = tensor.scale.astype(np.float64) / float(tensor.divisor)
    rows, columns = tensor.shape
    return np.broadcast_to(np.repeat(steps, columns // steps.shape[1], axis=1), (rows, columns))


@pytest.mark.usefixtures("float_sums")
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_gptq_is_the_papers_recursion(grid: FloatGrid, act_order: bool) -> None:
    """OBQ with a fixed order, float64 (Frantar et al., 2022, equations (1) to (3)), rounding to the nearest float."""
    weight, _, statistics = layer(9, 288, 1)
    h = statistics["hessian"].astype(np.float64)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(len(h))
    found = gptq.solve(weight, statistics, gptq.Config(grid, "minmax", 0.01, act_order, sweeps=0))
    steps = steps_of(rtn.solve(weight, Statistics(), rtn.Config(grid)))
    np.testing.assert_array_equal(steps, steps_of(found))
    inverse = np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(len(h)))
    w, done = weight.astype(np.float64), np.zeros(weight.shape)
    for p in order:
        done[:, p] = nearest(w[:, p] / steps[:, p], grid.bits) * steps[:, p]
        w -= np.outer((w[:, p] - done[:, p]) / inverse[p, p], inverse[p])
        inverse -= np.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        inverse[p, p] = 1
    same = np.isclose(found.decode().astype(np.float64), done, rtol=2**-8)
    assert same.mean() > 0.98  # a number that lies between two codes may turn, and moves the rest of its row


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_gptq_loses_less_than_rounding_and_sweeps_less_still(grid: FloatGrid) -> None:
    weight, _, statistics = layer(32, 128, 2)

    def lost(tensor: FloatTensor) -> float:
        return loss(weight, tensor.decode().astype(np.float32), statistics["hessian"])

    plain = lost(rtn.solve(weight, Statistics(), rtn.Config(grid)))
    once = lost(gptq.solve(weight, statistics, gptq.Config(grid, sweeps=0)))
    swept = lost(gptq.solve(weight, statistics, gptq.Config(grid, sweeps=2)))
    assert swept < once < 0.8 * plain


@pytest.mark.parametrize("grid", GRIDS[2:], ids=IDS[2:])
def test_the_search_of_steps_is_that_by_brute_force(grid: FloatGrid) -> None:
    weight, _, _ = layer(6, 64, 3)
    cost = np.random.default_rng(0).random(64).astype(np.float32)
    divisor = grid.divisor(float(np.abs(weight).max()))
    found = floating.fit(weight, grid, divisor, "importance", cost)
    for row, column in np.ndindex(found.shape):
        part = slice(column * grid.group_size, (column + 1) * grid.group_size)
        values, reach = weight[row, part].astype(np.float64), np.abs(weight[row, part]).max()
        trials = {float(grid.steps(np.float32(reach * share), divisor)) for share in floating.SHARES[grid.kind]}

        def error(step: float, values: np.ndarray = values, part: slice = part) -> float:
            at = step / float(divisor)
            return float((np.square(nearest(values / at, grid.bits) * at - values) * cost[part]).sum())

        assert error(float(found[row, column])) == pytest.approx(min(error(step) for step in trials), rel=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_what_was_pruned_stays_pruned(grid: FloatGrid) -> None:
    weight, _, statistics = layer(16, 128, 4)
    weight[np.random.default_rng(0).random(weight.shape) < 0.5] = 0
    for tensor in (
        gptq.solve(weight, statistics, gptq.Config(grid)),
        rtn.solve(weight, Statistics(), rtn.Config(grid)),
    ):
        assert (tensor.decode()[weight == 0] == 0).all()


@pytest.mark.parametrize("scheme", ["fp8_dynamic", "fp8", "mxfp4a16", "nvfp4a16"])
def test_parts_with_a_reach_make_the_whole(scheme: str) -> None:
    weight, _, _ = layer(40, 64, 5)
    rule = build(scheme).rules[0]
    assert apply.by_rows(rule)
    reach = float(np.abs(weight).max())

    def solve(part: np.ndarray) -> apply.Solution:
        return apply.solve(rule, part, Statistics(), scale_dtype="bfloat16", seed=0, reach=reach)

    whole, joined = solve(weight), apply.join([solve(weight[:7]), solve(weight[7:32]), solve(weight[32:])])
    assert isinstance(whole, FloatTensor)
    assert isinstance(joined, FloatTensor)
    np.testing.assert_array_equal(whole.codes, joined.codes)
    np.testing.assert_array_equal(whole.scale, joined.scale)
    assert whole.divisor == joined.divisor
    assert not apply.by_rows(build("fp8_block").rules[0])


def test_awq_tries_its_scales_on_the_floats_themselves() -> None:
    weight, _, statistics = layer(24, 64, 6)
    weight[:, :4] *= 8
    grid = FloatGrid("mxfp4", 32)
    scale = awq.solve([weight], statistics, awq.Config(grid))
    hessian = statistics["hessian"]
    assert awq.error([weight], scale, hessian, grid) < awq.error([weight], np.ones(64, np.float32), hessian, grid)


def test_pruned_floats_are_rounded_to_after_pruning() -> None:
    for pattern, method in (("unstructured", "gradual"), ("2:4", "sparsegpt")):
        rule = build(format="mxfp4", sparsity=0.5, pattern=pattern, with_data=True).rules[0]
        assert rule.prune is not None
        assert rule.quantize is not None
        assert (rule.prune.method, rule.quantize.method) == (method, "gptq")


@pytest.mark.parametrize("method", ["hqq", "imatrix", "autoround"])
def test_methods_of_integers_say_which_know_floats(method: str) -> None:
    message = f"method {method} makes integers; format=nvfp4 takes rtn, or gptq with text"
    with pytest.raises(BadRecipe, match=message):
        apply.check(build(method=method, format="nvfp4").rules[0])
    with pytest.raises(BadRecipe, match="method joint makes integers; format=fp8"):
        apply.check(build(method="joint", prune_method="joint", format="fp8", sparsity=0.5).rules[0])
    with pytest.raises(BadRecipe, match="observer='percentile' is not one that floats have"):
        apply.check(build(format="fp8", observer="percentile").rules[0])
