"""Weights that are trained while they stay on their grid: a float latent behind each code, its steps as they are.

A latent w is rounded as q = clamp(round(w / s)) on the way forward; on the way back rounding counts as the identity
(straight through), so that w goes where it is not clipped. Steps, zero points and pruned weights stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..formats.affine import AffineTensor


class Latent:
    """A quantized weight whose codes may move.

    leaf: float32 (out, in), at first 0, in mean steps.  pruned: are weights that are 0 to stay so?
    """

    def __init__(self, stored: NDArray[Any], solved: AffineTensor, pruned: bool, device: torch.device) -> None:
        self.stored, self.solved = stored, solved
        zero = np.zeros_like(solved.scale) if solved.zero_point is None else solved.zero_point.astype(np.float32)
        ends = (solved.grid.qmin - zero, solved.grid.qmax - zero)
        self._steps = tuple(torch.from_numpy(each)[..., None].to(device) for each in (solved.scale, *ends))
        self._base = torch.from_numpy(solved.decode()).to(device)
        self._kept = self._base != 0 if pruned else None
        self._unit = float(solved.scale.mean())
        self.leaf = torch.zeros_like(self._base, requires_grad=True)

    def value(self) -> Tensor:
        """What the block computes with: float32 (out, in), differentiable in the leaf."""
        found: Tensor = _rounded(self._base + self._unit * self.leaf, *self._steps)
        return found if self._kept is None else found * self._kept

    def result(self) -> AffineTensor:
        """The codes that the leaf has led to, on the same steps."""
        with torch.no_grad():
            centred = _centred(self._base + self._unit * self.leaf, *self._steps)
            if self._kept is not None:
                centred *= self._kept.view_as(centred)
            codes = centred.cpu().numpy()
        if self.solved.zero_point is not None:
            codes += self.solved.zero_point[..., None]
        codes = codes.reshape(self.solved.shape).astype(np.int8)
        return AffineTensor(codes, self.solved.scale, self.solved.zero_point, self.solved.grid)


def _centred(values: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes less the zero point: (out, groups, columns of a group)."""
    exact = values.view(len(values), scale.shape[1], -1) / scale
    return torch.minimum(torch.maximum(exact.round_(), low), high)


class _Rounded(torch.autograd.Function):
    """Keeps only what goes in; the rest is computed again on the way back, so that a block's weights fit in memory."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(values, scale, low, high)
        return _centred(values, scale, low, high).mul_(scale).view_as(values)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        values, scale, low, high = ctx.saved_tensors
        exact = values.view(len(values), scale.shape[1], -1) / scale
        inside = (exact >= low - 0.5) & (exact <= high + 0.5)
        return (slopes[0].reshape(exact.shape) * inside).view_as(values), None, None, None


_rounded: Any = _Rounded.apply
