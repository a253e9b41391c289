"""Layers whose weights are codes.

A layer is converted where it stands: its class becomes a subclass of what it was, the float parameter goes, and its
codes, steps and zero points come as buffers. So references, hooks, shared layers, ``in_features`` and ``isinstance``
stay as they were, and ``layer.weight`` still answers, with the numbers that the codes stand for. Layers without a
kernel of their own (embedding, recurrent, attention, any convolution with ``weight_only``) are therefore nothing but
their own class, computing in float on those numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import kernels
from ..errors import Unsupported
from ..formats import affine
from ..formats.affine import AffineTensor, Grid

Compute = Literal["integer", "stored"]
PARTS = ("codes", "scale", "zero_point")


@dataclass
class Coded:
    """What a converted layer knows of itself.

    grids: parameter → its grid.  shapes: parameter → its shape, when that is not the matrix of its codes.
    compute: "integer" quantizes what the layer is given and sums in int32; "stored" computes in float.
    step, zero: of the activations (static), or None (dynamic range).  dtype: of the float numbers it stands in for.
    """

    grids: dict[str, Grid]
    compute: Compute
    step: float | None = None
    zero: int = 0
    dtype: torch.dtype = torch.float32


class CodedLayer(nn.Module):
    """Base of every converted layer; its buffers are ``<parameter>_codes``, ``_scale`` and ``_zero_point``."""

    coded: Coded
    _kernel: Any

    def __getattr__(self, name: str) -> Any:
        coded = self.__dict__.get("coded")
        if coded is not None and name in coded.grids:
            codes = self._buffers[f"{name}_codes"]
            assert codes is not None
            return torch.from_numpy(self.affine(name).decode()).view(codes.shape).to(coded.dtype)
        return super().__getattr__(name)

    def affine(self, name: str) -> AffineTensor:
        """The parameter on its grid, as the matrix (out, everything else)."""
        codes, scale, zero_point = (self._buffers[f"{name}_{part}"] for part in PARTS)
        assert codes is not None
        assert scale is not None
        return AffineTensor(
            codes.numpy().reshape(codes.shape[0], -1),
            scale.numpy(),
            None if zero_point is None else zero_point.numpy(),
            self.coded.grids[name],
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kernel": None}  # a native object: built again when first used

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.cpu()`` and the like change nothing; other devices and number formats are refused."""
        for buffer in self._buffers.values():
            if (
                buffer is not None
                and (moved := fn(buffer)) is not buffer
                and (moved.device != buffer.device or moved.dtype != buffer.dtype)
            ):
                raise Unsupported(f"a quantized {type(self).__name__} stays on the CPU in its own number formats")
        return self

    def _channel_steps(self) -> tuple[Any, Any]:
        """Step and zero point of each output channel of ``weight``: (out,), or None on a symmetric grid."""
        tensor = self.affine("weight")
        rows = len(tensor.codes)
        spread = [
            None if part is None else np.ascontiguousarray(np.broadcast_to(part[:, 0], rows))
            for part in (tensor.scale, tensor.zero_point)
        ]
        return spread[0], spread[1]

    def _bias(self) -> Any:
        bias = getattr(self, "bias", None)
        return None if bias is None else bias.detach().float().numpy()

    def _refuse_gradients(self) -> None:
        raise Unsupported(
            f"{type(self).__name__}: a quantized layer has no gradient; run it under torch.no_grad(), or prune and"
            " fine-tune before quantizing"
        )


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 else x.float()


class CodedLinear(CodedLayer):
    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            self._refuse_gradients()
        kernel = self._kernel or self._build()
        shape = x.shape
        rows = _float32(x).reshape(-1, shape[-1]).numpy()
        y = torch.from_numpy(kernel(rows))
        y = y if len(shape) == 2 else y.view(*shape[:-1], self.out_features)
        return y if x.dtype is torch.float32 else y.to(x.dtype)

    def _build(self) -> Any:
        coded, bias = self.coded, self._bias()
        if coded.compute == "stored":
            matrix = kernels.matrix_from(self.affine("weight"))
            self._kernel = functools.partial(matrix, bias=bias)
            return self._kernel
        scale, zero_point = self._channel_steps()
        linear = kernels.IntegerLinear(self.affine("weight").codes, scale, zero_point, bias)
        self._kernel = linear if coded.step is None else functools.partial(linear, step=coded.step, zero=coded.zero)
        return self._kernel


