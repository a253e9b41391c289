"""Recovery: what is free in a compressed block trained to give what the original's layers gave, on calibration text.

What was pruned stays zero. Codes stay, and free are the steps of quantized weights, the weights that are left of the
others, norms and biases; or else codes move on their steps (see `latent`), and beside them only what a pruner left.
Block-wise reconstruction, as in "BRECQ" (Li et al., 2021, arXiv 2102.05426), from the inputs of the compressed model to
the outputs of the original one; by Adam (Kingma and Ba, 2015), at a falling rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from ..checkpoint.safetensors import SafetensorsFile
from ..formats import affine
from ..formats.affine import SCALE_DTYPES, AffineTensor
from ..recipe import Recover
from .graph import Part, to_torch
from .latent import Latent
from .products import Products
from .stream import Calibrator, OpenBlock

Solution = NDArray[Any] | AffineTensor
BETAS = (0.9, 0.95)
HELD_BACK = 8  # of so many batches one is not trained on: it says whether training helped


class Free:
    """A stored tensor with what may move in it: value() is differentiable in ``leaf``, which starts at 0.

    A leaf is in units of what it moves: steps by shares of themselves, weights by shares of their root mean square.
    """

    def __init__(self, stored: NDArray[Any], solved: Solution | None, device: torch.device) -> None:
        self.stored, self.solved = stored, solved
        if isinstance(solved, AffineTensor):
            zero = 0 if solved.zero_point is None else affine.spread(solved.zero_point, solved.shape)
            self._codes = torch.from_numpy((solved.codes.astype(np.float32) - zero).astype(np.float32)).to(device)
            self._base = torch.from_numpy(solved.scale.astype(np.float32).copy()).to(device)
        else:
            weight = (stored if solved is None else solved).astype(np.float32)
            self._base = torch.from_numpy(weight.copy()).to(device)
            self._unit = (self._base != 0) * float(np.sqrt(np.square(weight).mean(dtype=np.float64)))
        self.leaf = torch.zeros_like(self._base, requires_grad=True)

    def value(self) -> Tensor:
        if not isinstance(self.solved, AffineTensor):
            return self._base + self._unit * self.leaf
        scale = self._base * (1 + self.leaf)
        if scale.shape[1] == 1:
            return self._codes * scale
        return (self._codes.view(*scale.shape, -1) * scale[:, :, None]).view(self._codes.shape)

    def result(self) -> Solution:
        """The tensor as it is now, in the type that it is stored in."""
        with torch.no_grad():
            if not isinstance(self.solved, AffineTensor):
                found: NDArray[Any] = self.value().cpu().numpy().astype(self.stored.dtype)
                return found
            scale = (self._base * (1 + self.leaf)).cpu().numpy()
        dtype = SCALE_DTYPES[self.solved.grid.scale_dtype]
        scale = np.maximum(scale.astype(dtype).astype(np.float32), np.float32(np.finfo(np.float32).tiny))
        return AffineTensor(self.solved.codes, scale, self.solved.zero_point, self.solved.grid)


def recover(
    opened: OpenBlock, solutions: Mapping[str, Solution], target: Callable[[slice], Tensor], asked: Recover
) -> tuple[dict[str, Solution], dict[str, float]]:
    """Train an open block, which computes with its solutions → tensors that changed by name, and errors.

    solutions: module → what its weight became.  target: rows of text → what should leave the block.  Errors are mean
    squares on the part of the text that is not trained on, over those of the target, ``before`` and ``after``; where it
    did not get smaller nothing is changed.
    """
    batches = opened.batches(asked.tokens)
    trained, held = divided(batches)
    free = _free(opened, solutions, asked.codes)
    before = _error(opened, free, held, target)
    leaves = [each.leaf for each in free.values() if each.leaf.requires_grad]

    def loss(rows: slice) -> Tensor:
        right = target(rows)
        return (_computed(opened, free, rows) - right).square().mean() / right.square().mean()

    descend(leaves, asked.rate, asked.epochs, trained, opened.number, loss)
    found = {name: each.result() for name, each in free.items() if each.leaf.requires_grad}
    _set(opened, found)
    moved = {name.removesuffix(".weight"): solved for name, solved in found.items()}
    after = _error(opened, _free(opened, moved, asked.codes), held, target)
    if after < before:
        return found, {"before": before, "after": after}
    _set(opened, {name: each.stored if each.solved is None else each.solved for name, each in free.items()})
    return {}, {"before": before, "after": before}


def divided(batches: list[slice]) -> tuple[list[slice], list[slice]]:
    """Rows of text that are trained on, and those that are held back; where there are too few, both are all."""
    trained = [rows for number, rows in enumerate(batches) if (number + 1) % HELD_BACK]
    return trained or batches, [rows for rows in batches if rows not in trained] or batches


def descend(
    leaves: list[Tensor], rate: float, epochs: int, batches: list[slice], seed: int, loss: Callable[[slice], Tensor]
) -> None:
    """Move leaves by Adam, a step for each batch, in another order each epoch, at a rate that falls to 0."""
    optimizer = torch.optim.Adam(leaves, lr=rate, betas=BETAS, eps=1e-12)
    steps, done = epochs * len(batches), 0
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        for index in order.permutation(len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done / steps))
            optimizer.zero_grad()
            loss(batches[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1


def _set(opened: OpenBlock, solutions: Mapping[str, Solution]) -> None:
    """Have the block compute with these tensors."""
    for name, solved in solutions.items():
        opened.live.set(name, solved.decode() if isinstance(solved, AffineTensor) else solved)


def _free(opened: OpenBlock, solutions: Mapping[str, Solution], codes: bool) -> dict[str, Free | Latent]:
    """All floating tensors of a block that it computes with row by row; where codes move, what is not solved stays."""
    found: dict[str, Free | Latent] = {}
    live, rules = opened.live, opened.owner.rules
    for name in live.names:
        module, stored = name.removesuffix(".weight"), live.get(name)
        solved = solutions.get(module) if name.endswith(".weight") else None
        if codes and isinstance(solved, AffineTensor):
            found[name] = Latent(stored, solved, rules[module].prune is not None, live.graph.device)
        elif stored.dtype.kind in "fV":
            found[name] = Free(stored, solved, live.graph.device)
            found[name].leaf.requires_grad_(solved is not None or not codes)
    return found


def _computed(opened: OpenBlock, free: Mapping[str, Free | Latent], rows: slice) -> Tensor:
    """What leaves the block for some rows of text, differentiable in what is free."""
    live = opened.live
    prefix = f"{live.graph.modules[live.name]}."
    values = {name: each.value() for name, each in free.items()}
    parameters = {
        target.removeprefix(prefix): assembled(live.graph.tensor(target), part, values)
        for target, part in live.parts.items()
        if part.pieces is not None and all(piece.name in values for piece in part.pieces)
    }

    def module(*args: Any, **kwargs: Any) -> Any:
        return functional_call(live.module, parameters, args, kwargs)

    with torch.enable_grad(), products(live.dtype):
        return opened.call(rows)(module, opened.hidden(rows))  # type: ignore[arg-type]


def products(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Within it, all products are made in ``dtype``, and have a derivative; those of float32 are torch's own."""
    return nullcontext() if dtype == torch.float32 else Products(_Owned(), dtype, None)


