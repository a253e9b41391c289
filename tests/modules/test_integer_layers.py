"""The integer layers against exact integer sums in torch, bit for bit, and their outputs against the formula."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nets import SimpleNet
from torch import nn

import penjing
from penjing import kernels
from penjing.errors import Unsupported
from penjing.modules import reference

CONVS = [
    (nn.Conv1d(3, 4, 3), (2, 3, 11)),
    (nn.Conv1d(4, 6, 4, stride=3, padding=2, dilation=2, groups=2, bias=False), (3, 4, 17)),
    (nn.Conv2d(3, 6, 5), (2, 3, 32, 32)),
    (nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 3), dilation=(1, 2), groups=4), (1, 4, 9, 7)),
    (nn.Conv2d(5, 5, 3, padding="same", groups=5), (2, 5, 6, 8)),
    (nn.Conv2d(2, 3, 4, padding="same"), (1, 2, 6, 5)),
    (nn.Conv2d(2, 3, 3, padding="valid"), (1, 2, 6, 5)),
    (nn.Conv2d(2, 3, 3, padding=2, padding_mode="circular"), (1, 2, 6, 5)),
    (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 2, 6, 5)),
    (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 2, 4, 5, 6)),
]


def expected(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a converted layer must answer, by the reference on its own codes and steps."""
    tensor = layer.affine("weight")
    codes = layer.weight_codes
    zero = None if tensor.zero_point is None else torch.from_numpy(tensor.zero_point[:, 0].copy()).expand(len(codes))
    steps = torch.from_numpy(tensor.scale[:, 0].copy()).expand(len(codes))
    coded = layer.coded
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        q, step, z = reference.activation_codes(rows, (1,), coded.step, coded.zero)
        y = reference.finish(reference.linear_sums(q, z, codes, zero), step, steps, layer.bias)
        return y.view(*x.shape[:-1], len(codes))
    padding, spatial = layer.padding, x.dim() - 2
    if padding == "same" or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode), 0
    axes = tuple(range(1, spatial + 2))
    q, step, z = reference.activation_codes(x, axes, coded.step, coded.zero)
    sums = reference.conv_sums(q, z, codes, zero, layer.stride, padding, layer.dilation, layer.groups)
    return reference.finish(sums, step, steps, layer.bias)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0])
@pytest.mark.parametrize(("conv", "shape"), CONVS)
def test_convolution(conv: nn.Module, shape: tuple[int, ...], group_size: int, symmetric: bool) -> None:
    layer = copy.deepcopy(conv)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 1
    penjing.quantize(layer, group_size=group_size, symmetric=symmetric)
    y = layer(x)
    torch.testing.assert_close(y, expected(layer, x), rtol=1e-5, atol=1e-5)
    float_answer = conv(x)
    assert (y - float_answer).abs().max() < 0.05 * float_answer.abs().max()
    torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 33), (1, 33), (2, 3, 33), (33,), (0, 33)])
def test_linear(shape: tuple[int, ...], bits: int) -> None:
    layer = nn.Linear(33, 7)
    penjing.quantize(layer, bits=bits, symmetric=False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) - 0.5
    y = layer(x)
    assert y.shape == (*shape[:-1], 7)
    torch.testing.assert_close(y, expected(layer, x), rtol=1e-5, atol=1e-5)


def test_static_steps_are_those_of_the_calibration_data() -> None:
    layer = nn.Conv2d(3, 4, 3)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 0.5
    penjing.quantize(layer, "static", data=x)
    low, high = float(x.min()), float(x.max())
    assert layer.coded.step == pytest.approx((high - low) / 255, rel=1e-6)
    assert layer.coded.zero == round(-128 - low / layer.coded.step)
    outside = x * 3
    torch.testing.assert_close(layer(outside), expected(layer, outside), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_kernels_sum_exactly_what_the_reference_sums(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(-128, 128, (9, 31)).astype(np.int8)
    weight_zero = rng.integers(-128, 128, 9).astype(np.int8)
    x = rng.integers(-128, 128, (4, 31)).astype(np.int8)
    scale = np.ones(9, np.float32)
    sums = kernels.IntegerLinear(weight, scale, weight_zero).accumulate(x, 7)
    theirs = reference.linear_sums(torch.from_numpy(x), 7, torch.from_numpy(weight), torch.from_numpy(weight_zero))
    assert np.array_equal(np.asarray(sums), theirs.numpy())

    weight, x = (
        rng.integers(-128, 128, (6, 2, 3, 2)).astype(np.int8),
        rng.integers(-128, 128, (2, 4, 7, 6)).astype(np.int8),
    )
    settings = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    sums = kernels.IntegerConv(weight, scale[:6], weight_zero[:6], None, *settings.values()).accumulate(x, -5)
    zero = torch.from_numpy(weight_zero[:6])
    theirs = reference.conv_sums(torch.from_numpy(x), -5, torch.from_numpy(weight), zero, **settings)
    assert np.array_equal(np.asarray(sums), theirs.numpy())


def test_dynamic_rows_do_not_see_one_another() -> None:
    layer = nn.Linear(16, 4)
    penjing.quantize(layer)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    x[2] *= 1000
    assert torch.equal(layer(x)[:2], layer(x[:2]))


def test_sums_are_the_integers_of_torchs_own_int8_product() -> None:
    layer = nn.Linear(32, 8, bias=False)
    penjing.quantize(layer)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(5))
    codes, step, zero = reference.activation_codes(x, (1,))
    product = torch._int_mm(codes, layer.weight_codes.T.contiguous())
    sums = product - zero * layer.weight_codes.to(torch.int32).sum(1)
    torch.testing.assert_close(layer(x), sums * step * layer.weight_scale[:, 0], rtol=1e-5, atol=1e-6)


def test_float16_in_float16_out() -> None:
    layer = nn.Linear(8, 4)
    penjing.quantize(layer)
    assert layer(torch.ones(2, 8, dtype=torch.float16)).dtype is torch.float16


def test_gradients_are_refused_in_one_line() -> None:
    layer = nn.Linear(4, 2)
    penjing.quantize(layer)
    x = torch.ones(1, 4, requires_grad=True)
    with pytest.raises(Unsupported, match="no gradient"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (1, 2)


def test_a_copy_computes_the_same_and_other_dtypes_are_refused() -> None:
    net = SimpleNet()
    penjing.quantize(net)
    x = torch.randn(2, 3, 32, 32)
    y = net(x)
    assert torch.equal(copy.deepcopy(net)(x), y)
    assert torch.equal(net.cpu()(x), y)
    with pytest.raises(Unsupported, match="number formats"):
        net.half()
