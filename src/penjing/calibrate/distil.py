"""Distillation: the steps, norms and biases of all blocks trained together, towards the original's probabilities.

Both models are in memory as a whole, and what is minimised is what is lost in the end: KL(original ‖ compressed) of
the next token, on calibration text (Hinton et al., 2015, arXiv 1503.02531). Codes stay: a step has a group's weights
to learn from, and so few numbers learn nothing by heart; as the second phase of "EfficientQAT" (Chen et al., 2024,
arXiv 2407.11062), with norms and biases too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from ..checkpoint import Checkpoint
from ..formats.affine import AffineTensor
from ..recipe import Recover
from .graph import Graph, to_torch
from .recover import Free, Solution, assembled, descend, divided, products
from .stream import Calibrator

RATE = 2e-3


def may_distil(calibrator: Calibrator) -> bool:
    """Does the graph give probabilities, all of its tensors made of rows of the checkpoint's?"""
    graph = calibrator.graph
    by_rows = {target for target, part in graph.parts.items() if part.pieces is not None}
    wanted = {name for name, _ in graph.model.named_parameters(remove_duplicate=False)} - _tied(graph).keys()
    return graph.model.can_generate() and wanted <= by_rows


def _tied(graph: Graph) -> dict[str, str]:
    """Tensors of the graph that are others once more."""
    ties: dict[str, str] = getattr(graph.model, "all_tied_weights_keys", {})
    return {name: other for name, other in ties.items() if name not in graph.parts and other in graph.parts}


class Pupil:
    """A compressed model as it was saved, with what may move in it.

    free: name of a tensor of the blocks → its steps, or the whole of a vector.
    """

    def __init__(self, graph: Graph, saved: Checkpoint) -> None:
        self.graph, self.free = graph, dict[str, Free]()
        self._fixed: dict[str, Tensor] = {}
        parts = [part for block in graph.modules for part in graph.block_parts(block).values()]
        movable = {name for part in parts for _, name in part.sources}
        for name in dict.fromkeys(name for part in graph.parts.values() for _, name in part.sources):
            info, module = graph.checkpoint.infos[name], name.removesuffix(".weight")
            packed = module != name and saved.is_compressed(module)
            weight = saved.weight(module) if packed and name in movable else None
            if isinstance(weight, AffineTensor):
                self.free[name] = Free(np.zeros(0, info.dtype), weight, graph.device)
            elif name in movable and info.dtype.kind in "fV" and len(info.shape) == 1:
                self.free[name] = Free(saved.read(name), None, graph.device)
            else:
                self._fixed[name] = to_torch(saved.tensor(name)).to(graph.device)

    def parameters(self) -> dict[str, Tensor]:
        """The graph's tensors, float32, differentiable in what is free."""
        values = {name: value.float() if value.is_floating_point() else value for name, value in self._fixed.items()}
        values |= {name: each.value() for name, each in self.free.items()}
        parts = self.graph.parts.items()
        return {target: assembled(self.graph.tensor(target), part, values) for target, part in parts}

    def keep(self) -> dict[str, Solution]:
        """What moved, as it is stored; and go on with that."""
        found = {name: each.result() for name, each in self.free.items()}
        for name, solved in found.items():
            if isinstance(solved, AffineTensor):
                self.free[name] = Free(self.free[name].stored, solved, self.graph.device)
            else:
                self.free[name] = Free(solved, None, self.graph.device)
        return found


def distil(
    calibrator: Calibrator, original: Calibrator, saved: Checkpoint, asked: Recover, tick: Callable[[], None]
) -> tuple[dict[str, Solution], dict[str, float]]:
    """Train a compressed model → tensors that changed by name, and errors.

    calibrator, original: of the model that was compressed, and of the one to be like.  saved: the compressed model.
    tick: called at each step.  Errors are mean KL a token, on the part of the text that is not trained on, ``before``
    and ``after``; where it did not get smaller nothing is changed.
    """
    trained, held = divided(calibrator.batches_of(asked.tokens))
    pupil = Pupil(calibrator.graph, saved)
    right = {target: original.graph.filled(target) for target in original.graph.parts}
    if original.dtype == torch.float32:
        right = {target: value.float() if value.is_floating_point() else value for target, value in right.items()}

    def divergence(rows: slice) -> Tensor:
        tick()
        tokens = calibrator.ids(rows)
        with torch.no_grad():
            wanted = _scores(original, right, tokens)
        return functional.kl_div(
            _scores(calibrator, pupil.parameters(), tokens), wanted, log_target=True, reduction="batchmean"
        )

    def error() -> float:
        with torch.no_grad():
            found = [float(divergence(rows)) for rows in held]
        return float(np.average(found, weights=[rows.stop - rows.start for rows in held]))

    before = error()
    leaves = [each.leaf for each in pupil.free.values()]
    with torch.enable_grad():
        descend(leaves, RATE, asked.distill, trained, len(calibrator.order), divergence)
    found = pupil.keep()
    after = error()
    return (found, {"before": before, "after": after}) if after < before else ({}, {"before": before, "after": before})


def _scores(calibrator: Calibrator, parameters: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Log-probabilities of what comes after each of the tokens: float32 (tokens, vocabulary)."""
    graph, given = calibrator.graph, {"input_ids": tokens, "use_cache": False}
    whole = dict(parameters) | {name: parameters[other] for name, other in _tied(graph).items()}
    with products(calibrator.dtype):
        logits = functional_call(graph.model, whole, (), given).logits
    found: Tensor = torch.log_softmax(logits.flatten(0, 1).float(), -1)
    return found
