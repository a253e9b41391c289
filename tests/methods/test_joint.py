"""Joint pruning and quantization against brute force, closed forms, and one after the other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from realistic import hessian, layer, loss

from penjing.errors import BadInput, BadRecipe
from penjing.formats.affine import Grid
from penjing.methods import gptq, gradual, joint, sparsegpt


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, 64, False), Grid(4, -1)], ids=str)
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_less_is_lost_than_by_sparsegpt_then_gptq(seed: int, pattern: tuple[int, int] | None, grid: Grid) -> None:
    weight, _, statistics = layer(64, 192, seed)
    h = statistics["hessian"]
    found = joint.solve(weight, statistics, joint.Config(grid, 0.5, pattern=pattern))
    pruned = sparsegpt.solve(weight, statistics, sparsegpt.Config(0.5, pattern=pattern, sweeps=0))
    one_by_one = gptq.solve(pruned, statistics, gptq.Config(grid, "minmax", sweeps=0))
    assert loss(weight, found.decode(), h) < 0.85 * loss(weight, one_by_one.decode(), h)


def test_at_two_bits_knowing_the_quantization_pays() -> None:
    """The same stages and sweeps one after the other, with masks that do not know of rounding, lose more."""
    known = blind = 0.0
    for seed in range(4):
        weight, _, statistics = layer(48, 128, seed)
        h, grid = statistics["hessian"], Grid(2, 32, False)
        known += loss(weight, joint.solve(weight, statistics, joint.Config(grid, 0.3)).decode(), h)
        pruned = gradual.solve(weight, statistics, gradual.Config(0.3))
        blind += loss(weight, gptq.solve(pruned, statistics, gptq.Config(grid, sweeps=3)).decode(), h)
    assert known < 0.98 * blind


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(3, -1, False), Grid(8, 0)], ids=str)
def test_as_many_go_as_asked_and_decode_to_zero(grid: Grid) -> None:
    weight, _, statistics = layer(9, 40, 1)
    weight += np.float32(0.1)
    for pattern in (None, (1, 4)):
        tensor = joint.solve(weight, statistics, joint.Config(grid, 0.75, pattern=pattern))
        zeros = tensor.decode() == 0
        assert (zeros.sum(axis=1) >= 30).all()
        if pattern:
            assert (zeros.reshape(-1, 4).sum(axis=1) >= 3).all()
    tensor = joint.solve(weight, statistics, joint.Config(grid, 0.5, "tensor"))
    assert (tensor.decode() == 0).sum() >= round(0.5 * weight.size)


def test_uncorrelated_inputs_have_a_closed_form() -> None:
    """Each weight by itself: the ones go whose pruning costs least beyond their rounding, the rest are rounded."""
    weight = layer(5, 40, 2)[0]
    variance = np.exp(np.random.default_rng(3).standard_normal(40)).astype(np.float32)
    found = joint.solve(
        weight, hessian(np.diag(variance)), joint.Config(Grid(4, -1), 0.5, damping=0, stages=1, sweeps=0)
    )
    step = gptq.solve(weight, hessian(np.diag(variance)), gptq.Config(Grid(4, -1), damping=0, sweeps=0)).scale
    rounded = np.clip(np.rint(weight / step), -8, 7) * step
    cost = variance * (weight**2 - (weight - rounded) ** 2)
    gone = np.argsort(np.maximum(cost, 1e-30), axis=1, kind="stable")[:, :20]
    kept = np.ones(weight.shape, bool)
    np.put_along_axis(kept, gone, False, axis=1)
    wrong = (found.decode() != 0) & ~kept
    assert wrong.sum() == 0
    # steps are fitted once more, to the survivors
    nearest = np.clip(np.rint(weight / found.scale), -8, 7)
    np.testing.assert_array_equal(found.codes[kept], nearest[kept])


def test_near_the_best_of_all_masks_codes_and_steps() -> None:
    codes = np.array(list(itertools.product(range(-2, 2), repeat=6)))
    codes = codes[(codes == 0).sum(axis=1) >= 3]
    total = least = 0.0
    for seed in range(8):
        weight, _, statistics = layer(1, 6, seed)
        h = statistics["hessian"].astype(np.float64)
        found = joint.solve(weight, statistics, joint.Config(Grid(2, -1), 0.5, damping=1e-3))
        # for given codes the best step is in closed form: what is left is w H w − (w H q)² / (q H q)
        along, power = codes @ h @ weight[0], np.einsum("oi,ij,oj->o", codes, h, codes)
        whole = loss(weight, 0 * weight, h)
        best = whole - (np.maximum(along, 0) ** 2 / np.where(power > 0, power, 1)).max()
        lost = loss(weight, found.decode(), h)
        assert best * 0.999 <= lost <= whole
        total, least = total + lost / whole, least + best / whole
    assert total < 2 * least


def test_what_is_wrong_is_named() -> None:
    weight, _, statistics = layer(3, 10, 0)
    with pytest.raises(BadInput, match="group_size=4 does not divide"):
        joint.solve(weight, statistics, joint.Config(Grid(4, 4), 0.5))
    with pytest.raises(BadInput, match="pattern 2:4 does not divide 10 columns"):
        joint.solve(weight, statistics, joint.Config(Grid(4), 0.5, pattern=(2, 4)))
    for wrong, message in (
        ({"sparsity": 0.0}, "between 0 and 1"),
        ({"damping": 2}, "damping=2"),
        ({"stages": 0}, "stages=0"),
        ({"observer": "mean"}, "observer='mean' is unknown"),
    ):
        with pytest.raises(BadRecipe, match=message):
            joint.Config(**({"grid": Grid(4), "sparsity": 0.5} | wrong))  # type: ignore[arg-type]
