"""A smaller model of the same family: what config.json says of it, and which rows and columns go with which unit.

The smaller config.json comes first, and its description says what every block must look like: whatever differs in size
is a `Group` of units, some of which stay. An element that a weight makes goes with a row of all that make it and a
column of all that read it, which the description knows of every family (`Linear.makes`, `Linear.reads`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..checkpoint.blocks import layer_of
from ..checkpoint.view import Piece
from ..errors import BadRecipe, Unsupported
from .config import Attention, Block, Experts, Linear, ModelConfig
from .families import read_family
from .weights import locate

Indices = NDArray[np.int64]
EXPERTS_GROUP = "experts"


@dataclass(frozen=True)
class Group:
    """Units of a block of which ``keep`` stay in each of ``sections`` equal runs.

    name: the activation, "heads" or "experts".  reader: the weight whose columns go, None for experts.  columns:
    (units, size) of the reader.  rows: role of a weight → (units, n), what of it makes a unit.  vectors: place of a
    vector → (units, n).
    """

    name: str
    count: int
    keep: int
    reader: Linear | None = None
    columns: Indices = field(default_factory=lambda: np.empty((0, 0), np.int64))
    rows: Mapping[str, Indices] = field(default_factory=dict)
    vectors: Mapping[str, Indices] = field(default_factory=dict)
    sections: int = 1

    @property
    def first(self) -> Indices:
        """The units that stay as long as nobody has chosen better ones."""
        each = self.count // self.sections
        return (np.arange(self.sections)[:, None] * each + np.arange(self.keep)).reshape(-1)


@dataclass(frozen=True)
class Resize:
    """whole, small: both models.  config: config.json of the smaller.  layers: the numbers of the blocks that stay."""

    checkpoint: Checkpoint
    whole: ModelConfig
    small: ModelConfig
    config: dict[str, Any]
    layers: tuple[int, ...]

    def groups(self, index: int) -> list[Group]:
        """What has to be cut in a block of the smaller model; experts first."""
        old, new = self.whole.blocks[self.layers[index]], self.small.blocks[index]
        return [*_experts(old, new), *_heads(old, new), *_neurons(old, new)]

    def linears(self, index: int) -> dict[str, Linear]:
        """The weights of a block as it was, by role."""
        return {linear.role: linear for linear in self.whole.blocks[self.layers[index]].linears}

    def prefix(self, index: int) -> str:
        """What the names of a block of the smaller model begin with in the whole one, dot included."""
        return f"{self.whole.block(self.layers[index])}."

    def pieces(self, kept: Mapping[tuple[int, str], Indices]) -> dict[str, Piece]:
        """All tensors of the smaller model; kept: (block, group) → the units that stay."""
        own = {self.whole.block(number) for number in range(self.whole.layers)}
        found = {name: Piece(name) for name in self.checkpoint.infos if layer_of(name) not in own}
        for index in range(len(self.layers)):
            found |= self._block(
                index, {group.name: kept.get((index, group.name), group.first) for group in self.groups(index)}
            )
        return found

    def _block(self, index: int, kept: Mapping[str, Indices]) -> dict[str, Piece]:
        prefix, new = self.prefix(index), f"{self.small.block(index)}."
        infos, linears = self.checkpoint.infos, self.linears(index)
        names = {name: name.removeprefix(prefix) for name in infos if name.startswith(prefix)}
        rows: dict[str, NDArray[np.bool_]] = {}
        columns: dict[str, NDArray[np.bool_]] = {}

        def leave_out(masks: dict[str, NDArray[np.bool_]], name: str, axis: int, gone: Indices) -> None:
            if name in infos:
                masks.setdefault(name, np.ones(infos[name].shape[axis], np.bool_))[gone] = False

        for group in self.groups(index):
            lost = np.setdiff1d(np.arange(group.count), kept[group.name])
            for role, units in group.rows.items():
                source = locate(self.checkpoint, prefix, linears[role])
                places = source.indices()
                gone = units[lost].reshape(-1)
                for name in (f"{prefix}{source.name}.weight", f"{prefix}{source.bias}"):
                    leave_out(rows, name, 0, gone if places is None else places[gone])
            for place, units in group.vectors.items():
                vector = self.whole.blocks[self.layers[index]].vectors[place]
                leave_out(rows, f"{prefix}{vector.name}", 0, units[lost].reshape(-1))
            if group.reader is not None:
                source = locate(self.checkpoint, prefix, group.reader)
                leave_out(columns, f"{prefix}{source.name}.weight", 1, group.columns[lost].reshape(-1))
            else:
                names = self._renumbered(index, names, kept[group.name])
        return {
            f"{new}{short}": Piece(
                name,
                np.flatnonzero(rows[name]) if name in rows else None,
                np.flatnonzero(columns[name]) if name in columns else None,
            )
            for name, short in names.items()
        }

    def _renumbered(self, index: int, names: Mapping[str, str], kept: Indices) -> dict[str, str]:
        """Names of a block's tensors with the experts that stay counted anew, and without the others."""
        linears, prefix, found = self.linears(index), self.prefix(index), dict(names)
        small = {linear.role: linear for linear in self.small.blocks[index].linears}
        moved = {int(old): new for new, old in enumerate(kept)}
        for role, linear in linears.items():
            number, part = expert_of(role)
            if number is None:
                continue
            module = locate(self.checkpoint, prefix, linear).name
            for last in ("weight", "bias"):
                name = f"{prefix}{module}.{last}"
                if found.pop(name, None) is not None and number in moved:
                    found[name] = f"{small[f'experts.{moved[number]}.{part}'].name}.{last}"
        return found


