"""``penjing.quantize``: the layers of any torch module put on integers, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import BadInput, PenjingError, nearest
from ..formats import affine
from ..formats.affine import PER_CHANNEL, PER_TENSOR, AffineTensor, Grid
from ..methods import rtn
from ..methods.observers import observer as find_observer
from ..methods.statistics import Statistics
from ..stats import Change, paired_change
from . import masks
from .data import Batch, Loss, batches, evaluating, losses, split
from .fold import fold_batch_norms
from .layers import Coded, CodedLayer, Compute, buffers, can_be_integer, convert, keep_off_fast_paths
from .result import Result, Row
from .snapshot import Snapshot
from .storage import stored_bytes, total_bytes
from .targets import Target, check, find

Method = Literal["dynamic", "static", "weight_only"]
OBSERVED_VALUES = 1 << 17  # of each layer's activations, spread evenly over the calibration data
Step = tuple[float, int]


def quantize(
    module: nn.Module,
    method: Method = "dynamic",
    bits: int = 8,
    group_size: int = PER_CHANNEL,
    symmetric: bool = True,
    data: Any = None,
    loss: Loss | None = None,
    observer: str = "minmax",
    ignore: Sequence[str] = (),
    sensitivity: bool = False,
    evaluate_on: Any = None,
) -> Result:
    """Put the weights of a module's layers on integers, in place, for inference.

    method: "dynamic" quantizes activations as they come (8 bits; a step for each row or image) and "static" with
    steps fixed on ``data``; both sum in int32. "weight_only" computes in float on the decoded weights. Layers without
    an integer kernel (embeddings, recurrent layers, attention) are always weights only.
    bits: 2 to 8, of the weights.  group_size: -1 a step a channel, 0 a tensor, or columns a step (weight_only).
    symmetric: weights without a zero point.  observer: "minmax", "percentile" or "mse", how ranges are chosen.
    data, loss: batches (inputs, target) and ``loss(output, target)``; see `data.batches`. With both, ΔL is measured on
    samples that were not calibrated on: for "static" the second half of data, otherwise all of it.
    evaluate_on: other data to measure on.  sensitivity: also measure ΔL of each layer alone.
    ignore: names or patterns of layers to leave alone.

    Batch norms that follow a quantized layer are folded into it. The module is left in evaluation mode, its parameters
    without gradients. Raises BadInput or Unsupported, and then leaves the module as it was.
    """
    check(module)
    grid = _grid(method, bits, group_size, symmetric)
    find_observer(observer)
    targets, kept = find(module, ignore, "quantize")
    calibration, evaluation, notes = _data(method, data, loss, evaluate_on, sensitivity)
    with Snapshot(module.modules()):
        module.eval()
        bytes_before = total_bytes(module)
        sizes = {target.name: stored_bytes(target.module) for target in targets}
        base = losses(module, evaluation, loss) if evaluation and loss else None
        steps = _calibrate(module, targets, calibration, observer) if method == "static" else {}
        sample = (calibration or evaluation)[:1]
        folded = fold_batch_norms(module, [target.module for target in targets], sample[0] if sample else None)
        masks.bake(module)
        plan = _Plan(targets, grid, method, observer, steps)
        alone = _sensitivities(module, plan, evaluation, loss, base) if sensitivity else {}
        for target in targets:
            plan.apply(target)
        keep_off_fast_paths(module)
        change = None if base is None or loss is None else paired_change(base, losses(module, evaluation, loss))
        module.requires_grad_(False)
        names = {id(layer) for layer, _ in folded}
        rows = [
            Row(
                target.name,
                _kind(target.module),
                plan.describe(target) + (", batch norm folded" if id(target.module) in names else ""),
                sizes[target.name],
                stored_bytes(target.module),
                alone.get(target.name),
            )
            for target in targets
        ]
        base_loss = None if base is None else float(base.mean())
        return Result("quantize", rows, bytes_before, total_bytes(module), kept, change, base_loss, notes)


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Quantized")


def _grid(method: str, bits: int, group_size: int, symmetric: bool) -> Grid:
    if method not in get_args(Method):
        raise BadInput(f"method={method!r} is unknown: {nearest(str(method), get_args(Method))}")
    if group_size > 0 and method != "weight_only":
        raise BadInput(
            f"group_size={group_size} with method={method!r}: the integer kernels have one step a channel (-1) or"
            " a tensor (0); groups need method='weight_only'"
        )
    # many steps are stored in 16 bits; the 0.4 % that this moves them is a small part of a step up to 4 bits
    return Grid(bits, group_size, symmetric, "bfloat16" if group_size > 0 and bits <= 4 else "float32")


def _data(
    method: str, data: Any, loss: Loss | None, evaluate_on: Any, sensitivity: bool
) -> tuple[list[Batch], list[Batch], list[str]]:
    """Batches to calibrate on, batches to measure on, and what to say about them."""
    if method == "static" and data is None:
        raise BadInput("method='static' needs data= to calibrate on; without data, method='dynamic' is right")
    if loss is not None and data is None and evaluate_on is None:
        raise BadInput("loss= without data: give data= or evaluate_on= to measure on")
    if sensitivity and loss is None:
        raise BadInput("sensitivity=True needs loss= and data to measure on")
    given = [] if data is None else batches(data)
    measured = [] if evaluate_on is None else batches(evaluate_on, "evaluate_on")
    if method == "static" and loss is not None and not measured:
        given, measured = split(given)
    elif loss is not None and not measured:
        measured = given
    if method != "static":
        return [], measured if loss is not None else [], []
    counts = [sum(batch.size for batch in part) for part in (given, measured)]
    return given, measured if loss else [], [f"calibrated on {counts[0]} samples, measured on {counts[1]} others"]


class _Plan:
    """How each target is converted; parameters shared by several layers are encoded once and stay shared."""

    def __init__(self, targets: list[Target], grid: Grid, method: str, observer: str, steps: dict[str, Step]) -> None:
        self.targets, self.grid, self.method, self.observer, self.steps = targets, grid, method, observer, steps
        self._encoded: dict[int, tuple[Tensor, dict[str, Tensor | None]]] = {}

    def compute(self, target: Target) -> Compute:
        integer = self.method != "weight_only" and can_be_integer(target.module) and not target.attended
        return "integer" if integer else "stored"

    def apply(self, target: Target) -> None:
        module = target.module
        tensors = {name: self._encode(target, name) for name in target.parameters}
        step, zero = self.steps.get(target.name, (None, 0))
        dtype = module.get_parameter(target.parameters[0]).dtype
        grids = dict.fromkeys(target.parameters, self.grid)
        convert(module, Coded(grids, self.compute(target), step, zero, dtype), tensors)

    def _encode(self, target: Target, name: str) -> dict[str, Tensor | None]:
        parameter = target.module.get_parameter(name)
        if id(parameter) not in self._encoded:
            matrix = parameter.detach().float().reshape(len(parameter), -1).numpy()
            try:
                tensor = rtn.solve(matrix, Statistics(), rtn.Config(self.grid, self.observer))
            except BadInput as error:
                raise BadInput(f"{target.name or 'the module'}.{name}: {error}; or ignore this layer") from None
            assert isinstance(tensor, AffineTensor)  # which modules have grids of
            self._encoded[id(parameter)] = (parameter, buffers(tensor, parameter.shape))
        return self._encoded[id(parameter)][1]

    def describe(self, target: Target) -> str:
        size = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(self.grid.group_size, f"{self.grid.group_size}")
        assert isinstance(target.module, CodedLayer)
        activations = "weights" if target.module.coded.compute == "stored" else f"× int8 {self.method}"
        return f"int{self.grid.bits} {activations}, a step a {size}"


def _calibrate(root: nn.Module, targets: list[Target], found: list[Batch], observer: str) -> dict[str, Step]:
    """Step and zero point of what each integer layer is given, from runs on the data."""
    layers = [target for target in targets if can_be_integer(target.module) and not target.attended]
    seen: dict[str, list[Tensor]] = {target.name: [] for target in layers}
    share = OBSERVED_VALUES // len(found)

    def watcher(name: str) -> Any:
        def watch(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            values = inputs[0].detach().float().flatten()
            ends = torch.stack(torch.aminmax(values))
            if not bool(torch.isfinite(ends).all()):
                raise PenjingError(f"{name or 'the module'}: the calibration data reach it as NaN or infinity")
            seen[name] += [ends, values[:: max(1, -(-len(values) // share))].clone()]

        return watch

    hooks = [target.module.register_forward_pre_hook(watcher(target.name)) for target in layers]
    try:
        with evaluating(root):
            for batch in found:
                batch.run(root)
    finally:
        for hook in hooks:
            hook.remove()
    if missed := [name for name, values in seen.items() if not values]:
        raise BadInput(f"the calibration data never reach {', '.join(missed)}: ignore it, or give data that do")
    return {name: _step(torch.cat(values).numpy(), observer) for name, values in seen.items()}


def _step(values: Any, observer: str) -> Step:
    grid = Grid(8, PER_TENSOR, symmetric=False)
    scale, zero_point = affine.fit(*find_observer(observer)(values[None], grid), grid)
    return float(scale[0, 0]), int(zero_point[0, 0])


def _sensitivities(
    root: nn.Module, plan: _Plan, evaluation: list[Batch], loss: Loss | None, base: Any
) -> dict[str, Change]:
    """ΔL of each target alone; layers that share a weight with it are converted with it."""
    assert loss is not None
    found = {}
    for target in plan.targets:
        shared = {id(target.module.get_parameter(name)) for name in target.parameters}
        together = [
            other
            for other in plan.targets
            if shared & {id(other.module.get_parameter(name)) for name in other.parameters}
        ]
        snapshot = Snapshot(other.module for other in together)
        for other in together:
            plan.apply(other)
        found[target.name] = paired_change(base, losses(root, evaluation, loss))
        snapshot.rollback()
    return found
