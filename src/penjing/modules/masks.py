"""Masks that keep pruned weights at zero while the module is trained on.

A mask is a buffer beside its parameter (``weight_mask``, not in ``state_dict``). The parameter stays the same object,
so optimizers made before pruning go on; what a step of theirs put back is zeroed before the next forward and before
``state_dict``. Looking costs a comparison of version counters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _zero_pruned(module: nn.Module, *_: Any) -> None:
    # attention reads its out_proj without calling it
    parts = [module, module.out_proj] if isinstance(module, nn.MultiheadAttention) else [module]
    for part in parts:
        for name, seen in part.__dict__.get("pruned", {}).items():
            parameter = part.get_parameter(name)
            if parameter._version != seen:
                parameter.data.masked_fill_(~part.get_buffer(f"{name}_mask"), 0)
                part.__dict__["pruned"][name] = parameter._version


def put(module: nn.Module, name: str, mask: Tensor) -> None:
    """Zero a parameter where its mask (bool, of its shape) is False, and keep it so."""
    parameter = module._parameters[name]
    assert parameter is not None
    parameter.data = parameter.data.masked_fill(~mask, 0)
    if "pruned" not in module.__dict__:
        module.__dict__["pruned"] = {}
        module.register_forward_pre_hook(_zero_pruned)
        module.register_state_dict_pre_hook(_zero_pruned)  # type: ignore[no-untyped-call]
    module.register_buffer(f"{name}_mask", mask, persistent=False)
    module.__dict__["pruned"] = module.__dict__["pruned"] | {name: parameter._version}


def watch_attention(root: nn.Module) -> None:
    """Let attention modules look after the mask of their output projection."""
    for part in root.modules():
        of_attention = isinstance(part, nn.MultiheadAttention) and "pruned" in part.out_proj.__dict__
        if of_attention and _zero_pruned not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_zero_pruned)


def masked(root: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(layer's name, layer, parameter) of every mask."""
    return [
        (name, part, parameter) for name, part in root.named_modules() for parameter in part.__dict__.get("pruned", {})
    ]


def enforce(root: nn.Module) -> None:
    """Zero whatever training has put where a mask says zero."""
    for _, part, _ in masked(root):
        _zero_pruned(part)


def bake(root: nn.Module) -> None:
    """Enforce the masks for the last time and take them away; the zeros stay."""
    enforce(root)
    for part in root.modules():
        for table in (part._forward_pre_hooks, part._state_dict_pre_hooks):
            for key in [key for key, hook in table.items() if getattr(hook, "hook", hook) is _zero_pruned]:
                del table[key]
        for name in part.__dict__.pop("pruned", {}):
            del part._buffers[f"{name}_mask"]
            part._non_persistent_buffers_set.discard(f"{name}_mask")


def mask_of(module: nn.Module, name: str) -> Tensor:
    """The parameter's mask, or all True."""
    parameter = module._parameters[name]
    assert parameter is not None
    mask = module._buffers.get(f"{name}_mask") if name in module.__dict__.get("pruned", {}) else None
    return torch.ones_like(parameter, dtype=torch.bool) if mask is None else mask
