"""Products on every layout, against float64 and against exact integers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from penjing import kernels
from penjing.errors import BadInput, Unsupported
from penjing.formats import bitmask
from penjing.formats.affine import AffineTensor, Grid
from penjing.kernels import reference

FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]
SHAPES = [(1, 1), (1, 70), (17, 33), (40, 96), (67, 640)]  # weights: one row, odd, whole blocks, several chunks
BATCHES = (0, 1, 2, 3, 8, 17)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def pruned(weight: np.ndarray, share: float = 0.5) -> np.ndarray:
    return np.where(np.random.default_rng(1).random(weight.shape) < share, np.float32(0), weight)


def assert_product(matrix: kernels.Matrix, weight: np.ndarray) -> None:
    """`matrix` is `weight`, and multiplies by it: to the rounding of float32 sums."""
    assert (matrix.rows, matrix.columns) == weight.shape
    assert (matrix.decode() == weight).all()
    bias = random(len(weight), seed=2)
    for m in BATCHES:
        x = random(m, weight.shape[1], seed=3)
        exact = x.astype(np.float64) @ weight.T.astype(np.float64)
        bound = 1e-6 * np.sqrt(weight.shape[1]) * (np.abs(x) @ np.abs(weight).T + np.abs(bias) + 1)
        assert (np.abs(matrix(x) - exact) <= bound).all()
        assert (np.abs(matrix(x, bias) - (exact + bias)) <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: np.dtype(t).name)
def test_floats(shape: tuple[int, int], dtype: type) -> None:
    weight = random(*shape).astype(dtype)
    weight[0, 0] = 6e-8  # subnormal in half precision
    assert_product(kernels.matrix_from(weight, sparse=False), weight.astype(np.float32))
    kept = pruned(weight.astype(np.float32)).astype(dtype)
    assert_product(kernels.matrix_from(kept, sparse=True), kept.astype(np.float32))
    assert_product(kernels.matrix_from(bitmask.encode(kept)), kept.astype(np.float32))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 0, 32, 8, 3])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers(bits: int, group: int, symmetric: bool, sparse: bool) -> None:
    for shape in SHAPES:
        if group > 0 and shape[1] % group:
            continue
        weight = pruned(random(*shape)) if sparse else random(*shape)
        for scale_dtype in ("float32", "bfloat16"):
            tensor = reference.quantize(weight, Grid(bits, group, symmetric, scale_dtype))
            assert_product(kernels.matrix_from(tensor, sparse=sparse), tensor.decode())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [-1, 0])
def test_int8_by_int8_is_exact(sparse: bool, symmetric: bool, group: int) -> None:
    for shape in SHAPES:
        tensor = reference.quantize(pruned(random(*shape)), Grid(8, group, symmetric))
        matrix = kernels.matrix_from(tensor, activations="int8", sparse=sparse)
        assert (matrix.decode() == tensor.decode()).all()
        bias = random(shape[0], seed=2)
        for m in BATCHES:
            x = random(m, shape[1], seed=3)
            x[m // 2 :] *= 100
            assert (matrix(x) == reference.int8_matrix(x, tensor)).all()
            assert (matrix(x, bias) == reference.int8_matrix(x, tensor, bias)).all()


def test_activations_are_those_of_compressed_tensors() -> None:
    """Dynamic, symmetric, per token: within one code of what the library computes, and nearly always the same."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = random(50, 300)
    args = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    scale, zero = calculate_qparams(torch.tensor(low), torch.tensor(high), args)
    codes, step = reference.symmetric_rows(x)
    assert (step == scale.numpy()).all()
    theirs = quantize(torch.tensor(x), scale, zero, args, dtype=torch.int8).numpy()
    apart = codes != theirs
    assert np.abs(codes.astype(int) - theirs).max() <= 1
    assert apart.mean() < 0.01


