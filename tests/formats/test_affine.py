"""The affine grid against closed forms, brute force and compressed-tensors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from penjing.errors import BadInput
from penjing.formats import affine
from penjing.formats.affine import Grid

GRIDS = [
    Grid(bits, group, symmetric) for bits in (2, 3, 4, 5, 8) for group in (-1, 0, 8, 32) for symmetric in (True, False)
]


def weights(seed: int, rows: int = 7, columns: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def fitted(weight: np.ndarray, grid: Grid) -> affine.AffineTensor:
    scale, zero_point = affine.fit(*affine.ranges(weight, grid), grid)
    return affine.AffineTensor(affine.encode(weight, scale, zero_point, grid), scale, zero_point, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_code_is_nearer_than_the_one_taken(grid: Grid) -> None:
    weight = weights(1)
    tensor = fitted(weight, grid)
    every_code = np.arange(grid.qmin, grid.qmax + 1, dtype=np.float64)
    columns_a_step = weight.shape[1] // tensor.scale.shape[1]
    scale = np.broadcast_to(tensor.scale, (7, tensor.scale.shape[1])).repeat(columns_a_step, axis=1)
    zero = 0.0
    if tensor.zero_point is not None:
        zero = np.broadcast_to(tensor.zero_point, (7, tensor.scale.shape[1])).repeat(columns_a_step, axis=1)[..., None]
    distances = np.abs((every_code - zero) * scale[..., None] - weight[..., None])
    taken = np.abs(tensor.decode().astype(np.float64) - weight)
    np.testing.assert_allclose(taken, distances.min(axis=2), atol=1e-5 * scale.max())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_both_ends_of_the_range_are_met_and_zero_is_exact(grid: Grid) -> None:
    weight = weights(2)
    weight[:, ::5] = 0
    tensor = fitted(weight, grid)
    assert (tensor.decode()[weight == 0] == 0).all()
    step = np.broadcast_to(tensor.scale, (7, tensor.scale.shape[1])).repeat(96 // tensor.scale.shape[1], axis=1)
    # an affine zero point is rounded too, so an end may be clamped by up to one step
    assert (np.abs(tensor.decode() - weight) <= step * (0.5 if grid.symmetric else 1) * 1.0001).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_steps_and_codes_are_those_of_compressed_tensors(grid: Grid) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = {-1: "channel", 0: "tensor"}.get(grid.group_size, "group")
    args = QuantizationArgs(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        strategy=strategy,
        group_size=grid.group_size if strategy == "group" else None,
    )
    weight = weights(3)
    low, high = affine.ranges(weight, grid)
    scale, zero_point = calculate_qparams(torch.tensor(low), torch.tensor(high), args)
    tensor = fitted(weight, grid)
    assert (tensor.scale == scale.numpy().reshape(tensor.scale.shape)).all()
    if tensor.zero_point is not None:
        assert (tensor.zero_point == zero_point.numpy().reshape(tensor.scale.shape)).all()
    codes = quantize(torch.tensor(weight), scale, zero_point, args, dtype=torch.int8).numpy()
    # compressed-tensors divides by the step, we multiply by its reciprocal: only ties may fall to the other side
    apart = tensor.codes != codes
    assert np.abs(tensor.codes.astype(int) - codes)[apart].max(initial=0) <= 1
    step = np.broadcast_to(tensor.scale, (7, tensor.scale.shape[1])).repeat(96 // tensor.scale.shape[1], axis=1)
    fraction = np.abs(weight[apart].astype(np.float64) / step[apart]) % 1
    np.testing.assert_allclose(fraction, 0.5, atol=2e-5)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_codes_are_computed_with_the_step_as_stored(name: str, dtype: object) -> None:
    tensor = fitted(weights(4), Grid(4, 32, scale_dtype=name))
    assert (tensor.scale.astype(dtype).astype(np.float32) == tensor.scale).all()
    exact = fitted(weights(4), Grid(4, 32))
    assert (tensor.scale != exact.scale).any()


def test_a_flat_group_decodes_to_zeros_or_to_itself() -> None:
    weight = np.zeros((2, 8), np.float32)
    weight[1] = -3
    for symmetric in (True, False):
        np.testing.assert_allclose(fitted(weight, Grid(8, -1, symmetric)).decode(), weight, atol=0.03)


def test_bits_per_weight_counts_steps_and_zero_points() -> None:
    assert Grid(4, 128, scale_dtype="bfloat16").bits_per_weight(64, 256) == 4 + 16 / 128
    assert Grid(4, 32, symmetric=False, scale_dtype="float16").bits_per_weight(64, 256) == 4 + 20 / 32
    assert Grid(8, 0).bits_per_weight(10, 10) == 8 + 32 / 100


@pytest.mark.parametrize(
    "settings", [{"bits": 1}, {"bits": 9}, {"group_size": -2}, {"scale_dtype": "float64"}], ids=str
)
def test_grids_that_do_not_exist(settings: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        Grid(**settings)  # type: ignore[arg-type]


def test_a_group_must_divide_the_columns() -> None:
    with pytest.raises(BadInput, match="does not divide 96"):
        affine.ranges(weights(5), Grid(4, 7))
