"""Which layers of a module a verb is about, and what is said about the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..errors import BadInput, Unsupported, nearest
from .layers import TRANSPOSED, CodedLayer, weights_of


@dataclass(frozen=True)
class Target:
    """A layer: its first name, and the parameters that are to be compressed.

    attended: the layer belongs to an attention module, which reads its weight and never calls it.
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]
    attended: bool = False


def check(module: object) -> nn.Module:
    """The module, if it is one with numbers on the CPU."""
    if not isinstance(module, nn.Module):
        raise BadInput(f"a {type(module).__name__} was given: a torch.nn.Module is needed")
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise BadInput(f"{name} has no shape yet: run the module once, then compress it")
        if parameter.device.type == "meta":
            raise BadInput(f"{name} is on the meta device and has no numbers: load the weights first")
        if parameter.device.type != "cpu":
            raise Unsupported(f"{name} is on {parameter.device}: move the module to the CPU first")
    return module


def find(root: nn.Module, ignore: Sequence[str], verb: str) -> tuple[list[Target], dict[str, str]]:
    """Targets in the order of the module, and name → reason for layers with weights that are none.

    ignore: names or patterns (``layer3.*``) of layers to leave alone; one that matches nothing is an error.
    Raises Unsupported for transposed convolutions that are not ignored, BadInput when no layer is left.
    """
    ignored = _ignored(root, [ignore] if isinstance(ignore, str) else ignore)
    owners: dict[int, list[nn.Module]] = {}
    for part in root.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(part)
    attended = {id(part.out_proj) for part in root.modules() if isinstance(part, nn.MultiheadAttention)}
    targets, kept = list[Target](), dict[str, str]()
    for name, part in root.named_modules():
        if isinstance(part, TRANSPOSED) and id(part) not in ignored:
            raise Unsupported(
                f"{name or 'the module'} is a {type(part).__name__}: leave it out with ignore=({name!r},)"
            )
        parameters = weights_of(part)
        if not parameters:
            continue
        reason = _reason(part, parameters, owners, ignored)
        if reason:
            kept[name] = reason
        else:
            targets.append(Target(name, part, tuple(parameters), id(part) in attended))
    if not targets:
        why = "; ".join(f"{name or 'itself'}: {reason}" for name, reason in kept.items())
        raise BadInput(f"no layer to {verb} in {type(root).__name__}" + (f" ({why})" if why else ""))
    _check_finite(targets)
    return targets, kept


def _ignored(root: nn.Module, patterns: Iterable[str]) -> set[int]:
    names = dict(root.named_modules(remove_duplicate=False))
    found: set[int] = set()
    for pattern in patterns:
        matched = [part for name, part in names.items() if name and fnmatchcase(name, pattern)]
        if not matched:
            raise BadInput(f"ignore={pattern!r} matches no layer: {nearest(pattern, filter(None, names))}")
        found |= {id(inner) for part in matched for inner in part.modules()}
    return found


def _reason(
    part: nn.Module, parameters: list[str], owners: dict[int, list[nn.Module]], ignored: set[int]
) -> str | None:
    if id(part) in ignored:
        return "ignored"
    if isinstance(part, CodedLayer):
        return "already quantized"
    if getattr(part, "parametrizations", None):
        return "its weight is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None:
        return "max_norm rewrites its weight at every call"
    for parameter in parameters:
        for other in owners[id(part._parameters[parameter])]:
            if id(other) in ignored or not weights_of(other):
                return f"{parameter} is shared with a layer that is left alone"
    return None


def _check_finite(targets: list[Target]) -> None:
    for target in targets:
        for name in target.parameters:
            bad = int((~torch.isfinite(target.module.get_parameter(name))).sum())
            if bad:
                raise BadInput(f"{target.name or 'the module'}: {name} has {bad} values that are NaN or infinite")
