"""The self-check after compressing: is everything compressed that should be, and does the serving path compute with it?

Two independent ways lead to logits: the saved folder, loaded as the server loads it and computed by its kernels; and
the original's weights, solved again, decoded to float32 and multiplied plainly. They must agree to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import models
from .checkpoint import Checkpoint, Weight
from .errors import PenjingError, Unsupported
from .kernels import reference
from .models.config import ModelConfig
from .models.layers import Array, Block
from .models.weights import load_block
from .recipe import Rule

# Solves rows of a module's weight again from the original: (rows, what they became), in order.
Solve = Callable[[str], Iterable[tuple[slice, Weight]]]
TOKENS = 8
SAMPLE_PARAMETERS = 50_000_000
# Relative root mean square error of the logits. Summing in another order makes about 1e-6; where activations are
# rounded to int8, a number that lies between two codes may go either way.
TOLERANCE, TOLERANCE_INT8 = 1e-3, 5e-2


def verify(
    source: Checkpoint, saved: Checkpoint, rules: Mapping[str, Rule], solve: Solve, extent: str = "sample"
) -> dict[str, Any]:
    """Check a saved artifact → what was checked, for penjing.json; PenjingError says what is wrong.

    extent: the logits of a model of "sample" blocks (all blocks of a small model, else the first and a few that are
    spread evenly), of the "full" model, or "none".
    """
    for module, rule in rules.items():
        _check_module(source, saved, module, rule)
    checked: dict[str, Any] = {"modules": len(rules), "blocks": [], "logits_error": None}
    if extent == "none":
        return checked | {"verdict": f"{len(rules)} modules compressed, steps finite; logits not compared (not asked)"}
    try:
        stream = models.stream(saved)
    except Unsupported as why:
        return checked | {"verdict": f"{len(rules)} modules compressed, steps finite; logits not compared: {why}"}
    blocks = _sample(stream.config, source, extent)
    error = _logits_error(stream, source, rules, solve, blocks)
    limit = TOLERANCE_INT8 if any(map(_int8, rules.values())) else TOLERANCE
    if not error <= limit:
        raise PenjingError(
            f"{saved.path}: self-check failed: the saved model's logits are off by {error:.2e} of their size"
            f" (at most {limit:.0e} is right); please report this"
        )
    return checked | {
        "blocks": list(blocks),
        "logits_error": float(error),
        "verdict": f"{len(rules)} modules compressed, steps finite; logits of {len(blocks)} of {stream.config.layers}"
        f" blocks as served agree with the plain computation to {error:.1e}",
    }


def _check_module(source: Checkpoint, saved: Checkpoint, module: str, rule: Rule) -> None:
    where = f"{saved.path}: self-check failed: {module}"
    parts = saved.parts(module)
    if not parts:
        raise PenjingError(f"{where} is not there")
    if rule.quantize is None:
        return
    if "weight_scale" not in parts:
        raise PenjingError(f"{where} is not quantized")
    grid = saved.scheme(module).grid
    if (grid.bits, grid.symmetric) != (rule.quantize.bits, rule.quantize.symmetric):
        raise PenjingError(f"{where} is {grid.bits} bits in config.json, the recipe says {rule.quantize.bits}")
    scale = saved.read(f"{module}.weight_scale").astype(np.float32)
    rows = source.infos[f"{module}.weight"].shape[0]
    if not np.isfinite(scale).all() or (scale <= 0).any() or scale.shape[0] not in (1, rows):
        raise PenjingError(f"{where} has a step that is not a positive number")


def _sample(config: ModelConfig, source: Checkpoint, extent: str) -> Sequence[int]:
    """Numbers of the blocks whose logits are compared."""
    prefix = f"{config.block(0)}."
    size = sum(info.size for name, info in source.infos.items() if name.startswith(prefix))
    count = config.layers if extent == "full" else min(config.layers, max(1, SAMPLE_PARAMETERS // max(size, 1)))
    return sorted({int(index) for index in np.linspace(0, config.layers - 1, count)})


def _logits_error(
    stream: models.Stream, source: Checkpoint, rules: Mapping[str, Rule], solve: Solve, blocks: Sequence[int]
) -> float:
    """Relative RMS difference of the two ways' logits, through the given blocks only, on a fixed random prompt."""
    config = stream.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, TOKENS)
    served = np.empty((TOKENS, config.hidden), np.float32)
    stream.embed(tokens, served)
    plain = served.copy()
    for index in blocks:
        block = load_block(stream.checkpoint, config, index)
        stream.run(block, served, [TOKENS])
        stream.run(_plain_block(block, config, index, source, rules, solve), plain, [TOKENS])
    norm, head = stream.head()
    served_logits, plain_logits = (stream.logits(x, norm, head) for x in (served, plain))
    if not np.isfinite(served_logits).all():
        return float("inf")
    return float(np.sqrt(np.square(served_logits - plain_logits).mean() / np.square(plain_logits).mean()))


def _plain_block(
    block: Block, config: ModelConfig, index: int, source: Checkpoint, rules: Mapping[str, Rule], solve: Solve
) -> Block:
    """The block with its matrices multiplied plainly, from the original."""
    layers: dict[str, Any] = {}
    for linear in config.blocks[index].linears:
        module = f"{config.block(index)}.{linear.name}"
        int8 = module in rules and _int8(rules[module])
        again = solve if module in rules else _as_it_is(source)
        bias = getattr(block, linear.role).bias
        layers[linear.role] = Again(module, linear.shape[0], bias, int8, again)
    return dataclasses.replace(block, **layers)


def _int8(rule: Rule) -> bool:
    return rule.quantize is not None and rule.quantize.activations == "int8"


def _as_it_is(source: Checkpoint) -> Solve:
    return lambda module: [(slice(0, None), source.read(f"{module}.weight"))]


class Again:
    """A linear layer whose weight is solved again, some rows at a time, whenever it multiplies."""

    def __init__(self, module: str, rows: int, bias: Array | None, int8: bool, solve: Solve) -> None:
        self.module, self.rows, self.bias, self.int8, self.solve = module, rows, bias, int8, solve

    def __call__(self, x: Array) -> Array:
        y = np.empty((len(x), self.rows), np.float32)
        for rows, weight in self.solve(self.module):
            y[:, rows] = self._multiply(x, weight)
        return y if self.bias is None else y + self.bias

    def _multiply(self, x: Array, weight: Any) -> Array:
        if self.int8:
            return reference.int8_matrix(x, weight)
        plain = weight if isinstance(weight, np.ndarray) else weight.decode()
        product: Array = x @ plain.astype(np.float32, copy=False).T
        return product
