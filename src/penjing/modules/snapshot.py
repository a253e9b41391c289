"""A module as it was, so that a verb that fails, or that only tries something, leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn

_TABLES = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_modules",
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
)


class Snapshot:
    """Class, attributes, parameters, buffers, children and hooks of modules; copies no tensor.

    What is put back: everything but the elements of tensors that were changed in place, so the verbs replace tensors
    (``parameter.data = …``) instead. As a context manager it rolls back when the block fails.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept: list[tuple[nn.Module, type, dict[str, Any]]] = []
        self._tensors: list[tuple[nn.Parameter, torch.Tensor, bool]] = []
        for module in modules:
            state = dict(module.__dict__)
            state |= {table: state[table].copy() for table in _TABLES if table in state}
            self._kept.append((module, type(module), state))
            self._tensors += [(p, p.data, p.requires_grad) for p in module._parameters.values() if p is not None]

    def rollback(self) -> None:
        for module, cls, state in self._kept:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
            for table in _TABLES:
                if table in state:
                    module.__dict__[table] = state[table].copy()
        for parameter, data, trained in self._tensors:
            parameter.data = data
            parameter.requires_grad_(trained)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is not None:
            self.rollback()
