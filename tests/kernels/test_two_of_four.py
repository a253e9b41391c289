"""Weights of which two of each four are kept: a layout of fixed length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from penjing import kernels
from penjing.formats.affine import AffineTensor, Grid
from penjing.kernels import reference

BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 50)
LAYOUT = "int4-int8-groups-2:4"


def two_of_four(rows: int, columns: int, group: int) -> AffineTensor:
    """At most two codes of each four, in all six places, and every code among them."""
    rng = np.random.default_rng([rows, columns])
    codes = rng.integers(-8, 8, (rows, columns // 4, 4)).astype(np.int8)
    places = np.array(list(itertools.combinations(range(4), 2)))[rng.integers(0, 6, codes.shape[:2])]
    kept = np.zeros(codes.shape, bool)
    np.put_along_axis(kept, places, True, axis=2)
    groups = 1 if group < 0 else columns // group
    scale = rng.random((rows, groups)).astype(np.float32) + 0.5
    return AffineTensor((codes * kept).reshape(rows, columns), scale, None, Grid(4, group))


@pytest.mark.parametrize("group", [-1, 128, 256, 384])
def test_products_are_those_of_the_twin_and_of_the_dense_layout(group: int) -> None:
    for rows, columns in ((1, 768), (17, 768), (67, 1536), (130, 2304)):
        tensor = two_of_four(rows, columns, group)
        matrix = kernels.matrix_from(tensor, activations="int8-groups")
        assert matrix.layout == LAYOUT
        assert (matrix.decode() == tensor.decode()).all()
        rng = np.random.default_rng(3)
        x = rng.standard_normal((max(BATCHES), columns)).astype(np.float32)
        bias = rng.standard_normal(rows).astype(np.float32)
        expected = reference.group_matrix(x, tensor, bias)
        bound = 1e-6 * (np.abs(x) @ np.abs(tensor.decode()).T + np.abs(bias))
        dense = kernels.matrix_from(tensor, activations="int8-groups", sparse=False)(x, bias)
        assert (np.abs(dense - expected) <= bound).all()
        for m in BATCHES:
            assert (matrix(x[:m], bias) == dense[:m]).all()


def test_bits_a_weight() -> None:
    """Six of eight places and four codes of four bits: 2.75, beside the steps."""
    matrix = kernels.matrix_from(two_of_four(256, 1024, 128), activations="int8-groups")
    assert matrix.nbytes == 256 * 1024 * 11 // 32 + 256 * 8 * 4


def test_extreme_activations_and_codes() -> None:
    codes = np.zeros((20, 4096), np.int8)
    codes[:, ::2] = -8
    tensor = AffineTensor(codes, np.ones((20, 1), np.float32), None, Grid(4))
    matrix = kernels.matrix_from(tensor, activations="int8-groups")
    assert matrix.layout == LAYOUT
    for value in (-1, 1):
        for m in (1, 20):
            x = np.full((m, 4096), value, np.float32)
            assert np.allclose(matrix(x), reference.group_matrix(x, tensor), rtol=1e-6)


@pytest.mark.parametrize("bad", ["third", "zero point", "group"])
def test_what_does_not_fit_keeps_its_bitmask(bad: str) -> None:
    tensor = two_of_four(33, 768, 96 if bad == "group" else 128)
    zero_point = None
    if bad == "third":
        tensor.codes[32, 764:767] = 1
    if bad == "zero point":
        zero_point = np.zeros(tensor.scale.shape, np.int8)
    grid = Grid(4, tensor.grid.group_size, symmetric=bad != "zero point")
    tensor = AffineTensor(tensor.codes, tensor.scale, zero_point, grid)
    matrix = kernels.matrix_from(tensor, activations="int8-groups")
    assert matrix.layout == "int4-int8-groups-sparse"
    assert (matrix.decode() == tensor.decode()).all()