def expert_of(role: str) -> tuple[int | None, str]:
    """An expert's number and which of its weights: ``experts.7.up`` → (7, "up")."""
    parts = role.split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "experts" and len(parts) == 3 else (None, "")


def _experts(old: Block, new: Block) -> Iterator[Group]:
    if isinstance(old.mlp, Experts) and isinstance(new.mlp, Experts) and new.mlp.count != old.mlp.count:
        count = old.mlp.count
        one_each = np.arange(count)[:, None]
        vectors = {place: one_each for place in ("correction", "expert_scale") if place in old.vectors}
        yield Group(EXPERTS_GROUP, count, new.mlp.count, rows={"router": one_each}, vectors=vectors)


def _heads(old: Block, new: Block) -> Iterator[Group]:
    """Groups of queries with their keys and values, or single queries of each group."""
    one, two = old.mixer, new.mixer
    if not isinstance(one, Attention) or not isinstance(two, Attention) or one.heads == two.heads:
        return
    whole_groups = one.kv_heads != two.kv_heads
    count = one.kv_heads if whole_groups else one.heads
    together = one.heads // count
    reader = next(linear for linear in old.linears if linear.role == "o")

    def wide(heads: int, size: int) -> Indices:
        return np.arange(count * heads * size).reshape(count, heads * size)

    queries, mixed = wide(together, one.head_dim), wide(together, one.value_dim)
    rows = {"q": queries, "output_gate": mixed}
    if whole_groups:
        rows |= {"k": wide(1, one.head_dim), "v": wide(1, one.value_dim)}
    roles = {linear.role for linear in old.linears}
    yield Group(
        "heads",
        count,
        two.kv_heads if whole_groups else two.heads // two.kv_heads,
        reader,
        mixed,
        {role: units for role, units in rows.items() if role in roles},
        {"sinks": wide(together, 1)} if "sinks" in old.vectors else {},
        1 if whole_groups else one.kv_heads,
    )


def _neurons(old: Block, new: Block) -> Iterator[Group]:
    small = {linear.role: linear for linear in new.linears}
    for reader in old.linears:
        number, part = expert_of(reader.role)
        role = reader.role if number is None else f"experts.0.{part}"
        if not reader.reads.endswith("mlp_inner") or small[role].shape == reader.shape:
            continue
        count = reader.shape[1]
        one_each = np.arange(count)[:, None]
        makers = {linear.role: one_each for linear in old.linears if linear.makes == reader.reads}
        yield Group(reader.reads, count, small[role].shape[1], reader, one_each, makers)


LAYERS = "num_hidden_layers"
NEURONS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_KINDS = {True: "full_attention", False: "sliding_attention"}


@dataclass(frozen=True)
class Asked:
    """layers: the numbers that stay.  neurons, heads, experts: shares that go.

    multiple: as many neurons as it divides are kept.  multiples: these divide them too, each where it divides all that
    there are.
    """

    layers: tuple[int, ...]
    neurons: float = 0.0
    heads: float = 0.0
    experts: float = 0.0
    multiple: int = 1
    multiples: Sequence[int] = ()


def resize(checkpoint: Checkpoint, asked: Asked) -> Resize:
    """The smaller model that is asked for.

    Raises Unsupported for a family without a description, or that cannot be cut so; BadRecipe for what makes no model.
    """
    whole = read_family(checkpoint, checkpoint.config)
    config = _changed(checkpoint.config, without_layers(checkpoint, whole, asked.layers))
    _check(checkpoint, whole, config, asked)
    if asked.neurons:
        config = _changed(config, _fewer_neurons(config, asked))
    if asked.heads:
        config = _changed(config, _fewer_heads(checkpoint, whole, asked.heads))
    if asked.experts:
        config = _changed(config, _fewer_experts(checkpoint, whole, config, asked.experts))
    return Resize(checkpoint, whole, _check(checkpoint, whole, config, asked), config, asked.layers)


def _values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where config.json describes the text."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": {**config["text_config"], **changes}}
    return {**config, **changes}


