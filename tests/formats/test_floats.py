"""FP8, MXFP4 and NVFP4 against tables of all their numbers, and the sizes they claim."""

from __future__ import annotations

import numpy as np
import pytest

from penjing.errors import BadInput
from penjing.formats import fp8, mxfp4, nvfp4

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e4m3() -> np.ndarray:
    """Every finite number of E4M3 from its bits: sign, exponent with bias 7, mantissa."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(np.nan if code & 127 == 127 else -size if code & 128 else size)
    return np.array(values)


def weights(rows: int, columns: int) -> np.ndarray:
    weight = np.random.default_rng(columns).standard_t(4, (rows, columns)).astype(np.float32)
    weight[0] = 0
    return weight


@pytest.mark.parametrize(("group", "steps"), [(-1, (5, 1)), (0, (1, 1)), (16, (5, 4))])
def test_fp8_is_the_nearest(group: int, steps: tuple[int, int]) -> None:
    table, weight = e4m3(), weights(5, 64)
    tensor = fp8.encode(weight, group)
    assert tensor.scale.shape == steps
    scale = np.broadcast_to(np.repeat(tensor.scale, 64 // steps[1], axis=1), weight.shape)
    np.testing.assert_array_equal(tensor.decode(), (table[tensor.codes] * scale).astype(np.float32))
    distance = np.abs(table[np.isfinite(table)] - (weight / scale)[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(table[tensor.codes] - weight / scale), distance, atol=1e-6)
    assert np.abs(table[tensor.codes]).max() == 448
    assert tensor.bits_per_weight == 8 + 32 * tensor.scale.size / weight.size
    with pytest.raises(BadInput, match="group_size=24 does not divide 64 columns"):
        fp8.encode(weight, 24)


def test_four_bit_codes_are_the_nearest_with_ties_to_even() -> None:
    numbers = np.concatenate([np.linspace(-7, 7, 1001), E2M1, -E2M1, (E2M1[1:] + E2M1[:-1]) / 2]).astype(np.float32)
    numbers = numbers[: len(numbers) // 2 * 2]
    found = mxfp4.values(mxfp4.codes(numbers))
    assert (np.abs(found - numbers) <= np.abs(np.abs(numbers)[:, None] - E2M1).min(axis=1) + 1e-6).all()
    ties = (E2M1[1:] + E2M1[:-1]) / 2
    even = np.array([0, 1, 1, 2, 2, 4, 4])  # the neighbour whose mantissa bit is 0
    np.testing.assert_array_equal(mxfp4.values(mxfp4.codes(np.append(ties, 0).astype(np.float32)))[:-1], even)


def test_mxfp4_blocks_share_a_power_of_two() -> None:
    weight = weights(6, 96)
    weight[1] *= np.float32(1e-30)
    tensor = mxfp4.encode(weight)
    assert tensor.blocks.nbytes + tensor.scales.nbytes == weight.size * 4.25 / 8
    step = 2.0 ** (tensor.scales.astype(np.float64) - 127)
    largest = np.abs(weight.reshape(6, 3, 32)).max(axis=2)
    at = largest > 0
    assert ((largest / step)[at] >= 4).all()
    assert ((largest / step)[at] < 8).all()
    grouped, decoded = weight.reshape(6, 3, 32) / step[..., None], tensor.decode().astype(np.float64)
    nearest = np.abs(np.minimum(np.abs(grouped), 6)[..., None] - E2M1).min(axis=-1)
    off = np.abs(decoded.reshape(6, 3, 32) / step[..., None] - np.clip(grouped, -6, 6))
    np.testing.assert_allclose(off, nearest, atol=1e-5)
    again = mxfp4.encode(decoded.astype(np.float32))
    np.testing.assert_array_equal(again.decode(), tensor.decode())
    with pytest.raises(BadInput, match="48 columns are not a multiple"):
        mxfp4.encode(weights(2, 48))


def test_nvfp4_has_two_levels_of_steps() -> None:
    weight = weights(6, 64)
    weight[2] *= np.float32(1e-9)  # its steps round to zero beside the others'
    tensor = nvfp4.encode(weight)
    assert tensor.shape == weight.shape
    assert tensor.blocks.nbytes + tensor.scales.nbytes + 4 == weight.size * tensor.bits_per_weight / 8
    steps = e4m3()[tensor.scales] * float(tensor.scale)
    assert e4m3()[tensor.scales].max() == 448
    decoded = tensor.decode().reshape(6, 4, 16)
    assert (decoded[2] == 0).all()
    used = steps > 0
    grouped = weight.reshape(6, 4, 16)[used] / steps[used][:, None]
    nearest = np.abs(np.minimum(np.abs(grouped), 6)[..., None] - E2M1).min(axis=-1)
    np.testing.assert_allclose(
        np.abs(decoded[used] / steps[used][:, None] - np.clip(grouped, -6, 6)), nearest, atol=1e-5
    )
    assert (np.abs(grouped) < 6.4).all()  # a step is rounded by up to 1/16
    assert (nvfp4.encode(np.zeros((2, 32), np.float32)).decode() == 0).all()
    with pytest.raises(BadInput, match="24 columns are not a multiple"):
        nvfp4.encode(weights(2, 24))
