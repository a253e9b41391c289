"""Integer linear and convolution: sums bit for bit against torch in float64, results against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from penjing import kernels
from penjing.kernels import reference

RNG = np.random.default_rng(7)


def int8(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (10, 84), (17, 33), (65, 200)], ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_linear(shape: tuple[int, int], affine: bool) -> None:
    out, columns = shape
    codes, scale, bias = int8(out, columns), np.abs(floats(out)) * 0.01, floats(out)
    zero_point = int8(out) if affine else None
    for relu, m in itertools.product((False, True), (0, 1, 3, 8, 17)):
        native = kernels.IntegerLinear(codes, scale, zero_point, bias, relu)
        twin = reference.IntegerLinear(codes, scale, zero_point, bias, relu)
        x, x_codes = floats(m, columns), int8(m, columns)
        centred = codes.astype(np.int64) - (0 if zero_point is None else zero_point[:, None].astype(np.int64))
        assert (native.accumulate(x_codes, 7) == (x_codes.astype(np.int64) - 7) @ centred.T).all()
        assert (native(x) == twin(x)).all()
        assert (native(x, 0.02, -128) == twin(x, 0.02, -128)).all()
        if m:
            exact = x @ (centred * scale[:, None]).T.astype(np.float32) + bias
            step = (np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0)) / 255
            bound = step[:, None] * np.abs(centred * scale[:, None]).sum(1) + 1e-3
            assert (np.abs(native(x) - (np.maximum(exact, 0) if relu else exact)) <= bound).all()


CONVOLUTIONS = [
    # channels in, out, groups, kernel, image, stride, padding, dilation
    (2, 8, 2, (3,), (17,), 1, 0, 1),
    (3, 6, 1, (5, 5), (12, 11), 1, 0, 1),
    (3, 5, 1, (3, 2), (9, 8), (2, 1), (1, 0), (1, 2)),
    (16, 33, 1, (3, 3), (7, 9), 1, 1, 1),
    (24, 24, 24, (3, 3), (9, 9), 2, 1, 1),
    (20, 40, 10, (1, 1), (5, 4), 1, 0, 1),
    (6, 9, 3, (3, 3), (8, 8), 1, (0, 2), 2),
    (4, 6, 2, (2, 3, 1), (5, 6, 7), (1, 2, 1), (1, 1, 0), 1),
]


def torch_sums(x: np.ndarray, codes: np.ndarray, zero_point: Any, zero: int, **how: Any) -> np.ndarray:
    """The exact sums, from torch's float64 convolution of integers."""
    torch = pytest.importorskip("torch")
    convolve = getattr(torch.nn.functional, f"conv{codes.ndim - 2}d")
    weight = torch.tensor(codes).double()
    if zero_point is not None:
        weight -= torch.tensor(zero_point).double().view(-1, *[1] * (codes.ndim - 1))
    return convolve(torch.tensor(x).double() - zero, weight, **how).numpy()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(case: tuple[Any, ...], affine: bool) -> None:
    inputs, outputs, groups, kernel, image, stride, padding, dilation = case
    codes, scale, bias = int8(outputs, inputs // groups, *kernel), np.abs(floats(outputs)) * 0.01, floats(outputs)
    zero_point = int8(outputs) if affine else None
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for batch, relu in ((2, False), (1, True), (0, False)):
        native = kernels.IntegerConv(codes, scale, zero_point, bias, relu=relu, **how)
        twin = reference.IntegerConv(codes, scale, zero_point, bias, relu=relu, **how)
        x_codes = int8(batch, inputs, *image)
        assert (native.accumulate(x_codes, -5) == torch_sums(x_codes, codes, zero_point, -5, **how)).all()
        assert (twin.accumulate(x_codes, -5) == torch_sums(x_codes, codes, zero_point, -5, **how)).all()
        x = floats(batch, inputs, *image) * 3 + 1
        assert (native(x) == twin(x)).all()
        assert (native(x, 0.05, 100) == twin(x, 0.05, 100)).all()


def test_a_large_convolution_is_shared_between_threads() -> None:
    codes, scale = int8(64, 32, 3, 3), np.full(1, 0.01, np.float32)
    native, x_codes = kernels.IntegerConv(codes, scale, padding=1), int8(3, 32, 40, 41)
    assert (native.accumulate(x_codes) == torch_sums(x_codes, codes, None, 0, padding=1)).all()


def test_another_image_size_after_the_first() -> None:
    codes = int8(4, 3, 3, 3)
    native = kernels.IntegerConv(codes, np.ones(4, np.float32))
    for size in (5, 9, 5):
        x_codes = int8(1, 3, size, size + 1)
        assert (native.accumulate(x_codes) == torch_sums(x_codes, codes, None, 0)).all()


def test_torch_tensors_go_in_and_out() -> None:
    torch = pytest.importorskip("torch")
    codes = int8(10, 84)
    native, x = kernels.IntegerLinear(codes, np.ones(1, np.float32)), torch.randn(3, 84)
    out = torch.empty(3, 10)
    assert native(x, out=out) is out
    assert (out.numpy() == native(x.numpy())).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_monstrous_activations_do_not_crash(value: float) -> None:
    native, x = kernels.IntegerLinear(int8(5, 40), np.ones(1, np.float32)), floats(2, 40)
    x[0, 3] = value
    assert (native(x)[1] == native(x[1:])[0]).all()


def test_wrong_input_is_refused() -> None:
    scale = np.ones(1, np.float32)
    linear = kernels.IntegerLinear(int8(4, 6), scale)
    with pytest.raises(ValueError, match="any, 6"):
        linear(floats(2, 7))
    with pytest.raises(ValueError, match="float32"):
        linear(np.zeros((2, 6)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contiguous"):
        linear(floats(6, 2).T)
    with pytest.raises(ValueError, match="step"):
        linear(floats(2, 6), 0.0)
    with pytest.raises(ValueError, match="zero"):
        linear(floats(2, 6), 0.1, 128)
    with pytest.raises(ValueError, match="out"):
        linear(floats(2, 6), out=np.empty((2, 5), np.float32))
    with pytest.raises(ValueError, match="scale"):
        kernels.IntegerLinear(int8(4, 6), np.ones(3, np.float32))
    with pytest.raises(ValueError, match="zero_point"):
        kernels.IntegerLinear(int8(4, 6), scale, int8(5))
    with pytest.raises(ValueError, match="groups"):
        kernels.IntegerConv(int8(4, 2, 3), scale, groups=3)
    with pytest.raises(ValueError, match="stride"):
        kernels.IntegerConv(int8(4, 2, 3), scale, stride=0)
    with pytest.raises(ValueError, match="one a dimension"):
        kernels.IntegerConv(int8(4, 2, 3), scale, stride=(1, 1))
    conv = kernels.IntegerConv(int8(4, 2, 3), scale)
    with pytest.raises(ValueError, match="does not fit"):
        conv(floats(1, 2, 2))
    with pytest.raises(ValueError, match="any, 2, any"):
        conv(floats(1, 3, 9))
