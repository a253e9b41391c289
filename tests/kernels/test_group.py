"""Integer weights of any bits and groups × int8 activations, against the numpy twin and exact bounds."""

from __future__ import annotations

import numpy as np
import pytest

from penjing import kernels
from penjing.formats.affine import AffineTensor, Grid
from penjing.formats.mxfp4 import Mxfp4Tensor
from penjing.kernels import reference

UNITS = {2: 16, 3: 32, 4: 8}  # columns that are packed together, dense
BATCHES = (0, 1, 2, 3, 4, 5, 8, 9, 17, 50)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def weight_of(rows: int, columns: int, grid: Grid, sparse: bool) -> AffineTensor:
    weight = random(rows, columns)
    if sparse:
        weight[np.random.default_rng(1).random(weight.shape) < 0.5] = 0
    return reference.quantize(weight, grid)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 0, 3, 32, 64, 96, 128, 130, 192, 256])
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_are_those_of_the_twin(bits: int, group: int, symmetric: bool, sparse: bool) -> None:
    for rows, groups in ((1, 1), (17, 2), (67, 3), (130, 1)):
        columns = (group if group > 0 else 77) * groups
        tensor = weight_of(rows, columns, Grid(bits, group, symmetric, ("float32", "bfloat16")[rows % 2]), sparse)
        matrix = kernels.matrix_from(tensor, activations="int8-groups", sparse=sparse)
        assert (matrix.decode() == tensor.decode()).all()
        x, bias = random(max(BATCHES), columns, seed=3), random(rows, seed=4)
        x[5:] *= 30
        expected = reference.group_matrix(x, tensor, bias, 4 if sparse else UNITS.get(bits, 4))
        whole = matrix(x, bias)
        bound = 1e-6 * (np.abs(x) @ np.abs(tensor.decode()).T + np.abs(bias))
        assert (np.abs(whole - expected) <= bound).all()
        for m in BATCHES:  # a row's result does not depend on the rows beside it
            assert (matrix(x[:m], bias) == whole[:m]).all()


@pytest.mark.parametrize("activations", ["int8", "int8-groups"])
def test_batch_and_threads_do_not_change_a_bit(activations: str) -> None:
    tensor = weight_of(1100, 1024, Grid(8, -1, True), False)
    matrix = kernels.matrix_from(tensor, activations=activations)
    x = random(1024, 1024, seed=3)
    whole, threads = matrix(x), kernels.threads()
    for m in (1, 6, 8, 13, 100, 512):
        assert (matrix(x[:m]) == whole[:m]).all()
    try:
        for count in (1, 3):
            kernels.set_threads(count)
            assert (matrix(x) == whole).all()
            assert (matrix(x[:3]) == whole[:3]).all()
    finally:
        kernels.set_threads(threads)


@pytest.mark.parametrize("bits", [4, 8])
def test_error_of_activations_is_within_half_a_step(bits: int) -> None:
    tensor = weight_of(96, 512, Grid(bits, 128), False)
    x, weight = random(20, 512, seed=3), tensor.decode()
    y = kernels.matrix_from(tensor, activations="int8-groups")(x)
    step = np.abs(x).reshape(20, 4, 128).max(axis=2) / 127
    bound = step / 2 @ np.abs(weight).reshape(96, 4, 128).sum(axis=2).T
    assert (np.abs(y - x.astype(np.float64) @ weight.T) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("activations", ["int8", "int8-groups"])
def test_extreme_codes_do_not_saturate(activations: str, code: int) -> None:
    """255 · 127 · 2 overflows the 16 bits in which some instructions sum pairs."""
    tensor = AffineTensor(np.full((20, 4096), code, np.int8), np.ones((20, 1), np.float32), None, Grid(8))
    twin = reference.int8_matrix if activations == "int8" else reference.group_matrix
    matrix = kernels.matrix_from(tensor, activations=activations, sparse=False)
    for value in (-1, 1):
        for m in (2, 20):
            x = np.full((m, 4096), value, np.float32)
            assert np.allclose(matrix(x), twin(x, tensor), rtol=1e-6)


def test_zeros_tiny_and_bad_activations() -> None:
    tensor = weight_of(33, 256, Grid(4, 128), False)
    matrix = kernels.matrix_from(tensor, activations="int8-groups")
    assert (matrix(np.zeros((3, 256), np.float32)) == 0).all()
    assert np.isfinite(matrix(np.full((1, 256), 1e-42, np.float32))).all()
    x = random(10, 256)
    good = matrix(x)
    x[4, 7], x[6, 200] = np.nan, np.inf
    bad = matrix(x)
    assert not np.isfinite(bad[[4, 6]]).any()  # not silently a number
    assert (np.delete(bad, [4, 6], axis=0) == np.delete(good, [4, 6], axis=0)).all()


@pytest.mark.parametrize(("bits", "expected"), [(8, 8), (4, 4), (3, 3), (2, 2), (6, 8)])
def test_resident_bytes(bits: int, expected: int) -> None:
    tensor = weight_of(256, 512, Grid(bits, 128, scale_dtype="bfloat16"), False)
    matrix = kernels.matrix_from(tensor, activations="int8-groups")
    assert matrix.nbytes == 256 * 512 * expected // 8 + 256 * 4 * 2
    assert matrix.layout == f"int{expected}-int8-groups"


def test_half_of_the_weights_take_less_memory() -> None:
    for bits, share in ((8, 0.65), (4, 0.79)):
        tensor = weight_of(256, 1024, Grid(bits, 128, scale_dtype="bfloat16"), True)
        dense, sparse = (kernels.matrix_from(tensor, activations="int8-groups", sparse=s).nbytes for s in (False, True))
        assert sparse < share * dense


def test_mxfp4() -> None:
    """E2M1 is an integer grid of half units, so its products are those of integers with the step halved."""
    rng = np.random.default_rng(0)
    for rows, groups in ((1, 1), (35, 5), (16, 9)):
        scales = rng.integers(100, 130, (rows, groups)).astype(np.uint8)
        tensor = Mxfp4Tensor(rng.integers(0, 256, (rows, groups, 16)).astype(np.uint8), scales)
        matrix = kernels.matrix_from(tensor, activations="int8-groups")
        weight = tensor.decode().astype(np.float32)
        assert (matrix.decode() == weight).all()
        assert matrix.layout == "mxfp4-int8-groups"
        twice = (weight.reshape(rows, groups, 32) / np.exp2(scales.astype(np.float32) - 128)[..., None]).astype(np.int8)
        grid = AffineTensor(twice.reshape(rows, -1), np.exp2(scales.astype(np.float32) - 128), None, Grid(8, 32))
        x = random(20, groups * 32)
        y = matrix(x)
        bound = 1e-6 * (np.abs(x) @ np.abs(weight).T)
        assert (np.abs(y - reference.group_matrix(x, grid)) <= bound).all()
        for m in (1, 3, 8):
            assert (matrix(x[:m]) == y[:m]).all()
        floats = kernels.matrix_from(tensor)
        assert floats.layout == "bfloat16"
        assert (floats.decode() == weight).all()


def test_mxfp4_of_wrong_shape_is_refused() -> None:
    tensor = Mxfp4Tensor(np.zeros((2, 3, 16), np.uint8), np.zeros((2, 4), np.uint8))
    with pytest.raises(ValueError, match="scale"):
        kernels.matrix_from(tensor, activations="int8-groups")
