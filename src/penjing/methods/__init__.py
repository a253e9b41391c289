"""Methods: what decides which weights go and where the rest are rounded to.

A method is one file with a function of arrays and a frozen config; it knows no files, no devices and no models.

    a pruner     solve(weight, statistics, config) → the weight (out, in) with zeros, same dtype
    a quantizer  solve(weight, statistics, config) → AffineTensor

weight: (out, in) float32, float16 or bfloat16.  statistics: what the calibration collected on the layer's input, by
name; the names in the module's ``NEEDS`` are there.  ``by_rows(config)`` says that rows do not depend on one another,
so that a large matrix may be solved in parts. To add a method, write its file and put its name in one of these tables.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from ..errors import BadRecipe, nearest

Statistics = Mapping[str, NDArray[Any]]

# name → the module that has it
QUANTIZERS = {"rtn": "rtn"}
PRUNERS = {"l1": "magnitude", "l2": "magnitude", "random": "random"}


def quantizer(name: str) -> ModuleType:
    """The module of a quantization method; BadRecipe for an unknown name."""
    return _find(name, QUANTIZERS, "quantization")


def pruner(name: str) -> ModuleType:
    """The module of a pruning method; BadRecipe for an unknown name."""
    return _find(name, PRUNERS, "pruning")


def _find(name: str, table: Mapping[str, str], kind: str) -> ModuleType:
    if name not in table:
        raise BadRecipe(f"{kind} method {name!r} is unknown; {nearest(name, table)}")
    return importlib.import_module(f".{table[name]}", __name__)
