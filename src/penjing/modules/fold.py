"""Batch norm folded into the convolution or linear layer before it, so that one integer layer does both.

    w' = w · γ/√(σ² + ε)        b' = (b − μ) · γ/√(σ² + ε) + β

Which layer feeds which batch norm, and nothing else, is read from the graph (torch.fx); where the module cannot be
traced, from runs on data, or, without data, from the order in ``nn.Sequential``.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .data import Batch, evaluating
from .snapshot import Snapshot

NORMS = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}
Pair = tuple[nn.Module, nn.Module]
TOLERANCE = 1e-3


class FoldedBatchNorm(nn.Identity):
    """What is left of a batch norm whose numbers went into the layer before it."""


def fold_batch_norms(root: nn.Module, targets: list[nn.Module], batch: Batch | None) -> list[Pair]:
    """Fold every batch norm that follows one of ``targets`` and only that; the pairs that were folded.

    With a batch, the module's answers before and after are compared, and if they differ nothing is folded.
    """
    pairs = [pair for pair in _pairs(root, batch) if pair[0] in targets and _foldable(root, *pair)]
    if not pairs:
        return []
    snapshot = Snapshot(part for pair in pairs for part in pair)
    before = _answers(root, batch)
    for layer, norm in pairs:
        _fold(layer, norm)
    if not _agree(before, _answers(root, batch)):
        snapshot.rollback()
        return []
    return pairs


def _foldable(root: nn.Module, layer: nn.Module, norm: nn.Module) -> bool:
    kind = next((norms for cls, norms in NORMS.items() if isinstance(layer, cls)), None)
    owners = Counter(id(p) for part in root.modules() for p in part._parameters.values())
    return (
        kind is not None
        and isinstance(norm, kind)
        and norm.running_mean is not None
        and "weight" in layer._parameters
        and owners[id(layer.weight)] == 1
        and len(cast(Tensor, layer.weight)) == norm.num_features
    )


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """In float64; new parameters take the old ones' places."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    factor = (variance + cast(float, norm.eps)).rsqrt()
    shift = torch.zeros_like(mean)
    if norm.weight is not None:
        factor, shift = factor * cast(Tensor, norm.weight).double(), cast(Tensor, norm.bias).double()
    weight, bias = cast(nn.Parameter, layer.weight), cast("nn.Parameter | None", layer.bias)
    with torch.no_grad():
        folded = weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))
        shift = ((bias.double() if bias is not None else 0) - mean) * factor + shift
    layer._parameters["weight"] = nn.Parameter(folded.to(weight.dtype), weight.requires_grad)
    layer._parameters["bias"] = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    mark_folded(norm)


def mark_folded(norm: nn.Module) -> None:
    norm.__class__ = FoldedBatchNorm
    norm._parameters.clear()
    norm._buffers.clear()


def _pairs(root: nn.Module, batch: Batch | None) -> list[Pair]:
    traced = _traced_pairs(root)
    if traced is not None:
        return traced
    return _sequential_pairs(root) if batch is None else _observed_pairs(root, batch)


def _traced_pairs(root: nn.Module) -> list[Pair] | None:
    """Layers whose only user is a batch norm, both called once; None if the module cannot be traced."""
    try:
        with warnings.catch_warnings(), evaluating(root):
            warnings.simplefilter("ignore")
            graph = fx.Tracer().trace(root)
    except Exception:  # a user's forward may fail on symbols in any way
        return None
    calls = Counter(id(root.get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    found = []
    for node in graph.nodes:
        users = list(node.users)
        if node.op != "call_module" or len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,):
            continue
        layer, norm = (root.get_submodule(str(part.target)) for part in (node, users[0]))
        if calls[id(layer)] == calls[id(norm)] == 1 and not read & {str(node.target), str(users[0].target)}:
            found.append((layer, norm))
    return found


def _sequential_pairs(root: nn.Module) -> list[Pair]:
    places = Counter(id(child) for part in root.modules() for child in part.children())
    found = []
    for part in root.modules():
        if type(part).forward is nn.Sequential.forward:
            children = list(part.children())
            pairs = itertools.pairwise(children)
            found += [(a, b) for a, b in pairs if places[id(a)] == places[id(b)] == 1]
    return found


def _observed_pairs(root: nn.Module, batch: Batch) -> list[Pair]:
    """Pairs where, in a run, the very tensor that a layer gave went into the batch norm, each called once."""
    came: dict[int, tuple[nn.Module, Any]] = {}
    calls: Counter[int] = Counter()
    found: list[Pair] = []

    def watch(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[id(part)] += 1
        if inputs and id(inputs[0]) in came:
            found.append((came[id(inputs[0])][0], part))
        came[id(output)] = (part, output)  # the output is held, so that its id stays its own

    hooks = [part.register_forward_hook(watch) for part in root.modules() if not list(part.children())]
    try:
        with evaluating(root):
            batch.run(root)
    finally:
        for hook in hooks:
            hook.remove()
    uses = Counter(id(layer) for layer, _ in found)
    return [(a, b) for a, b in found if calls[id(a)] == calls[id(b)] == uses[id(a)] == 1]


def _answers(root: nn.Module, batch: Batch | None) -> list[Tensor]:
    if batch is None:
        return []
    with evaluating(root):
        output = batch.run(root)
    parts = output if isinstance(output, (tuple, list)) else [output]
    return [part.detach().clone() for part in parts if isinstance(part, Tensor)]


def _agree(before: list[Tensor], after: list[Tensor]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(bool((a - b).abs().max() <= TOLERANCE * a.abs().max().clamp(min=1e-6)) for a, b in pairs)
