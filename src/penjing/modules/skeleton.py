"""What a module is, in JSON: torch's own layers by name and arguments, a user's class by its import path.

Nothing is executed from a file: a class is looked up among torch.nn and what the program has imported already, and
must be a torch module. Its arguments are those that can be read off the attributes of the same name; `describe` tries
them and answers None when the module that they make differs from the given one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadCheckpoint
from .fold import FoldedBatchNorm
from .layers import CodedLayer

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
Description = dict[str, Any]


def describe(module: nn.Module) -> Description | None:
    """The module's class, arguments and, for torch's containers, children; None when it cannot be made from those."""
    try:
        description = _describe(module)
        with torch.device("meta"):
            twin = build(description)
    except Exception:  # a user's constructor may fail in any way
        return None
    return description if _alike(module, twin) else None


def build(description: Description) -> nn.Module:
    """The module again, with fresh numbers. Raises BadCheckpoint for a class that is not there."""
    cls = _find(description["class"])
    if "children" in description:
        made = cls()
        for name, child in description["children"].items():
            made.add_module(name, build(child))
        return made
    return cls(**{name: _tuples(value) for name, value in description["args"].items()})


def _describe(module: nn.Module) -> Description:
    cls = _original(module)
    if cls in CONTAINERS:
        return {"class": cls.__name__, "children": {name: _describe(child) for name, child in module.named_children()}}
    in_torch = getattr(nn, cls.__name__, None) is cls
    path = cls.__name__ if in_torch else f"{cls.__module__}:{cls.__qualname__}"
    return {"class": path, "args": dict(_arguments(module, cls))}


def _original(module: nn.Module) -> type[nn.Module]:
    """The class before it was converted."""
    if isinstance(module, FoldedBatchNorm):
        return nn.Identity
    return type(module).__bases__[1] if isinstance(module, CodedLayer) else type(module)


def _arguments(module: nn.Module, cls: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    recurrent = issubclass(cls, nn.RNNBase)  # LSTM, GRU and RNN hand their arguments on to it
    parameters = dict(inspect.signature(nn.RNNBase if recurrent else cls).parameters)
    if recurrent:
        del parameters["mode"]
        if not module.proj_size:
            del parameters["proj_size"]  # which GRU and RNN refuse
        if isinstance(module, nn.RNN):
            yield "nonlinearity", module.nonlinearity
    for name, parameter in parameters.items():
        value = getattr(module, name, None)
        if name == "bias" and not isinstance(value, bool):
            yield name, value is not None
        elif name not in ("device", "dtype") and hasattr(module, name) and _is_plain(value):
            yield name, value
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise TypeError(f"no plain attribute {name}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _find(path: str) -> type[nn.Module]:
    place, _, name = path.rpartition(":")
    found: Any = sys.modules.get(place) if place else nn
    for step in name.split("."):
        found = getattr(found, step, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise BadCheckpoint(
            f"the class {path} is not there: import {place or 'it'} first, or give the uncompressed module with into="
        )
    return found


def _alike(module: nn.Module, twin: nn.Module) -> bool:
    """Same parts of the same classes, same plain attributes (hyper-parameters), same shapes; but for what compression
    changes: folded batch norms, cut sizes."""
    parts, twins = dict(module.named_modules()), dict(twin.named_modules())
    if parts.keys() != twins.keys():
        return False
    for name, part in parts.items():
        other = twins[name]
        if isinstance(part, FoldedBatchNorm):
            continue
        if _original(part) is not type(other):
            return False
        resized = part.__dict__.get("resized", {})
        if _plain(part, resized) != _plain(other, resized):
            return False
        if not resized and _own_shapes(part) != _own_shapes(other):
            return False
    return True


def _plain(part: nn.Module, resized: dict[str, Any]) -> dict[str, Any]:
    skipped = {"training", "coded", "pruned", "resized", "activation_relu_or_gelu", "use_nested_tensor", *resized}
    own = part.__dict__.items()
    return {key: value for key, value in own if key[:1] != "_" and key not in skipped and _is_plain(value)}


def _own_shapes(part: nn.Module) -> dict[str, torch.Size]:
    """Of its parameters (codes in their place), but for a bias, which folding may have brought."""
    own: dict[str, Tensor | None] = {name: p for name, p in part._parameters.items() if name != "bias"}
    if isinstance(part, CodedLayer):
        own |= {name: part._buffers[f"{name}_codes"] for name in part.coded.grids}
    return {name: tensor.shape for name, tensor in own.items() if tensor is not None}