class CodedConv(CodedLayer):
    """Integer convolution of 1, 2 or 3 spatial axes; other paddings than zeros are made before it."""

    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]
    _pad_first: bool

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            self._refuse_gradients()
        kernel = self._kernel or self._build()
        given = x
        if x.dim() != len(self.stride) + 2:
            x = x[None]
        if self._pad_first:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode)
        y = torch.from_numpy(kernel(_float32(x).contiguous().numpy()))
        y = y if given.dtype is torch.float32 else y.to(given.dtype)
        return y if x.dim() == given.dim() else y[0]

    def _build(self) -> Any:
        codes = self._buffers["weight_codes"]
        assert codes is not None
        self._pad_first = self.padding_mode != "zeros" or self.padding == "same"
        padding = (0,) * len(self.stride) if self._pad_first or self.padding == "valid" else self.padding
        scale, zero_point = self._channel_steps()
        conv = kernels.IntegerConv(
            codes.numpy(), scale, zero_point, self._bias(), self.stride, padding, self.dilation, self.groups
        )
        coded = self.coded
        self._kernel = conv if coded.step is None else functools.partial(conv, step=coded.step, zero=coded.zero)
        return self._kernel


class CodedEmbedding(CodedLayer):
    """Decodes the rows that are asked for, not the table; ``max_norm`` cannot be, it rewrites the table."""

    def forward(self, x: Tensor) -> Tensor:
        tensor, rows = self.affine("weight"), x.reshape(-1).numpy()
        one_step = tensor.scale.shape[0] == 1
        scale = tensor.scale if one_step else tensor.scale[rows]
        zero_point = tensor.zero_point
        if zero_point is not None and not one_step:
            zero_point = zero_point[rows]
        values = affine.decode(tensor.codes[rows], scale, zero_point)
        return torch.from_numpy(values).view(*x.shape, -1).to(self.coded.dtype)


class CodedRecurrent(CodedLayer):
    """LSTM, GRU, RNN: torch's own recurrence on the decoded weights."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    def _update_flat_weights(self) -> None:
        """torch would look whether its float parameters were exchanged; there are none."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]


# The parameters that are put on a grid, of each class and its subclasses; the first that fits counts.
WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Conv1d: ("weight",),
    nn.Conv2d: ("weight",),
    nn.Conv3d: ("weight",),
    nn.Embedding: ("weight",),
    nn.EmbeddingBag: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    nn.RNNBase: ("weight_",),
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weights_of(module: nn.Module) -> list[str]:
    """The names of a module's own parameters that quantization and pruning are about; [] for other modules."""
    for cls, names in WEIGHTS.items():
        if isinstance(module, cls) and not isinstance(module, TRANSPOSED):
            own = [name for name, parameter in module._parameters.items() if parameter is not None]
            own += module.coded.grids if isinstance(module, CodedLayer) else []
            if names == ("weight_",):
                return [name for name in own if name.startswith("weight_")]
            return [name for name in names if name in own]
    return []


def _mixin(module: nn.Module, compute: Compute) -> type[CodedLayer]:
    """The converted class: with a forward of its own only where the layer's class has torch's."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return CodedLinear
    if compute == "integer" and any(forward is conv.forward for conv in CONVOLUTIONS):
        return CodedConv
    if forward is nn.Embedding.forward and module.max_norm is None:
        return CodedEmbedding
    return CodedRecurrent if isinstance(module, nn.RNNBase) else CodedLayer


def can_be_integer(module: nn.Module) -> bool:
    """Whether an integer kernel can stand in for the layer's own forward."""
    return type(module).forward in {nn.Linear.forward, *(conv.forward for conv in CONVOLUTIONS)}


_converted_classes: dict[tuple[type, type], type[nn.Module]] = {}


def _converted_class(mixin: type[CodedLayer], cls: type[nn.Module]) -> type[nn.Module]:
    if (mixin, cls) not in _converted_classes:
        _converted_classes[mixin, cls] = type(f"Quantized{cls.__name__}", (mixin, cls), {"__module__": __name__})
    return _converted_classes[mixin, cls]


def convert(module: nn.Module, coded: Coded, tensors: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    """Put codes in the place of parameters: ``tensors`` has the `buffers` of each parameter of ``coded.grids``."""
    mixin = _mixin(module, coded.compute)
    for name in ("_flat_weights", "_flat_weight_refs"):
        module.__dict__.pop(name, None)
    for name, parts in tensors.items():
        del module._parameters[name]
        for part in PARTS:
            module.register_buffer(f"{name}_{part}", parts[part])
    module.__class__ = _converted_class(mixin, type(module))
    module.__dict__["coded"] = coded
    module.__dict__["_kernel"] = None


def buffers(tensor: AffineTensor, shape: torch.Size) -> dict[str, Tensor | None]:
    """codes int8 in the parameter's shape, scale float32 and zero_point int8 (out, groups), or (1, 1)."""
    zero_point = tensor.zero_point
    return {
        "codes": torch.from_numpy(np.ascontiguousarray(tensor.codes)).view(shape),
        "scale": torch.from_numpy(np.ascontiguousarray(tensor.scale, np.float32)),
        "zero_point": None if zero_point is None else torch.from_numpy(np.ascontiguousarray(zero_point)),
    }


def keep_off_fast_paths(module: nn.Module) -> None:
    """torch's fused transformer kernels read weights around the layers' forward; keep them from it."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
        elif isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
