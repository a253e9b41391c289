"""Methods: what decides which weights go and where the rest are rounded to.

A method is one file with a function of arrays and a frozen config; it knows no files, no devices and no models.

    a transform  solve(weights, statistics, config) → a scale (in,) for the input that they share; see `scaling`
    a pruner     solve(weight, statistics, config) → the weight (out, in) with zeros, same dtype
    a quantizer  solve(weight, statistics, config) → AffineTensor, or FloatTensor
    a joint one  as a quantizer, with codes that decode to exactly 0 where it pruned

They come in this order; a joint one stands for both the pruner and the quantizer of its rule.

weight: (out, in) float32, float16 or bfloat16.  statistics: what the calibration collected on the layer's input (see
`statistics`); the names in the module's ``NEEDS`` are there.  ``by_rows(config)`` says that rows do not depend on one
another, so that a large matrix may be solved in parts. ``MEMORY`` is what `solve` takes at most beside what it is
given: bytes for each weight, and for each of (in, in); a third number is for each of (in, in) while nothing is there
yet for the weights. One that puts weights on floats as well as on integers (`formats.floats.FloatGrid`) has ``FLOATS``:
bytes for each weight that this takes beside ``MEMORY``. To add a method, write its file and put its name in one of
these tables. They need neither a method nor numpy, so that the program's help can name them all.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

from ..errors import BadRecipe, nearest

__all__ = ["JOINT", "PRUNERS", "QUANTIZERS", "TRANSFORMS", "pruner", "quantizer", "transform"]

# name → the module that has it
TRANSFORMS = {"awq": "awq", "smoothquant": "smoothquant"}
PRUNERS = {
    "l1": "magnitude",
    "l2": "magnitude",
    "random": "random",
    "wanda": "wanda",
    "sparsegpt": "sparsegpt",
    "gradual": "gradual",
    "obs": "obs",
}
QUANTIZERS = {"rtn": "rtn", "imatrix": "imatrix", "hqq": "hqq", "gptq": "gptq", "autoround": "autoround"}
JOINT = {"joint": "joint"}


def transform(name: str) -> ModuleType:
    """The module of a transform; BadRecipe for an unknown name."""
    return _find(name, TRANSFORMS, "transform")


def quantizer(name: str) -> ModuleType:
    """The module of a quantization method, or of a joint one; BadRecipe for an unknown name."""
    return _find(name, QUANTIZERS | JOINT, "quantization")


def pruner(name: str) -> ModuleType:
    """The module of a pruning method, or of a joint one; BadRecipe for an unknown name."""
    return _find(name, PRUNERS | JOINT, "pruning")


def _find(name: str, table: Mapping[str, str], kind: str) -> ModuleType:
    if name not in table:
        hint = f"it is a transform: say --transform {name}" if name in TRANSFORMS else nearest(name, table)
        raise BadRecipe(f"{kind} method {name!r} is unknown; {hint}")
    return importlib.import_module(f".{table[name]}", __name__)