class _Owned:
    """Whose all weights are: those of a block that is trained are new at each step."""

    def names_of(self, weight: Tensor) -> tuple[str, ...]:
        return ("",)


def assembled(tensor: Tensor, part: Part, values: Mapping[str, Tensor]) -> Tensor:
    """A parameter of the graph made of the checkpoint's tensors, as `graph.Graph.filled` makes it."""
    assert part.pieces is not None
    columns = tensor.shape[-1] if tensor.ndim > 1 or part.converter is None else 1
    pieces = sorted(part.pieces, key=lambda piece: piece.at)
    matrices = [values[p.name].reshape(-1, columns)[p.first : p.first + p.rows] for p in pieces]
    made = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    return made.reshape(tensor.shape)


def _error(
    opened: OpenBlock, free: Mapping[str, Free | Latent], batches: list[slice], target: Callable[[slice], Tensor]
) -> float:
    wrong = whole = 0.0
    with torch.no_grad():
        for rows in batches:
            right = target(rows)
            wrong += float((_computed(opened, free, rows).detach() - right).square().sum())
            whole += float(right.square().sum())
    return wrong / max(whole, 1e-30)


class Teacher:
    """The original's hidden states, block by block, computed on the same text as they are asked for.

    after: number of a block of the compressed model → how many of the original's blocks its output stands for.
    """

    def __init__(self, calibrator: Calibrator, after: list[int], asked: Recover) -> None:
        self.calibrator, self.after, self.asked = calibrator, after, asked
        calibrator.collect({})

    def go_through(self, number: int, tokens: NDArray[np.int64]) -> None:
        """Compute what a block's output should be; earlier states are forgotten."""
        self.calibrator.tokens = tokens
        self.calibrator.folder.mkdir(exist_ok=True)
        order, last = self.calibrator.order, self.after[number]
        first = next((n for n in range(last, 0, -1) if self.calibrator.file(n).exists()), 0)
        for each in range(first, last):
            with self.calibrator.open(order[each], lambda _: None) as opened:
                opened.advance()
            self.calibrator.file(each).unlink(missing_ok=True)

    def recover(
        self, opened: OpenBlock, solutions: Mapping[str, Solution]
    ) -> tuple[dict[str, Solution], dict[str, float]]:
        """`recover` an open block towards what the original gave."""
        return recover(opened, solutions, self.target(opened.number), self.asked)

    def target(self, number: int) -> Callable[[slice], Tensor]:
        """What should leave a block, for rows of text: float32."""
        path, device = self.calibrator.file(self.after[number]), self.calibrator.device

        def read(rows: slice) -> Tensor:
            with SafetensorsFile(path) as file:
                return to_torch(file.read("hidden", rows)).to(device, torch.float32)

        return read
