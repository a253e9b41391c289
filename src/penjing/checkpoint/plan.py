"""What a run will read and write: the rule of each module, the tensors of each file, and what that takes.

Everything is known from the headers, before any weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BadCheckpoint, BadRecipe, Unsupported
from ..formats import packed
from ..recipe import Recipe, Rule
from . import floats
from .blocks import Block, order_blocks
from .folder import SINGLE, Checkpoint
from .storage import SCALE_NAMES
from .tensors import TensorInfo

# Families whose weights are stored (in, out): grids and groups run along the other axis.
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# What vLLM puts into one matrix each, with the largest of their steps for the tensor: they are to be the same.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)
CHUNK_BYTES = 32 << 20
# numpy, the interpreter's heap, the header and small tensors.
SLACK_BYTES = 64 << 20


@dataclass(frozen=True)
class Shard:
    """A file to write. first_block: number of decoder layers before it.  modules: those that a rule applies to."""

    name: str
    blocks: tuple[Block, ...]
    first_block: int
    modules: tuple[str, ...]
    copies: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """rules: module → what is done to it.  shards: in the order they are written.

    bitmask: store what is pruned as bitmask and non-zeros.  chunk_bytes: what is read of a large matrix at a time.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    rules: Mapping[str, Rule]
    shards: tuple[Shard, ...]
    bitmask: bool
    chunk_bytes: int

    @property
    def blocks(self) -> int:
        return sum(block.is_layer for shard in self.shards for block in shard.blocks)

    def weight(self, module: str) -> TensorInfo:
        return self.checkpoint.infos[f"{module}.weight"]

    def fused(self, module: str) -> list[str]:
        """The modules that servers multiply as one with this, and that share the step of a whole tensor with it."""
        parent, _, name = module.rpartition(".")
        siblings = next((names for names in FUSED if name in names), (name,))
        near = (f"{parent}.{each}" if parent else each for each in siblings)
        rule = self.rules[module]
        return [each for each in near if each in self.rules and self.rules[each].quantize == rule.quantize]

    def is_sparse(self, module: str) -> bool:
        """Is the module stored as bitmask and non-zeros?"""
        return self.bitmask and self.rules[module].prune is not None

    def row_ranges(self, info: TensorInfo, by_rows: bool = True) -> Iterator[slice]:
        """The rows of a tensor in parts of about `chunk_bytes`; whole when its rows depend on one another."""
        rows = info.shape[0]
        step = max(1, self.chunk_bytes * rows // max(info.nbytes, 1)) if by_rows else max(rows, 1)
        for low in range(0, max(rows, 1), step):
            yield slice(low, min(low + step, rows))

    def input_bytes(self, shard: Shard) -> int:
        return sum(self.checkpoint.infos[name].nbytes for block in shard.blocks for name in block.tensors)

    def output_bytes(self, shard: Shard) -> int:
        """Bytes of the file, headers aside; exact unless a bitmask finds more zeros than were pruned."""
        copied = sum(self.checkpoint.infos[name].nbytes for name in shard.copies)
        return copied + sum(self.module_bytes(module) for module in shard.modules)

    def module_bytes(self, module: str) -> int:
        info, rule = self.weight(module), self.rules[module]
        rows, columns = info.shape
        kept = info.size
        sparse = 0
        if self.is_sparse(module) and rule.prune is not None:
            if rule.prune.budget == "uniform":  # another one is not decided yet, and may leave all
                kept = math.ceil(info.size * (1 - rule.prune.share))
            sparse = rows * -(-columns // 8) + rows * 8 + 16
        if rule.quantize is None:
            return kept * info.dtype.itemsize + sparse
        if rule.quantize.format != "int":
            return floats.nbytes(rule.quantize, (rows, columns), info.step_dtype.itemsize)
        bits = rule.quantize.bits
        codes = rows * packed.words(columns, bits) * 4 if not sparse else packed.words(kept, bits) * 4
        groups = 1 if rule.quantize.group_size <= 0 else columns // rule.quantize.group_size
        zeros = 0 if rule.quantize.symmetric else packed.words(rows, bits) * 4 * groups
        return codes + rows * groups * info.step_dtype.itemsize + zeros + 16 + sparse

    def memory_bytes(self, by_rows: Mapping[str, bool]) -> int:
        """The most that a run holds at once beyond the interpreter: see docs/compress.md for the terms.

        by_rows: the modules that are solved without calibration → may it be done some rows at a time?
        """
        results = [sum(self.module_bytes(m) for m in shard.modules) for shard in self.shards]
        work = 0
        for module in by_rows:
            info = self.weight(module)
            chunk = min(self.chunk_bytes, info.nbytes) if by_rows[module] else info.nbytes
            # Two chunks read ahead, one pruned, the codes of the whole matrix, and its packed words.
            work = max(work, 3 * chunk + 2 * info.size + self.module_bytes(module))
        held = max((info.decoding_bytes for info in self.checkpoint.infos.values()), default=0)
        return 2 * max(results, default=0) + work + held + 2 * self.chunk_bytes + SLACK_BYTES


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, *, bitmask: bool, shard_bytes: int, chunk_bytes: int = CHUNK_BYTES
) -> Plan:
    """Apply a recipe to a checkpoint's headers.

    Raises BadRecipe for a target that matches nothing or settings that do not fit a tensor, BadCheckpoint for a
    weight of another dtype, Unsupported for a model that is compressed already or stored transposed.
    """
    if "quantization_config" in checkpoint.config:
        raise Unsupported(f"{checkpoint.path}: the model is compressed already; compress the original")
    family = checkpoint.config.get("model_type")
    if family in TRANSPOSED:
        raise Unsupported(f"{checkpoint.path}: model_type {family!r} stores its weights transposed (in, out)")
    modules = [
        name.removesuffix(".weight")
        for name, info in sorted(checkpoint.infos.items())
        if name.endswith(".weight") and len(info.shape) == 2
    ]
    rules = recipe.resolve(modules)
    for module, rule in rules.items():
        _check_fit(checkpoint, module, rule)
    if bitmask and not any(rule.prune for rule in rules.values()):
        raise BadRecipe("sparse-storage=bitmask: the recipe prunes nothing; leave the option out or give a sparsity")
    if bitmask and any(rule.quantize and rule.quantize.format != "int" for rule in rules.values()):
        raise BadRecipe("sparse-storage=bitmask: it holds integers or plain weights; leave it out, or format")
    return Plan(checkpoint, recipe, rules, _shards(checkpoint, rules, shard_bytes), bitmask, chunk_bytes)


def _check_fit(checkpoint: Checkpoint, module: str, rule: Rule) -> None:
    info = checkpoint.infos[f"{module}.weight"]
    where = f"{checkpoint.file_of(info.name)}: tensor {info.name}"
    if info.dtype not in SCALE_NAMES:
        raise BadCheckpoint(f"{where} has dtype {info.dtype}; a weight to compress is float32, float16 or bfloat16")
    if 0 in info.shape:
        raise BadCheckpoint(f"{where} is empty: shape {info.shape}")
    columns = info.shape[1]
    if rule.quantize is not None and rule.quantize.group_size > 0 and columns % rule.quantize.group_size:
        if rule.quantize.format != "int":
            raise BadRecipe(
                f"format={rule.quantize.format} has blocks of {rule.quantize.group_size} columns, which do not divide"
                f" {info.name}, shape {info.shape}; take fp8, or a rule of its own for it"
            )
        raise BadRecipe(
            f"group_size={rule.quantize.group_size} does not divide {info.name}, shape {info.shape};"
            f" these do: {_divisors(columns)} (-1 is a step for a whole row)"
        )
    if rule.prune is not None and rule.prune.keep is not None and columns % rule.prune.keep[1]:
        raise BadRecipe(
            f"pattern={rule.prune.pattern} does not divide {info.name}, shape {info.shape}; give one whose M does"
        )


def _divisors(columns: int) -> str:
    usual = [size for size in (16, 32, 64, 128, 256) if columns % size == 0]
    others = [size for size in range(4, min(columns, 256) + 1) if columns % size == 0]
    return ", ".join(str(size) for size in [*(usual or others), -1])


def _shards(checkpoint: Checkpoint, rules: Mapping[str, Rule], shard_bytes: int) -> tuple[Shard, ...]:
    groups: list[list[Block]] = []
    size = 0
    for block in order_blocks(checkpoint.infos):
        if not groups or size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(block)
        size += sum(checkpoint.infos[name].nbytes for name in block.tensors)
    shards, layers = [], 0
    for index, blocks in enumerate(groups):
        name = SINGLE if len(groups) == 1 else f"model-{index + 1:05}-of-{len(groups):05}.safetensors"
        shards.append(_shard(name, blocks, layers, rules))
        layers += sum(block.is_layer for block in blocks)
    return tuple(shards)


def _shard(name: str, blocks: Sequence[Block], first_block: int, rules: Mapping[str, Rule]) -> Shard:
    tensors = [tensor for block in blocks for tensor in block.tensors]
    modules = tuple(tensor.removesuffix(".weight") for tensor in tensors if _has_rule(tensor, rules))
    copies = tuple(tensor for tensor in tensors if not _has_rule(tensor, rules))
    return Shard(name, tuple(blocks), first_block, modules, copies)


def _has_rule(tensor: str, rules: Mapping[str, Any]) -> bool:
    return tensor.endswith(".weight") and tensor.removesuffix(".weight") in rules


def scale_dtype(info: TensorInfo) -> str:
    """What a weight's steps are stored in."""
    return SCALE_NAMES[np.dtype(info.step_dtype)]
