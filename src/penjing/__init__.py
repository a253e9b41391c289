"""Penjing: compress a large model, prove what was lost, and serve it on the machine you have.

The verbs are loaded when first used, so that ``import penjing`` stays fast and never imports torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# verb → the module that has it
_VERBS = {
    "attach": "penjing.modules",
    "bench": "penjing.engine.bench",
    "compress": "penjing.compress",
    "evaluate": "penjing.evaluate",
    "export": "penjing.export",
    "load": "penjing.modules",
    "prune": "penjing.modules",
    "quantize": "penjing.modules",
    "save": "penjing.modules",
    "serve": "penjing.serve.server",
    "to_onnx": "penjing.modules",
}
__all__ = ["__version__", *_VERBS]


class _Package(ModuleType):
    """This package: importing the module ``penjing.evaluate`` does not hide the verb of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _VERBS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'penjing' has no attribute {name!r}")
    try:
        module = importlib.import_module(_VERBS[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"penjing.{name} needs torch: pip install torch (its CPU build is enough)") from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
