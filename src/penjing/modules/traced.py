"""Coded layers in a form that torch can trace: ONNX operators on their codes in the place of the native kernels.

A coded layer becomes one of these by its class alone, as it once became a coded layer. Its codes stay buffers in the
traced graph, behind DequantizeLinear; only shapes and types are traced, the answers in torch mean nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layers import PARTS, Coded, CodedConv, CodedEmbedding, CodedLayer, CodedLinear
from .reference import dynamic_steps

OPSET = 21  # the first with blocked steps and INT4
_NEVER_SATURATES = 64  # 2 · 64 · 255 < 2^15


def _operator(name: str, tensors: list[Tensor | None], dtype: torch.dtype, **attributes: Any) -> Tensor:
    shaped = tensors[0]
    assert shaped is not None
    return torch.onnx.ops.symbolic(name, tensors, attributes, dtype=dtype, shape=shaped.shape, version=OPSET)


class TracedLayer(nn.Module):
    """Base of every traced layer: ``layer.weight`` is DequantizeLinear on its codes."""

    coded: Coded
    shapes: dict[str, torch.Size]

    def __getattr__(self, name: str) -> Any:
        coded = self.__dict__.get("coded")
        if coded is not None and name in coded.grids:
            return self.decoded(name).to(coded.dtype)
        return super().__getattr__(name)

    def prepare(self, signed: bool) -> None:
        """Bring codes, steps and zero points into the shapes that DequantizeLinear takes.

        signed: leave 8-bit codes as they are where sums of int8 may saturate.
        """
        self.__dict__["shapes"] = {}
        for name in self.coded.grids:
            codes, scale, zero_point = (self._buffers[f"{name}_{part}"] for part in PARTS)
            assert codes is not None
            assert scale is not None
            self.shapes[name] = codes.shape
            blocked = scale.shape[1] > 1
            shape = scale.shape if blocked else torch.Size([len(scale)] if len(scale) > 1 else [])
            if blocked and codes.dim() > 2:
                codes = codes.reshape(len(codes), -1)
            if self.coded.compute == "stored" and codes.dim() == 2:
                # as a matrix before MatMul, onnxruntime's optimizer would round the activations to 8 bits too
                codes, shape = codes[None], torch.Size([1, *shape]) if blocked else shape
            self._buffers[f"{name}_codes"] = codes
            self._buffers[f"{name}_scale"] = scale.reshape(shape)
            if zero_point is not None:
                self._buffers[f"{name}_zero_point"] = zero_point.reshape(shape)
            if self.coded.step is not None and not signed and int(codes.abs().max()) > _NEVER_SATURATES:
                self._to_unsigned(name)
        if self.coded.step is not None:
            self.register_buffer("input_scale", torch.tensor(self.coded.step, dtype=torch.float32))
            self.register_buffer("input_zero_point", torch.tensor(self.coded.zero, dtype=torch.int8))

    def _to_unsigned(self, name: str) -> None:
        """The same numbers by codes of 0 … 255."""
        codes, scale, zero_point = (self._buffers[f"{name}_{part}"] for part in PARTS)
        assert codes is not None
        assert scale is not None
        zero = torch.zeros(scale.shape, dtype=torch.int8) if zero_point is None else zero_point
        self._buffers[f"{name}_codes"] = (codes.to(torch.int16) + 128).to(torch.uint8)
        self._buffers[f"{name}_zero_point"] = (zero.to(torch.int16) + 128).to(torch.uint8)

    def decoded(self, name: str) -> Tensor:
        """The parameter float32, in its shape."""
        codes, scale, zero_point = (self._buffers[f"{name}_{part}"] for part in PARTS)
        assert codes is not None
        assert scale is not None
        attributes = {"axis": codes.dim() - len(self.shapes[name])} if scale.dim() == 1 else {}
        if scale.dim() > 1:
            attributes = {"axis": codes.dim() - 1, "block_size": codes.shape[-1] // scale.shape[-1]}
        made = _operator("DequantizeLinear", [codes, scale, zero_point], torch.float32, **attributes)
        return made if codes.shape == self.shapes[name] else made.reshape(self.shapes[name])

    def rounded(self, x: Tensor) -> Tensor:
        """x float32 on the layer's activation grid; with a dynamic range each slice of axis 0 has its own."""
        if self.coded.step is not None:
            steps: list[Tensor | None] = [self._buffers["input_scale"], self._buffers["input_zero_point"]]
            attributes = {}
        else:
            scale, zero_point = dynamic_steps(x, tuple(range(1, x.dim())))
            steps = [scale.reshape(-1), zero_point.reshape(-1).to(torch.int8)]
            attributes = {"axis": 0}
        codes = _operator("QuantizeLinear", [x, *steps], torch.int8, **attributes)
        return _operator("DequantizeLinear", [codes, *steps], torch.float32, **attributes)

    def float_bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self, "bias", None)
        return None if bias is None else bias.float()


class TracedLinear(TracedLayer):
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        if self.coded.compute == "integer":
            rows = self.rounded(rows if self.coded.step is not None else rows.reshape(-1, rows.shape[-1]))
        y = functional.linear(rows, self.decoded("weight"), self.float_bias())
        return (y if y.dim() == x.dim() else y.reshape(*x.shape[:-1], self.out_features)).to(x.dtype)


class TracedConv(TracedLayer):
    stride: tuple[int, ...]
    _conv_forward: Any

    def forward(self, x: Tensor) -> Tensor:
        batch = x if x.dim() == len(self.stride) + 2 else x[None]
        # padding follows: it adds zeros or values that are there, so it changes no range
        y = self._conv_forward(self.rounded(batch.float()), self.decoded("weight"), self.float_bias())
        made: Tensor = y if batch.dim() == x.dim() else y[0]
        return made.to(x.dtype)


class TracedEmbedding(TracedLayer):
    """Gathers codes, and decodes the rows that are asked for."""

    def prepare(self, signed: bool) -> None:
        """Nothing: rows are decoded with plain arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale, zero_point = (self._buffers[f"weight_{part}"] for part in PARTS)
        assert codes is not None
        assert scale is not None
        step, zero = (None if part is None else part[0] if len(part) == 1 else part[x] for part in (scale, zero_point))
        assert step is not None
        values = codes[x].float().reshape(*x.shape, scale.shape[1], -1)
        if zero is not None:
            values = values - zero[..., None]
        return (values * _rows(scale, x)[..., None]).flatten(-2).to(self.coded.dtype)


def _rows(steps: Tensor, x: Tensor) -> Tensor:
    return steps[0] if len(steps) == 1 else steps[x]


_FORWARDS: dict[type[CodedLayer], type[TracedLayer]] = {
    CodedLinear: TracedLinear,
    CodedConv: TracedConv,
    CodedEmbedding: TracedEmbedding,
    CodedLayer: TracedLayer,
}


def trace_codes(root: nn.Module, signed: bool) -> None:
    """Change every coded layer of a module into its traceable form, in place and for good.

    signed: weights of 8 bits beside static inputs stay int8. Processors without VNNI add two products of uint8 with
    int8 in 16 bits, which saturate; onnxruntime has them add products of uint8 with uint8 in 32.
    """
    for part in root.modules():
        if isinstance(part, CodedLayer):
            mixin = next(traced for coded, traced in _FORWARDS.items() if isinstance(part, coded))
            part.__class__ = type(f"Traced{type(part).__name__}", (mixin, type(part)), {"__module__": __name__})
            assert isinstance(part, TracedLayer)
            part.prepare(signed)
