"""What calibrating takes in memory at most, term by term, known before it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..methods import apply, units
from ..methods.statistics import PANEL, Collector
from ..recipe import Recover, Rule
from . import cache
from .inputs import EXPERT
from .stream import Calibrator

# Bytes a number: of the compressed model its code, its value, the value's slope, and both in the products' type; of the
# original its value as float32, and in the products' type
BYTES_DISTILLED = 26
Reader = tuple[tuple[int, ...], tuple[str, ...]]  # shape of a weight, and the statistics of its input that are wanted


@dataclass(frozen=True)
class Needs:
    """Bytes, each the most of all blocks.

    weights: a block's, and the codes of what was solved of it.  statistics: of all inputs of a block; they are
    collected in several runs where the limit asks for it.  largest: of one input, which must fit.  solving: one matrix,
    beside its statistics.  activations: one batch inside a block.  held: all batches, each before a product.
    """

    weights: int
    statistics: int
    largest: int
    solving: int
    activations: int
    held: int


def needs(calibrator: Calibrator, rules: Mapping[str, Rule]) -> Needs:
    """What the blocks that are calibrated take."""
    weights = statistics = largest = solving = inside = held = 0
    for block in calibrator.order[: calibrator.chained]:
        modules = [module for module in _modules(calibrator, block) if module in rules]
        shapes = {module: calibrator.checkpoint.infos[f"{module}.weight"].shape for module in modules}
        wanted = calibrator.wanted(block)
        asked = [(shape, wanted.get(f"{module}.weight")) for module, shape in shapes.items()]
        sums = [Collector.bytes_needed(shape[1], its, "float32") for shape, its in asked if its]
        weights = max(weights, calibrator.graph.block_bytes(block) + sum(prod(shapes[m]) for m in modules))
        statistics, largest = max(statistics, sum(sums)), max(largest, *sums, 0)
        work = [apply.memory_bytes(rules[m], *shapes[m]) + 8 * prod(shapes[m]) for m in modules]
        solving = max(solving, *work, 0)
        inside = max(inside, activations(calibrator, block) + cache.bytes_needed(calibrator.keeps.get(block, {})))
        held = max(held, held_bytes(calibrator, block))
    return Needs(weights, statistics, largest, solving, inside, held)


def needs_of_units(calibrator: Calibrator, readers: Sequence[Sequence[Reader]]) -> Needs:
    """What choosing units takes.  readers: of each block, the weights that read them."""
    weights = statistics = largest = solving = 0
    for block in readers:
        sums = [Collector.bytes_needed(shape[1], needs, "float32") for shape, needs in block]
        statistics, largest = max(statistics, sum(sums)), max(largest, *sums, 0)
        each, square = units.MEMORY
        solving = max(solving, *(each * prod(shape) + square * shape[1] ** 2 for shape, _ in block), 0)
        weights = max(weights, 8 * sum(prod(shape) for shape, _ in block))
    weights += max(calibrator.graph.block_bytes(block) for block in calibrator.order)
    inside = max(activations(calibrator, block) for block in calibrator.order)
    return Needs(weights, statistics, largest, solving, inside, 0)


def recovery_bytes(calibrator: Calibrator) -> int:
    """What training a block takes: each number of it, what it is moved by, its gradient and Adam's two, and a batch.

    What a batch leaves for the way back is counted as two batches more.
    """
    order = calibrator.order[: calibrator.chained]
    numbers = max(sum(t.numel() for t in map(calibrator.graph.tensor, calibrator.graph.block_parts(b))) for b in order)
    return 32 * numbers + 2 * max(activations(calibrator, block) for block in order)


def distil_bytes(calibrator: Calibrator, asked: Recover) -> int:
    """What both models take, what one step leaves in all blocks for the way back, and the probabilities' part."""
    numbers = sum(info.size for info in calibrator.checkpoint.infos.values())
    tokens = calibrator.batch * calibrator.tokens.shape[1]
    step = max(calibrator.tokens.shape[1], min(tokens, asked.tokens))
    inside = sum(activations(calibrator, block) for block in calibrator.order)
    vocabulary = calibrator.graph.model.config.get_text_config().vocab_size
    return int(BYTES_DISTILLED * numbers + 3 * inside * step / tokens + 24 * step * vocabulary)


def _modules(calibrator: Calibrator, block: str) -> Iterator[str]:
    for part in calibrator.graph.block_parts(block).values():
        for _, name in part.sources:
            yield name.removesuffix(".weight")


def activations(calibrator: Calibrator, block: str) -> int:
    """A batch through a block: what goes into and comes out of each layer, and once more as it is multiplied, and
    attention's own."""
    infos = calibrator.checkpoint.infos
    tokens = calibrator.batch * calibrator.tokens.shape[1]
    layers, experts, largest = 0, [0], 0
    for module in _modules(calibrator, block):
        shape = infos[f"{module}.weight"].shape if f"{module}.weight" in infos else ()
        if len(shape) == 2:
            largest = max(largest, prod(shape))
            if EXPERT.match(f"{module}.weight"):
                experts.append(sum(shape))
            else:
                layers += sum(shape)
    routing = 16 * len(experts) ** 2 if len(experts) > 1 else 0  # who goes to which expert, when all go to all
    turned = largest * 4 if calibrator.dtype == torch.float32 else 0  # a weight in the products' type
    columns = max((infos[name].shape[-1] for name in calibrator.wanted(block)), default=0)
    # a panel of the hessian, or the rows in bfloat16 and again in pairs of them
    products = max(8 * min(PANEL, columns), 4 * tokens) * columns
    masks = 3 * calibrator.batch * calibrator.tokens.shape[1] ** 2 * 4
    within = (2 + calibrator.states(block).itemsize) * (layers + 3 * max(experts) + 6 * calibrator.width) + routing
    return int(tokens * within + turned + products + masks)


def held_bytes(calibrator: Calibrator, block: str) -> int:
    """All of the text in the middle of a block: what comes into its widest layer, what goes around it, and
    what attention made, which is as wide as six of the block's input at most."""
    infos = calibrator.checkpoint.infos
    widest = max((max(infos[name].shape) for name in calibrator.wanted(block)), default=0)
    return int(calibrator.states(block).itemsize * calibrator.tokens.size * (widest + 6 * calibrator.width))
