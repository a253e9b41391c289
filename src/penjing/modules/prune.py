"""``penjing.prune``: the least important weights of any torch module removed, in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import BadInput, nearest
from ..stats import Change, paired_change
from . import masks
from .data import Batch, Loss, batches, losses
from .result import Result, Row
from .snapshot import Snapshot
from .storage import stored_bytes, total_bytes
from .structured import STRUCTURES, Structured
from .targets import Target, check, find

Method = Literal["l1", "l2", "random"]
Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Settings:
    """What `prune` was asked for, checked."""

    amount: float
    method: Method
    scope: Scope
    keep: tuple[int, int] | None
    seed: int


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
    settings = _settings(amount, method, scope, pattern, seed)
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
            structured = Structured(module, targets, inputs, pattern, settings.method, scope == "global", heads or {})
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


def _settings(amount: float | None, method: str, scope: str, pattern: str, seed: int) -> Settings:
    for name, value, known in (("method", method, get_args(Method)), ("scope", scope, get_args(Scope))):
        if value not in known:
            raise BadInput(f"{name}={value!r} is unknown: {nearest(str(value), known)}")
    keep = None
    if matched := re.fullmatch(r"(\d+):(\d+)", str(pattern)):
        keep = int(matched[1]), int(matched[2])
        if not 0 < keep[0] < keep[1]:
            raise BadInput(f"pattern={pattern!r}: N of M stay, with 0 < N < M, as in '2:4'")
        if amount is not None and amount != 1 - keep[0] / keep[1]:
            raise BadInput(f"amount={amount} contradicts pattern={pattern!r}, which removes {1 - keep[0] / keep[1]}")
        amount = 1 - keep[0] / keep[1]
    elif pattern != "unstructured" and pattern not in STRUCTURES:
        raise BadInput(f"pattern={pattern!r} is unknown: {nearest(str(pattern), ['unstructured', 'N:M', *STRUCTURES])}")
    amount = 0.5 if amount is None else amount
    if not 0 < amount < 1:
        raise BadInput(f"amount={amount}: the share to remove lies between 0 and 1, as in 0.5")
    return Settings(amount, method, scope, keep, seed)  # type: ignore[arg-type]


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
        generator = torch.Generator().manual_seed(settings.seed)
        shapes = [places[0][0].get_parameter(places[0][1]).shape for places in self._places.values()]
        self._random = [torch.rand(shape, generator=generator) for shape in shapes]

    def shrink(self, amount: float) -> None:
        """Mask that share; what a former round removed is removed first."""
        scores = []
        for places, random in zip(self._places.values(), self._random, strict=True):
            module, name = places[0]
            weight = module.get_parameter(name).detach().abs().float()
            score = random.clone() if self._settings.method == "random" else weight
            scores.append(score.masked_fill(~masks.mask_of(module, name), -1))
        for mask, places in zip(self._kept(scores, amount), self._places.values(), strict=True):
            for module, name in places:
                masks.put(module, name, mask)

    def _kept(self, scores: list[Tensor], amount: float) -> list[Tensor]:
        if self._settings.keep:
            of = self._settings.keep[1]
            count = round(amount * of)
            return [kept_per_row(score.reshape(-1, of), count).view_as(score) for score in scores]
        if self._settings.scope == "layer":
            return [
                kept_per_row(score.reshape(1, -1), round(amount * score.numel())).view_as(score) for score in scores
            ]
        together = torch.cat([score.flatten() for score in scores])
        kept = kept_per_row(together[None], round(amount * together.numel()))[0]
        parts = torch.split(kept, [score.numel() for score in scores])
        return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]

    def describe(self, target: Target) -> str:
        removed = [1 - float(masks.mask_of(target.module, name).float().mean()) for name in target.parameters]
        counts = [target.module.get_parameter(name).numel() for name in target.parameters]
        share = sum(r * n for r, n in zip(removed, counts, strict=True)) / sum(counts)
        keep = self._settings.keep
        return f"{share:.1%} zeros" + (f" ({keep[0]}:{keep[1]})" if keep else "")


def kept_per_row(scores: Tensor, count: int) -> Tensor:
    """bool like scores (rows, n): False at the ``count`` lowest of each row; of equal ones the first goes first."""
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)


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