def without_layers(checkpoint: Checkpoint, whole: ModelConfig, layers: Sequence[int]) -> dict[str, Any]:
    """What config.json says otherwise when only these blocks stay: how many, and whatever it says block by block."""
    if len(layers) == whole.layers:
        return {}
    if whole.per_layer is not None:
        raise Unsupported(f"{checkpoint.path}: {whole.family}'s second embedding is of all layers: none can be removed")
    values = _values(checkpoint.config)
    found: dict[str, Any] = {LAYERS: len(layers)}
    for key, value in values.items():
        if isinstance(value, list) and len(value) == whole.layers and key != "architectures":
            found[key] = [value[number] for number in layers]
    if isinstance(dense := values.get("mlp_only_layers"), list):
        found["mlp_only_layers"] = [new for new, old in enumerate(layers) if old in dense]
    if isinstance(first := values.get("first_k_dense_replace"), int):
        found["first_k_dense_replace"] = sum(number < first for number in layers)
    mixers = [block.mixer for block in whole.blocks]
    if not isinstance(values.get("layer_types"), list) and len({mixer.window for mixer in mixers}) > 1:
        found["layer_types"] = [_KINDS[mixers[number].window is None] for number in layers]
    return found


def _fewer_neurons(config: Mapping[str, Any], asked: Asked) -> dict[str, int]:
    values, found = _values(config), {}
    for key in NEURONS:
        size = values.get(key)
        if type(size) is not int:
            continue
        multiple = math.lcm(asked.multiple, *(m for m in asked.multiples if size % m == 0))
        found[key] = max(multiple, round(size * (1 - asked.neurons) / multiple) * multiple)
        if found[key] >= size:
            raise BadRecipe(
                f"neurons={asked.neurons:g}: that is less than half of {multiple} of {key}={size}, and neurons are"
                f" kept in multiples of {multiple}"
            )
    return found


def _fewer_heads(checkpoint: Checkpoint, whole: ModelConfig, share: float) -> dict[str, int]:
    """The number of heads nearest to what is asked: fewer groups, or fewer queries in each."""
    found = {block.mixer for block in whole.blocks if isinstance(block.mixer, Attention)}
    sizes = {(mixer.heads, mixer.kv_heads, mixer.head_dim) for mixer in found}
    where = f"{checkpoint.path}: heads={share:g}: {whole.family}"
    if len(sizes) != 1 or any(m.query_key_norm == "all" or m.shares_kv_of is not None for m in found):
        raise Unsupported(
            f"{where} has latents, heads of several sizes, or heads that are normed together; leave heads out"
        )
    heads, groups, size = sizes.pop()
    each = heads // groups
    ways = [(left, each) for left in range(1, groups)] + [(groups, left) for left in range(1, each)]
    if not ways:
        raise BadRecipe(f"{where} has one head only")
    kept, queries = min(ways, key=lambda way: abs(way[0] * way[1] - heads * (1 - share)))
    return {"num_attention_heads": kept * queries, "num_key_value_heads": kept, "head_dim": size}


def _fewer_experts(
    checkpoint: Checkpoint, whole: ModelConfig, config: Mapping[str, Any], share: float
) -> dict[str, int]:
    found = [block.mlp for block in whole.blocks if isinstance(block.mlp, Experts)]
    where = f"{checkpoint.path}: experts={share:g}: {whole.family}"
    if not found:
        raise BadRecipe(f"{where} has no experts; leave experts out")
    count, most = found[0].count, max(rule.top_k for rule in found)
    if found[0].groups > 1:
        raise Unsupported(f"{where} chooses experts by groups of one size; leave experts out")
    left = round(count * (1 - share))
    if not most <= left < count:
        raise BadRecipe(f"{where} would keep {left} of {count} experts; {most} to {count - 1} can stay")
    return {key: left for key in EXPERTS if type(_values(config).get(key)) is int}


def _check(checkpoint: Checkpoint, whole: ModelConfig, config: Mapping[str, Any], asked: Asked) -> ModelConfig:
    """The description of the smaller model, whose blocks must be what they were but for the sizes asked for."""
    small = read_family(checkpoint, config)
    for new, number in zip(small.blocks, asked.layers, strict=True):
        old = whole.blocks[number]
        if _alike(new, old) != old:
            raise Unsupported(
                f"{checkpoint.path}: {whole.family}'s config.json says by a block's number what it is: with other"
                f" numbers layer {number} would be another kind of block"
            )
        for linear in old.linears:
            if locate(checkpoint, f"{whole.block(number)}.", linear).expert is not None and (
                asked.experts or asked.neurons
            ):
                raise Unsupported(f"{checkpoint.path}: {whole.family}'s experts lie in tensors of all; they stay whole")
    return small


def _alike(new: Block, old: Block) -> Block:
    """A block with the sizes of another."""
    mixer, mlp = new.mixer, new.mlp
    if isinstance(mixer, Attention) and isinstance(old.mixer, Attention):
        mixer = replace(mixer, heads=old.mixer.heads, kv_heads=old.mixer.kv_heads)
    if isinstance(mlp, Experts) and isinstance(old.mlp, Experts):
        sizes = {name: getattr(old.mlp, name) for name in ("count", "inner", "shared_inner")}
        mlp = replace(mlp, **sizes)
    elif type(mlp) is type(old.mlp):
        mlp = replace(mlp, inner=old.mlp.inner)
    return replace(new, mixer=mixer, mlp=mlp, weights=old.weights)
