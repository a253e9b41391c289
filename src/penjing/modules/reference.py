"""Integer linear layers and convolutions in plain torch: the oracle that the kernels are tested against.

    codes = clamp(round(x · (1/s) + z), −128, 127)                 activations, int8
    sums  = Σ (codes − z) · (weight_codes − weight_zero)           int32, exact
    y     = sums · s · weight_s + bias                             float32

Products and sums are made in float64, which holds every int32 exactly. Dynamic range: s and z are those of
`formats.affine.fit` on 8 affine bits, for each row (linear) or each sample (convolution).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def dynamic_steps(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Steps float32 and zero points int32 of x float32, each from its range along ``axes``, which are kept as 1."""
    low, high = x.amin(axes, keepdim=True).clamp(max=0), x.amax(axes, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-128 - low / scale).round().clamp(-128, 127).to(torch.int32)


def activation_codes(
    x: Tensor, axes: tuple[int, ...], step: float | None = None, zero: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 of x float32, with their steps float32 and zero points int32 (shaped like x, 1 along ``axes``)."""
    if step is not None:
        scale, zeros = torch.tensor(step, dtype=torch.float32), torch.tensor(zero, dtype=torch.int32)
    else:
        scale, zeros = dynamic_steps(x, axes)
    codes = (x * (1 / scale) + zeros).round().clamp(-128, 127).to(torch.int8)
    return codes, scale, zeros


def _centred(codes: Tensor, zero: Tensor | int | None) -> Tensor:
    if isinstance(zero, Tensor):
        zero = zero.to(torch.float64).reshape(-1, *[1] * (codes.dim() - 1)) if zero.dim() == 1 else zero
    return codes.to(torch.float64) - (0 if zero is None else zero)


def linear_sums(codes: Tensor, zero: Tensor | int, weight: Tensor, weight_zero: Tensor | None = None) -> Tensor:
    """int32 (m, out) of codes int8 (m, in) and weight int8 (out, in); weight_zero (out,)."""
    return functional.linear(_centred(codes, zero), _centred(weight, weight_zero)).to(torch.int32)


def conv_sums(
    codes: Tensor,
    zero: Tensor | int,
    weight: Tensor,
    weight_zero: Tensor | None = None,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
) -> Tensor:
    """int32 (n, out, *spatial) of codes int8 (n, in, *spatial) and weight int8 (out, in/groups, *kernel).

    Padding is with the number 0, that is with the code ``zero``.
    """
    convolve = CONVOLUTIONS[weight.dim() - 2]
    centred, kernel = _centred(codes, zero), _centred(weight, weight_zero)
    return convolve(centred, kernel, None, stride, padding, dilation, groups).to(torch.int32)


def finish(sums: Tensor, step: Tensor, weight_step: Tensor, bias: Tensor | None) -> Tensor:
    """Sums int32 → float32; the channel is axis 1. step broadcasts over sums; weight_step and bias are (out,)."""
    channel = (1, -1, *[1] * (sums.dim() - 2))
    y = sums.to(torch.float32) * step * weight_step.reshape(channel)
    return y if bias is None else y + bias.reshape(channel)
