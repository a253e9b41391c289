"""Any torch module: quantized or pruned in place, measured, saved and loaded. The only part that imports torch."""

from __future__ import annotations

from torch import nn

from .load import load
from .onnx import to_onnx
from .prune import prune
from .quantize import quantize
from .result import Result
from .save import save

__all__ = ["Result", "attach", "load", "prune", "quantize", "save", "to_onnx"]


def attach() -> None:
    """Give every ``torch.nn.Module`` the methods ``quantize`` and ``prune``; calling it again changes nothing."""
    for verb in (quantize, prune):
        setattr(nn.Module, verb.__name__, verb)
