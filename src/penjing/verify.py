"""The self-check after compressing: is everything compressed that should be, and does the serving path compute with it?

Two ways lead to logits: the saved folder's matrices, in the layouts that serve and multiplied by their kernels; and the
original's, solved again, decoded to float32 and multiplied plainly. They must agree to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import models
from .checkpoint import Checkpoint, Weight, storage
from .errors import PenjingError, Unsupported
from .formats.affine import AffineTensor
from .formats.floats import FloatGrid
from .kernels import matrix_from, reference
from .models.config import Attention, ModelConfig
from .models.reference import Array, Parts, Reference, read_block, run_block
from .models.weights import check_tensors, locate, read_bias, read_weight
from .recipe import Rule

# Solves rows of a module's weight again from the original: (rows, what they became), in order.
Solve = Callable[[str], Iterable[tuple[slice, Weight]]]
TOKENS = 8
SAMPLE_PARAMETERS = 50_000_000
# Relative root mean square error of the logits. Summing in another order makes about 1e-6; where activations are
# rounded to int8, a number that lies between two codes may go either way.
TOLERANCE, TOLERANCE_INT8 = 1e-3, 5e-2


def verify(
    source: Checkpoint,
    saved: Checkpoint,
    rules: Mapping[str, Rule],
    solve: Solve,
    extent: str = "sample",
    checksums: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Check a saved artifact → what was checked, for penjing.json; PenjingError says what is wrong.

    extent: the logits of a model of "sample" blocks (all blocks of a small model, else the first and a few that are
    spread evenly), of the "full" model, or "none".  checksums: module → `storage.checksum` of what was solved with
    data. That cannot be solved again, so the plain computation takes the saved numbers, which must be those.
    """
    for module, rule in rules.items():
        _check_module(source, saved, module, rule)
    for module, right in (checksums or {}).items():
        if storage.checksum(saved.weight(module)) != right:
            raise PenjingError(f"{saved.path}: self-check failed: {module} is not what was solved; please report this")
    plain = source
    if checksums is not None:
        plain, solve = saved, lambda module: [(slice(None), saved.weight(module))]
    checked: dict[str, Any] = {"modules": len(rules), "blocks": [], "logits_error": None}
    if extent == "none":
        return checked | {"verdict": f"{len(rules)} modules compressed, steps finite; logits not compared (not asked)"}
    try:
        config = models.read_config(saved)
    except Unsupported as why:
        return checked | _check_products(source, saved, rules, solve, extent, str(why))
    check_tensors(saved, config)
    blocks = _sample(config, source, extent)
    error = _logits_error(config, saved, plain, rules, solve, blocks)
    _check_error(saved, "the saved model's logits", error, any(map(_int8, rules.values())))
    return checked | {
        "blocks": list(blocks),
        "logits_error": float(error),
        "verdict": f"{len(rules)} modules compressed, steps finite; logits of {len(blocks)} of {config.layers}"
        f" blocks as served agree with the plain computation to {error:.1e}",
    }


def _check_error(saved: Checkpoint, what: str, error: float, int8: bool) -> None:
    limit = TOLERANCE_INT8 if int8 else TOLERANCE
    if not error <= limit:
        raise PenjingError(
            f"{saved.path}: self-check failed: {what} are off by {error:.2e} of their size"
            f" (at most {limit:.0e} is right); please report this"
        )


def _check_products(
    source: Checkpoint, saved: Checkpoint, rules: Mapping[str, Rule], solve: Solve, extent: str, why: str
) -> dict[str, Any]:
    """Where no description says how the modules make a model, what each makes of a random input; of all or of some."""
    sizes = np.cumsum([source.infos[f"{module}.weight"].size for module in rules])
    count = len(rules) if extent == "full" else max(1, int(np.searchsorted(sizes, SAMPLE_PARAMETERS, "right")))
    chosen = [list(rules)[int(index)] for index in np.linspace(0, len(rules) - 1, min(count, len(rules)))]
    worst = 0.0
    for module in chosen:
        columns, int8 = source.infos[f"{module}.weight"].shape[1], _int8(rules[module])
        x = np.random.default_rng(0).standard_normal((TOKENS, columns)).astype(np.float32)
        served = matrix_from(saved.weight(module), activations=saved.activations(module))(x)
        plain = np.concatenate([_multiply(x, weight, int8) for _, weight in solve(module)], axis=1)
        error = _relative(served, plain)
        _check_error(saved, f"what the saved {module} makes", error, int8)
        worst = max(worst, error)
    return {
        "products_error": worst,
        "verdict": f"{len(rules)} modules compressed, steps finite; products of {len(set(chosen))} of them as served"
        f" agree with the plain computation to {worst:.1e}; logits not compared: {why}",
    }


