"""FP8, MXFP4, NVFP4 against tables of all their numbers, brute force, compressed-tensors, the sizes they claim."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from penjing.errors import BadInput
from penjing.formats import floats, mxfp4
from penjing.formats.floats import FloatGrid

# Table 2 of the OCP Microscaling Formats specification 1.0
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GRIDS = {
    "fp8": FloatGrid("fp8", -1),
    "fp8-tensor": FloatGrid("fp8", 0),
    "fp8-bfloat16": FloatGrid("fp8", -1, "bfloat16"),
    "fp8-block": FloatGrid("fp8-block", 128),
    "mxfp4": FloatGrid("mxfp4", 32),
    "nvfp4": FloatGrid("nvfp4", 16),
}
STEPS = {"fp8": (130, 1), "fp8-tensor": (1, 1), "fp8-bfloat16": (130, 1), "fp8-block": (130, 2), "mxfp4": (130, 8)}


def e4m3() -> np.ndarray:
    """Every finite number of E4M3 from its bits: sign, exponent with bias 7, mantissa."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(np.nan if code & 127 == 127 else -size if code & 128 else size)
    return np.array(values)


def table(grid: FloatGrid) -> np.ndarray:
    return e4m3() if grid.bits == 8 else np.concatenate([E2M1, -E2M1])


def weights(rows: int = 130, columns: int = 256) -> np.ndarray:
    weight = np.random.default_rng(columns).standard_t(4, (rows, columns)).astype(np.float32)
    weight[0] = 0
    return weight


def test_published_numbers_of_e4m3() -> None:
    """Table 1 of Micikevicius et al., 2022: the largest, the smallest normal and the smallest subnormal number."""
    numbers = e4m3()
    found = floats.FloatTensor(
        np.arange(256, dtype=np.uint8)[None], np.ones((1, 1), np.float32), np.float32(1), GRIDS["fp8"]
    )
    np.testing.assert_array_equal(found.decode()[0], numbers.astype(np.float32))
    positive = numbers[numbers > 0]
    assert (positive.max(), positive.min(), 2.0**-6 in positive) == (448, 2.0**-9, True)


