"""Methods against brute force: what is kept, what a code is, and what an observer changes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from penjing import methods
from penjing.errors import BadRecipe
from penjing.formats import affine
from penjing.formats.affine import AffineTensor, Grid
from penjing.methods import apply, magnitude, random, rtn
from penjing.recipe import Prune, Quantize, Rule

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def weights(shape: tuple[int, int], dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["l1", "l2"])
@pytest.mark.parametrize(("scope", "parts"), [("row", 7), ("tensor", 1)])
def test_magnitude_keeps_the_largest(method: str, scope: str, parts: int, dtype: type) -> None:
    weight = weights((7, 30), dtype)
    config = magnitude.Config(0.4, scope)  # type: ignore[arg-type]
    pruned = methods.pruner(method).solve(weight, {}, config)
    assert pruned.dtype == weight.dtype
    for before, after in zip(weight.reshape(parts, -1), pruned.reshape(parts, -1), strict=True):
        kept = after != 0
        assert (~kept).sum() == round(0.4 * before.size)
        np.testing.assert_array_equal(after[kept], before[kept])
        assert np.abs(before[~kept]).astype(np.float32).max() <= np.abs(before[kept]).astype(np.float32).min()


def test_n_of_m_keeps_n_of_each_m() -> None:
    weight = weights((5, 24))
    pruned = magnitude.solve(weight, {}, magnitude.Config(0.5, pattern=(3, 8)))
    for before, after in zip(weight.reshape(-1, 8), pruned.reshape(-1, 8), strict=True):
        assert set(np.flatnonzero(after)) == set(np.argsort(-np.abs(before))[:3])


def test_random_depends_on_the_seed_alone() -> None:
    weight = weights((64, 64))
    first, again, other = (random.solve(weight, {}, magnitude.Config(0.25, "tensor", seed=s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first == 0).sum() == (other == 0).sum() == 1024
    overlap = ((first == 0) & (other == 0)).sum() / 1024
    assert 0.15 < overlap < 0.35  # two independent quarters meet in a sixteenth
    kept = first != 0
    np.testing.assert_array_equal(first[kept], weight[kept])
    by_row = random.solve(weight, {}, magnitude.Config(0.25, "row", seed=1))
    assert ((by_row == 0).sum(axis=1) == 16).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_round_to_nearest_is_nearest(bits: int, group_size: int, symmetric: bool, dtype: type) -> None:
    weight = weights((6, 48), dtype, bits)
    grid = Grid(bits, group_size, symmetric, "bfloat16")
    tensor = rtn.solve(weight, {}, rtn.Config(grid))
    assert (tensor.scale == tensor.scale.astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    codes = np.arange(grid.qmin, grid.qmax + 1)
    groups = tensor.scale.shape[1]
    for row, column in np.ndindex(weight.shape):
        at = (row if len(tensor.scale) > 1 else 0, column * groups // weight.shape[1])
        zero = 0 if tensor.zero_point is None else int(tensor.zero_point[at])
        distance = np.abs((codes - zero) * tensor.scale[at] - np.float32(weight[row, column]))
        assert distance[int(tensor.codes[row, column]) - grid.qmin] <= distance.min() * (1 + 1e-5) + 1e-6


def test_mse_observer_has_less_error_than_min_max() -> None:
    weight = np.random.default_rng(1).standard_t(3, (8, 512)).astype(np.float32)
    grid = Grid(4, 128)
    error = {
        name: np.square(rtn.solve(weight, {}, rtn.Config(grid, name)).decode() - weight).sum()
        for name in ("minmax", "mse")
    }
    assert error["mse"] < error["minmax"]


@pytest.mark.parametrize(
    "quantize",
    [
        None,
        Quantize(bits=4, group_size=8),
        Quantize(bits=3, group_size=8, symmetric=False),
        Quantize("hqq", bits=3, group_size=8, symmetric=False),
    ],
)
@pytest.mark.parametrize("prune", [None, Prune(sparsity=0.5), Prune(pattern="2:4")])
def test_rows_solved_apart_are_the_whole(quantize: Quantize | None, prune: Prune | None) -> None:
    rule = Rule(("*",), quantize, prune)
    weight = weights((10, 32))
    assert apply.by_rows(rule)
    whole = apply.solve(rule, weight, {}, scale_dtype="float32", seed=0)
    joined = apply.join(
        [apply.solve(rule, weight[low : low + 4], {}, scale_dtype="float32", seed=0) for low in range(0, 10, 4)]
    )
    if isinstance(whole, AffineTensor):
        assert isinstance(joined, AffineTensor)
        np.testing.assert_array_equal(joined.decode(), whole.decode())
        if prune is not None:
            assert ((whole.decode() == 0).reshape(10, -1).mean(axis=1) >= 0.5).all()
    else:
        np.testing.assert_array_equal(joined, whole)


def test_pruned_weights_decode_to_zero_exactly() -> None:
    rule = Rule(("*",), Quantize(bits=4, group_size=16, symmetric=False), Prune(sparsity=0.75))
    weight = weights((9, 64)) + np.float32(0.3)
    solved = apply.solve(rule, weight, {}, scale_dtype="bfloat16", seed=0)
    assert isinstance(solved, AffineTensor)
    gone = magnitude.solve(weight, {}, magnitude.Config(0.75)) == 0
    assert (affine.decode(solved.codes, solved.scale, solved.zero_point)[gone] == 0).all()


def test_what_may_not_be_cut_into_rows() -> None:
    assert not apply.by_rows(Rule(("*",), prune=Prune(scope="tensor")))
    assert not apply.by_rows(Rule(("*",), prune=Prune(method="random")))
    assert not apply.by_rows(Rule(("*",), Quantize(bits=8, group_size=0, activations="int8")))


def test_unknown_methods_and_bad_settings() -> None:
    with pytest.raises(BadRecipe, match="quantization method 'rtm' is unknown; did you mean 'rtn'"):
        methods.quantizer("rtm")
    with pytest.raises(BadRecipe, match="pruning method 'l3' is unknown; known: gradual, joint, l1, l2, obs"):
        methods.pruner("l3")
    with pytest.raises(BadRecipe, match="between 0 and 1"):
        magnitude.Config(1.0)
    with pytest.raises(BadRecipe, match="0 < N < M"):
        magnitude.Config(0.5, pattern=(4, 4))
