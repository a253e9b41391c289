"""Whole attention heads cut out of query, key, value and output projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, Unsupported, nearest

# Where attention modules of the field keep their number of heads.
HEAD_COUNTS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "heads")
Heads = dict[nn.Module, int]


def heads_of(root: nn.Module, pattern: str, heads: Mapping[str, int]) -> Heads:
    """The user's name → number of heads as layer → number, checked."""
    named = dict(root.named_modules())
    for name, count in heads.items():
        if name not in named:
            raise BadInput(f"heads: {name!r} is no layer: {nearest(name, filter(None, named))}")
        width = getattr(named[name], "out_features", 0)
        if count < 1 or not width or width % count:
            raise BadInput(f"heads: {name} has {width} outputs, which are not {count} heads")
    if pattern == "heads":
        for name, part in named.items():
            if isinstance(part, nn.MultiheadAttention):
                raise Unsupported(
                    f"{name} is a MultiheadAttention: torch ties its number of heads to its width, so heads cannot"
                    " be cut; with query, key and value as linear layers they can"
                )
        if not heads:
            raise BadInput("pattern='heads' needs heads={layer: number}, naming the query, key and value layers")
    return {named[name]: count for name, count in heads.items()}


def cut_heads(root: nn.Module, inputs: Any, heads: Heads, share: float, method: str) -> Heads:
    """Cut that share of each attention's heads, the least important ones, and always leave one → heads that are left.

    A head's importance is the L1 or L2 norm of its rows in all layers of ``heads`` that the graph ties together.
    """
    import torch_pruning

    left = dict(heads)
    while waiting := [layer for layer in heads if layer in left and left[layer] == heads[layer]]:
        graph = torch_pruning.DependencyGraph().build_dependency(root, inputs)
        layer = waiting[0]
        cut = torch_pruning.prune_linear_out_channels
        tied = _attention(graph.get_pruning_group(layer, cut, list(range(layer.out_features))), layer, heads)  # type: ignore
        count = heads[layer]
        gone = min(round(share * count), count - 1)
        if gone == 0:
            heads = {other: number for other, number in heads.items() if other not in tied}
            continue
        width = layer.out_features // count  # type: ignore[operator]
        order = _importance(tied, count, method).argsort()[:gone]
        rows = [int(head) * width + row for head in order for row in range(width)]
        graph.get_pruning_group(layer, cut, rows).prune()
        for other in tied:
            left[other] = count - gone
        _write_counts(root, tied, count, count - gone)
    return left


def _attention(group: Any, layer: nn.Module, heads: Heads) -> list[nn.Module]:
    """The layers of ``heads`` whose rows go together; Unsupported when they are not cut alike."""
    width = layer.out_features
    tied = []
    for item in group:
        part = item.dep.target.module
        if isinstance(part, nn.Linear) and len(item.idxs) != width:
            raise Unsupported("heads can be cut where query, key and value are layers of their own and of one width")
        if part in heads and part not in tied:
            tied.append(part)
    if len({heads[part] for part in tied}) > 1:
        raise Unsupported("heads: query, key and value with different numbers of heads cannot be cut")
    return tied


def _importance(tied: list[nn.Module], count: int, method: str) -> Tensor:
    if method == "random":
        return torch.rand(count)
    power = 1 if method == "l1" else 2
    weights = [part.get_parameter("weight").detach().float() for part in tied]
    return torch.stack([weight.reshape(count, -1).abs().pow(power).sum(1) for weight in weights]).sum(0)


def _write_counts(root: nn.Module, tied: list[nn.Module], before: int, after: int) -> None:
    """The new number where the module around the layers keeps it."""
    for part in root.modules():
        if any(child is layer for child in part.children() for layer in tied):
            for name in HEAD_COUNTS:
                if part.__dict__.get(name) == before:
                    setattr(part, name, after)