@pytest.mark.parametrize("name", GRIDS)
def test_every_number_is_the_nearest_of_all_codes(name: str) -> None:
    grid, weight = GRIDS[name], weights()
    tensor = floats.quantize(weight, grid)
    assert tensor.scale.shape == STEPS.get(name, (130, 16))
    step = tensor.scale.astype(np.float64) / float(tensor.divisor)
    step = np.broadcast_to(np.repeat(step, 256 // step.shape[1], axis=1), weight.shape)
    numbers = table(grid)
    assert (step > 0).all()
    exact = numbers[tensor.codes] * step
    decoded = tensor.decode()
    assert decoded.dtype == grid.dtype
    np.testing.assert_allclose(decoded.astype(np.float64), exact, rtol=2**-8 if grid.dtype != np.float32 else 1e-6)
    place = weight / step
    distance = np.abs(numbers[np.isfinite(numbers)] - place[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(numbers[tensor.codes] - place), distance, atol=1e-5 * float(grid.largest))
    again = floats.quantize(np.ascontiguousarray(exact.astype(np.float32)), grid)
    np.testing.assert_allclose(again.decode().astype(np.float64), decoded.astype(np.float64), rtol=2**-7)


@pytest.mark.parametrize("name", GRIDS)
def test_rows_and_zeros(name: str) -> None:
    weight = weights()
    weight[:, ::3] = 0
    tensor = floats.quantize(weight, GRIDS[name])
    decoded = tensor.decode()
    assert tensor.zeros() == int((decoded == 0).sum())
    some = np.array([129, 3, 3])
    np.testing.assert_array_equal(tensor.rows(some).decode(), decoded[some])
    np.testing.assert_array_equal(tensor.rows(slice(1, 5)).decode(), decoded[1:5])


def test_ties_go_to_the_even_code() -> None:
    grid = GRIDS["mxfp4"]
    ties = (E2M1[1:] + E2M1[:-1]) / 2
    even = np.array([0, 1, 1, 2, 2, 4, 4])  # the neighbour whose mantissa bit is 0
    np.testing.assert_array_equal(grid.nearest(np.concatenate([ties, -ties]).astype(np.float32)), [*even, *-even])
    numbers = e4m3()[:127]
    ties = (numbers[1:] + numbers[:-1]) / 2
    nearest = GRIDS["fp8"].codes(ties.astype(np.float32))
    assert (nearest % 2 == 0).all()
    assert (np.abs(numbers[nearest] - ties) == np.diff(numbers) / 2).all()
    assert GRIDS["fp8"].nearest(np.array([1e9, -480], np.float32)).tolist() == [448, -448]


def test_steps_are_those_of_compressed_tensors() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.utils import generate_gparam
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    weight = weights(64, 256) * np.float32(0.02)
    weight[0] = weight[1]
    reach = np.abs(weight.reshape(64, -1, 32)).max(axis=2)
    reach[0, :4] = [7.0, 6.99, 3.5, 8.0]
    theirs = generate_mx_scales(torch.from_numpy(reach)).numpy()
    np.testing.assert_array_equal(floats.exponents(GRIDS["mxfp4"].steps(reach, np.float32(1))), theirs)
    tensor = floats.quantize(weight, GRIDS["nvfp4"])
    low, high = torch.from_numpy(weight).min(), torch.from_numpy(weight).max()
    np.testing.assert_allclose(tensor.divisor, generate_gparam(low, high).numpy()[0], rtol=1e-6)


def test_nvfp4_shares_a_reach_and_keeps_small_blocks() -> None:
    weight = weights(6, 64)
    weight[2] *= np.float32(1e-9)
    tensor = floats.quantize(weight, GRIDS["nvfp4"])
    assert tensor.scale.max() == 448
    assert tensor.scale.min() == 2.0**-9  # of what is too small for another, and of zeros
    assert (tensor.decode()[2] == 0).all()
    shared = floats.quantize(weight, dataclasses.replace(GRIDS["nvfp4"], reach=4 * float(np.abs(weight).max())))
    np.testing.assert_allclose(shared.divisor, tensor.divisor / 4, rtol=1e-6)
    error = [np.square(each.decode().astype(np.float32) - weight).mean() for each in (tensor, shared)]
    assert error[1] < 1.1 * error[0]
    assert (floats.quantize(np.zeros((2, 32), np.float32), GRIDS["nvfp4"]).decode() == 0).all()


@pytest.mark.parametrize("name", GRIDS)
def test_the_size_is_what_is_stored(name: str) -> None:
    from penjing.checkpoint import floats as stored

    tensor = floats.quantize(weights(), GRIDS[name])
    parts = stored.encode(tensor)
    assert sum(part.nbytes for part in parts.values()) == pytest.approx(tensor.bits_per_weight * tensor.codes.size / 8)


def test_four_bits_are_packed_two_in_a_byte() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (5, 64)).astype(np.uint8)
    packed = floats.pack(codes)
    assert packed[3, 7] == codes[3, 14] + 16 * codes[3, 15]
    np.testing.assert_array_equal(floats.unpack(packed), codes)
    numbers = np.concatenate([E2M1, -E2M1])
    np.testing.assert_array_equal(mxfp4.values(packed), numbers[codes])


def test_what_gpt_oss_stores_is_decoded_as_ours() -> None:
    tensor = floats.quantize(weights(4, 64), GRIDS["mxfp4"])
    blocks = floats.pack(tensor.codes).reshape(4, 2, 16)
    theirs = mxfp4.Mxfp4Tensor(blocks, floats.exponents(tensor.scale)).decode()
    assert theirs.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(theirs, tensor.decode())


def test_wrong_grids_are_refused() -> None:
    with pytest.raises(BadInput, match="mxfp4 has blocks of 32 columns, which do not divide 48"):
        floats.quantize(weights(2, 48), GRIDS["mxfp4"])
    with pytest.raises(BadInput, match="group_size=16: mxfp4 has 32"):
        FloatGrid("mxfp4", 16)
    with pytest.raises(BadInput, match="format='fp6'"):
        FloatGrid("fp6", -1)
