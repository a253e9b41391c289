"""Batches of the user's data, and losses measured on them sample by sample."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import BadInput

MATERIALISED_BYTES = 1 << 30
ROWS_A_BATCH = 64
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """inputs: what the module is called with.  target: what the loss compares with, or None.  size: samples."""

    inputs: Any
    target: Any
    size: int

    def part(self, low: int, high: int) -> Batch:
        return Batch(_rows(self.inputs, low, high), _rows(self.target, low, high), high - low)

    def run(self, module: nn.Module) -> Any:
        if isinstance(self.inputs, Mapping):
            return module(**self.inputs)
        return module(*self.inputs) if isinstance(self.inputs, tuple) else module(self.inputs)


def _rows(value: Any, low: int, high: int) -> Any:
    if isinstance(value, Tensor):
        return value[low:high]
    if isinstance(value, Mapping):
        return {key: _rows(item, low, high) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_rows(item, low, high) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def batches(data: Any, name: str = "data") -> list[Batch]:
    """The user's data as a list of batches.

    data: an iterable of batches (a DataLoader, a list, a generator), each a tensor of inputs or a pair (inputs,
    target) with inputs a tensor, a tuple or a dict of tensors; or the whole set at once, as a tensor of inputs or a
    tuple of two tensors. Reading stops after 1 GiB of tensors.
    Raises BadInput when there is nothing in it.
    """
    if isinstance(data, Tensor) or (isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)):
        whole = _batch(data, name)
        lows = range(0, whole.size, ROWS_A_BATCH)
        found = [whole.part(low, min(low + ROWS_A_BATCH, whole.size)) for low in lows]
    else:
        if not isinstance(data, Iterable):
            raise BadInput(
                f"{name} is a {type(data).__name__}: give an iterable of batches (inputs, target), or tensors"
            )
        found, held = [], 0
        for item in data:
            found.append(_batch(item, name))
            held += sum(tensor.nbytes for tensor in _tensors(item))
            if held > MATERIALISED_BYTES:
                break
    found = [batch for batch in found if batch.size]
    if not found:
        raise BadInput(f"{name} is empty: at least one batch is needed")
    return found


def _batch(item: Any, name: str) -> Batch:
    inputs, target = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    sizes = [len(tensor) for tensor in _tensors(inputs) if tensor.dim()]
    if not sizes:
        raise BadInput(f"{name} has a batch without tensors ({type(item).__name__}): give (inputs, target)")
    return Batch(inputs, target, sizes[0])


def split(found: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Calibration and evaluation: the first half of the samples and the rest; BadInput for a single sample."""
    total = sum(batch.size for batch in found)
    if total < 2:
        raise BadInput("data has 1 sample: calibrating and measuring the loss need different ones; give evaluate_on=")
    wanted, first, second = total // 2, list[Batch](), list[Batch]()
    for batch in found:
        take = min(batch.size, wanted)
        first += [batch.part(0, take)] if take else []
        second += [batch.part(take, batch.size)] if take < batch.size else []
        wanted -= take
    return first, second


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every part's own mode comes back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def losses(module: nn.Module, found: list[Batch], loss: Loss) -> NDArray[np.float64]:
    """One loss a sample (samples,), each computed from that sample's row of the output and target alone.

    A loss that answers one value a sample (``reduction="none"``) is called once a batch; any other is called once a
    sample, so a mean over the batch need not be known as one. When the output has no rows, a batch is one sample.
    """
    if any(batch.target is None for batch in found):
        raise BadInput("a loss needs targets: give batches as (inputs, target)")
    unreduced = _unreduced(loss)
    measured: list[float] = []
    with evaluating(module):
        for batch in found:
            output = batch.run(module)
            measured += _sample_losses(output, batch, unreduced)
    return np.array(measured, np.float64)


def _unreduced(loss: Loss) -> Loss:
    """A torch loss module that keeps the samples apart; other functions as they are."""
    if isinstance(loss, nn.modules.loss._Loss) and getattr(loss, "reduction", None) == "mean":
        loss = copy.copy(loss)
        loss.reduction = "none"
    return loss


def _sample_losses(output: Any, batch: Batch, loss: Loss) -> list[float]:
    values = loss(output, batch.target)
    if values.dim() and len(values) == batch.size:
        return [float(value) for value in values.reshape(batch.size, -1).mean(1)]
    if not all(tensor.dim() and len(tensor) == batch.size for tensor in _tensors((output, batch.target))):
        return [float(values.mean())]
    rows = range(batch.size)
    return [float(loss(_rows(output, row, row + 1), _rows(batch.target, row, row + 1))) for row in rows]
