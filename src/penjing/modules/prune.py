"""``penjing.prune``: the least important weights of any torch module removed, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import BadInput
from ..stats import Change, paired_change
from . import masks
from .data import Batch, Loss, batches, losses
from .result import Result, Row
from .settings import STRUCTURES, Method, Scope, Settings, settings_of
from .snapshot import Snapshot
from .storage import stored_bytes, total_bytes
from .structured import Structured
from .targets import Target, check, find

SMALLEST = 1e-30


def prune(
    module: nn.Module,
    amount: float | None = None,
    method: Method = "l1",
    scope: Scope = "layer",
    pattern: str = "unstructured",
    ignore: Sequence[str] = (),
    example_inputs: Any = None,
    rounds: int = 1,
    finetune: Callable[[nn.Module], object] | None = None,
    data: Any = None,
    loss: Loss | None = None,
    evaluate_on: Any = None,
    sensitivity: bool = False,
    heads: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Result:
    """Remove the least important weights of a module's layers, in place; the module can be trained on.

    amount: share to remove, between 0 and 1 (default 0.5; with N:M it is 1 − N/M).
    method: importance by magnitude "l1", by square "l2", or "random" by ``seed``.
    scope: the share of each "layer", or of all layers together ("global").
    pattern: "unstructured", or "N:M" (N of M neighbouring inputs stay): zeros kept at zero by masks, stored as bitmask
    and non-zeros. "channel" (outputs of convolutions and linear layers alike), "filters" (convolutions only),
    "neurons" (linear layers only), "heads" (of attention whose query, key and value are linear layers, named with
    their number in ``heads``): tensors really shrink, with all that depends on them; needs ``example_inputs`` (or
    data). The outputs of the module are never cut.
    ignore: names or patterns of layers to leave alone.
    rounds, finetune: prune in that many rounds, calling ``finetune(module)`` after each.
    data, loss, evaluate_on: batches (inputs, target) on which ΔL is measured; nothing is calibrated on them.
    sensitivity: also measure ΔL of each layer pruned alone (unstructured and N:M).
    Raises BadInput or Unsupported, and then leaves the module as it was.
    """
    check(module)
    if pattern in STRUCTURES and sensitivity:
        raise BadInput(f"sensitivity=True with pattern={pattern!r}: layers that depend on one another are cut together")
    settings = settings_of(amount, method, scope, pattern, seed)
    if not isinstance(rounds, int) or rounds < 1:
        raise BadInput(f"rounds={rounds}: 1 or more is right")
    targets, kept = find(module, ignore, "prune")
    evaluation = _evaluation(data, evaluate_on, loss, sensitivity)
    with Snapshot(module.modules()):
        bytes_before = total_bytes(module)
        sizes = {target.name: stored_bytes(target.module) for target in targets}
        base = losses(module, evaluation, loss) if evaluation and loss else None
        alone: dict[str, Change] = {}
        if pattern in STRUCTURES:
            inputs = _example(example_inputs, data)
            structured = Structured(module, targets, inputs, pattern, settings, heads or {})
            shrink, describe = structured.shrink, structured.describe
        else:
            if settings.keep:
                _check_pattern(targets, pattern, settings.keep[1])
            zeros = _Zeros(targets, settings)
            shrink, describe = zeros.shrink, zeros.describe
            if sensitivity and loss is not None:
                alone = _sensitivities(module, targets, settings, evaluation, loss, base)
        for amount_now in _schedule(settings.amount, rounds):
            shrink(amount_now)
            masks.watch_attention(module)
            if finetune is not None:
                finetune(module)
                masks.enforce(module)
        change = None if base is None or loss is None else paired_change(base, losses(module, evaluation, loss))
        rows = [
            Row(
                target.name,
                type(target.module).__name__,
                describe(target),
                sizes[target.name],
                stored_bytes(target.module),
                alone.get(target.name),
            )
            for target in targets
        ]
        base_loss = None if base is None else float(base.mean())
        return Result("prune", rows, bytes_before, total_bytes(module), kept, change, base_loss)


def _evaluation(data: Any, evaluate_on: Any, loss: Loss | None, sensitivity: bool) -> list[Batch]:
    if loss is None:
        if sensitivity:
            raise BadInput("sensitivity=True needs loss= and data to measure on")
        return []
    if evaluate_on is not None:
        return batches(evaluate_on, "evaluate_on")
    if data is None:
        raise BadInput("loss= without data: give data= or evaluate_on= to measure on")
    return batches(data)


def _example(example_inputs: Any, data: Any) -> Any:
    if example_inputs is not None:
        return example_inputs
    if data is None or not (isinstance(data, (Tensor, tuple, list)) or hasattr(data, "dataset")):
        raise BadInput("structured pruning follows the module's graph: give example_inputs= (or data=)")
    return batches(data)[0].part(0, 1).inputs


def _check_pattern(targets: list[Target], pattern: str, of: int) -> None:
    odd = [
        target.name
        for target in targets
        if any(target.module.get_parameter(name)[0].numel() % of for name in target.parameters)
    ]
    if odd:
        raise BadInput(f"pattern={pattern!r}: {of} does not divide the inputs of {', '.join(odd)}; ignore={tuple(odd)}")


def _schedule(amount: float, rounds: int) -> list[float]:
    """Sparsity after round r: amount · (1 − (1 − r/rounds)³), much at first, little at last (Zhu and Gupta, 2017)."""
    return [amount * (1 - (1 - done / rounds) ** 3) for done in range(1, rounds)] + [amount]


class _Zeros:
    """Unstructured and N:M pruning of the targets' parameters; a shared one counts once."""

    def __init__(self, targets: list[Target], settings: Settings) -> None:
        self._settings = settings
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for target in targets:
            for name in target.parameters:
                self._places.setdefault(id(target.module.get_parameter(name)), []).append((target.module, name))
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._random: list[Tensor] = []

    def shrink(self, amount: float) -> None:
        """Mask that share; what a former round removed stays removed."""
        scores = [self._score(*places[0], index) for index, places in enumerate(self._places.values())]
        for mask, places in zip(self._kept(scores, amount), self._places.values(), strict=True):
            for module, name in places:
                masks.put(module, name, mask)

    def _score(self, module: nn.Module, name: str, index: int) -> Tensor:
        """Importance, 0 only where a former round has removed the weight: a weight that is 0 is still there."""
        weight = module.get_parameter(name).detach()
        if self._settings.method == "random":
            if index == len(self._random):
                self._random.append(1 + torch.rand(weight.shape, generator=self._generator))
            score = self._random[index]
        else:
            score = weight.abs().float().clamp(min=SMALLEST)
        return score.masked_fill(~masks.mask_of(module, name), 0)

    def _kept(self, scores: list[Tensor], amount: float) -> list[Tensor]:
        if self._settings.keep:
            of = self._settings.keep[1]
            pattern = (of - round(amount * of), of)
            return [kept(score, amount, pattern) for score in scores]
        if self._settings.scope == "layer":
            return [kept(score, amount) for score in scores]
        together = kept(torch.cat([score.flatten() for score in scores]), amount)
        parts = torch.split(together, [score.numel() for score in scores])
        return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]

    def describe(self, target: Target) -> str:
        removed = [1 - float(masks.mask_of(target.module, name).float().mean()) for name in target.parameters]
        counts = [target.module.get_parameter(name).numel() for name in target.parameters]
        share = sum(r * n for r, n in zip(removed, counts, strict=True)) / sum(counts)
        keep = self._settings.keep
        return f"{share:.1%} zeros" + (f" ({keep[0]}:{keep[1]})" if keep else "")


def kept(scores: Tensor, amount: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """bool like scores: False at the lowest; of equal ones the first goes first."""
    rows = scores.reshape(1, -1) if pattern is None else scores.reshape(-1, pattern[1])
    return torch.from_numpy(kernels.prune(rows.numpy(), amount, "tensor", pattern)).view_as(scores) != 0


def _sensitivities(
    root: nn.Module, targets: list[Target], settings: Settings, evaluation: list[Batch], loss: Loss, base: Any
) -> dict[str, Change]:
    found = {}
    for target in targets:
        snapshot = Snapshot([target.module])
        _Zeros([target], settings).shrink(settings.amount)
        found[target.name] = paired_change(base, losses(root, evaluation, loss))
        snapshot.rollback()
    return found