def _relative(served: Array, plain: Array) -> float:
    """Root mean square of the difference, over that of what is right."""
    if not np.isfinite(served).all():
        return float("inf")
    return float(np.sqrt(np.square(served - plain).mean() / max(np.square(plain).mean(), np.finfo(np.float32).tiny)))


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
    kind = grid.kind if isinstance(grid, FloatGrid) else "int"
    if kind != rule.quantize.format:
        raise PenjingError(f"{where} is {kind} in config.json, the recipe says {rule.quantize.format}")
    if (grid.bits, grid.symmetric) != (rule.quantize.bits, rule.quantize.symmetric):
        raise PenjingError(f"{where} is {grid.bits} bits in config.json, the recipe says {rule.quantize.bits}")
    if kind != "int":
        saved.weight(module)  # which refuses steps that are no numbers, and tensors of another shape
        return
    scale = saved.read(f"{module}.weight_scale").astype(np.float32)
    rows = source.infos[f"{module}.weight"].shape[0]
    if not np.isfinite(scale).all() or (scale <= 0).any() or scale.shape[0] not in (1, rows):
        raise PenjingError(f"{where} has a step that is not a positive number")


def _sample(config: ModelConfig, source: Checkpoint, extent: str) -> Sequence[int]:
    """Numbers of the blocks whose logits are compared."""
    prefix = f"{config.block(0)}."
    size = sum(info.size for name, info in source.infos.items() if name.startswith(prefix))
    count = config.layers if extent == "full" else min(config.layers, max(1, SAMPLE_PARAMETERS // max(size, 1)))
    chosen = {int(index) for index in np.linspace(0, config.layers - 1, count)}
    mixers = [config.blocks[index].mixer for index in chosen]
    shared = {mixer.shares_kv_of for mixer in mixers if isinstance(mixer, Attention)} - {None}
    return sorted(chosen | {index for index in shared if index is not None})


def _logits_error(
    config: ModelConfig,
    saved: Checkpoint,
    source: Checkpoint,
    rules: Mapping[str, Rule],
    solve: Solve,
    blocks: Sequence[int],
) -> float:
    """Relative RMS difference of the two ways' logits, through the given blocks only, on a fixed random prompt."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, TOKENS)
    config = config.for_length(TOKENS)
    outside = Reference(saved, config)
    start = outside.embed(tokens)
    extra = outside.per_layer(tokens, start)

    def through(parts_of: Callable[[int], Parts]) -> Array:
        x, shared = start, dict[int, tuple[Array, Array]]()
        for index in blocks:
            own = None if extra is None else extra[:, index]
            x = run_block(config.blocks[index], parts_of(index), x, index, shared, own)
        return outside.head(x)

    served = through(lambda index: _served_parts(config, index, saved))
    plain = through(lambda index: _plain_parts(config, index, source, rules, solve))
    return _relative(served, plain)


def _served_parts(config: ModelConfig, index: int, saved: Checkpoint) -> Parts:
    """The block with its matrices in the layouts that serve, multiplied by the kernels."""
    prefix = f"{config.block(index)}."
    linears = {linear.role: linear for linear in config.blocks[index].linears}

    def linear(role: str, x: Array) -> Array:
        module = f"{prefix}{locate(saved, prefix, linears[role]).name}"
        matrix = matrix_from(read_weight(saved, prefix, linears[role]), activations=saved.activations(module))
        return matrix(x, read_bias(saved, prefix, linears[role]))

    return dataclasses.replace(read_block(saved, config, index), linear=linear)


def _plain_parts(config: ModelConfig, index: int, source: Checkpoint, rules: Mapping[str, Rule], solve: Solve) -> Parts:
    """The block with its matrices multiplied plainly, from the original; compressed ones are solved again."""
    prefix = f"{config.block(index)}."
    linears = {linear.role: linear for linear in config.blocks[index].linears}
    parts = read_block(source, config, index)

    def linear(role: str, x: Array) -> Array:
        where = locate(source, prefix, linears[role])
        module = f"{prefix}{where.name}"
        if module not in rules:
            return parts.linear(role, x)
        pieces = [_multiply(x, weight, _int8(rules[module])) for _, weight in solve(module)]
        y, rows = np.concatenate(pieces, axis=1), where.indices()
        y = y if rows is None else y[:, rows]
        bias = read_bias(source, prefix, linears[role])
        return y if bias is None else y + bias

    return dataclasses.replace(parts, linear=linear)


def _int8(rule: Rule) -> bool:
    return rule.quantize is not None and rule.quantize.activations == "int8"


def _multiply(x: Array, weight: Weight, int8: bool) -> Array:
    if int8 and isinstance(weight, AffineTensor):
        return reference.int8_matrix(x, weight)
    plain = weight if isinstance(weight, np.ndarray) else weight.decode()
    return x @ plain.astype(np.float32, copy=False).T