def test_extreme_codes_do_not_saturate() -> None:
    """Pairs of products of −128 · −128 overflow 16 bits: the sums must not."""
    tensor = AffineTensor(np.full((3, 4096), -128, np.int8), np.ones((3, 1), np.float32), None, Grid(8))
    matrix = kernels.matrix_from(tensor, activations="int8")
    for value in (-1, 1):
        x = np.full((2, 4096), value, np.float32)
        assert (matrix(x) == reference.int8_matrix(x, tensor)).all()


def test_rows_are_gathered() -> None:
    weight = random(50, 48)
    matrix = kernels.matrix_from(reference.quantize(weight, Grid(4, 16)))
    everything = matrix.decode()
    assert (matrix.decode(np.array([49, 0, 0, 17])) == everything[[49, 0, 0, 17]]).all()
    assert (matrix.decode(slice(3, 40, 5)) == everything[3:40:5]).all()
    assert matrix.decode(np.array([], np.int64)).shape == (0, 48)
    for row in (-1, 50):
        with pytest.raises(ValueError, match="not in"):
            matrix.decode(np.array([row]))


@pytest.mark.parametrize(("bits", "expected"), [(8, 8), (4, 4), (3, 3), (2, 2), (6, 8)])
def test_resident_bytes(bits: int, expected: int) -> None:
    tensor = reference.quantize(random(256, 512), Grid(bits, 128, scale_dtype="bfloat16"))
    matrix = kernels.matrix_from(tensor, sparse=False)
    assert matrix.nbytes == 256 * 512 * expected // 8 + 256 * 4 * 2  # codes, and steps as bfloat16


@pytest.mark.parametrize(("share", "layout"), [(0.5, "int8-sparse"), (0.2, "int8")])
def test_sparse_is_chosen_from_forty_percent_on(share: float, layout: str) -> None:
    tensor = reference.quantize(pruned(random(64, 256), share), Grid(8, -1, symmetric=False))
    assert kernels.matrix_from(tensor).layout == layout


def test_codes_of_two_bits_are_smaller_dense() -> None:
    tensor = reference.quantize(random(64, 256), Grid(2, 128))
    assert np.mean(tensor.codes == 0) > 0.4
    assert kernels.matrix_from(tensor).layout == "int2"


def test_sparse_is_smaller() -> None:
    for weight in (reference.quantize(pruned(random(128, 256)), Grid(4, 64)), pruned(random(128, 256))):
        dense, sparse = (kernels.matrix_from(weight, sparse=s).nbytes for s in (False, True))
        assert sparse < 0.85 * dense


def test_out_is_written_in_place() -> None:
    matrix = kernels.matrix_from(random(5, 7))
    out = np.empty((3, 5), np.float32)
    assert matrix(random(3, 7), out=out) is out
    assert (out == matrix(random(3, 7))).all()


def test_wrong_input_is_refused() -> None:
    matrix = kernels.matrix_from(random(5, 7))
    with pytest.raises(ValueError, match="any, 7"):
        matrix(random(3, 8))
    with pytest.raises(ValueError, match="bias"):
        matrix(random(3, 7), random(6))
    with pytest.raises(ValueError, match="out"):
        matrix(random(3, 7), out=np.empty((3, 6), np.float32))
    with pytest.raises(Unsupported, match="float64"):
        kernels.matrix_from(np.zeros((2, 2)))
    with pytest.raises(BadInput, match="matrix"):
        kernels.matrix_from(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="empty"):
        kernels.matrix_from(np.zeros((0, 3), np.float32))
    with pytest.raises(BadInput, match="8-bit weights"):
        kernels.matrix_from(random(4, 4), activations="int8")
    with pytest.raises(BadInput, match="4 bits"):
        kernels.matrix_from(reference.quantize(random(4, 4), Grid(4)), activations="int8")
    with pytest.raises(BadInput, match="known: float, int8, int8-groups"):
        kernels.matrix_from(random(4, 4), activations="int4")  # type: ignore[arg-type]
