"""Neurons, heads and experts: which of a block's go, and what stays moved to make up for them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.safetensors import SafetensorsFile, write_safetensors
from ..checkpoint.view import Piece
from ..methods import linalg, units
from ..methods.statistics import Statistics
from ..models.config import Linear
from ..models.resize import EXPERTS_GROUP, Group, Resize, expert_of
from ..models.weights import locate

if TYPE_CHECKING:
    from ..calibrate import Calibrator, OpenBlock

Indices = NDArray[np.int64]
KEPT = "kept."


class Narrowing:
    """A model's blocks made narrower, one after the other.

    folder: where, of each block, a file says what stays, with the weights that were moved.  lost: module that reads the
    units → the share of its output that their going costs, where data shows it.
    """

    def __init__(self, smaller: Resize, method: str, folder: Path) -> None:
        self.smaller, self.method = smaller, method
        self.needs = units.Config(method).needs
        self.files = [folder / f"shrink-{index:05}.safetensors" for index in range(len(smaller.layers))]
        self.lost: dict[str, float] = {}

    @property
    def finished(self) -> bool:
        return all(file.exists() for file in self.files)

    def _blocks(self) -> list[Block]:
        return [Block(self.smaller, index, self.method) for index in range(len(self.files))]

    def readers(self) -> list[list[tuple[tuple[int, ...], tuple[str, ...]]]]:
        """Of each block, the weights whose inputs' statistics are needed: shape, and which."""
        infos = self.smaller.checkpoint.infos
        return [[(infos[name].shape, needs) for name, needs in block.wanted().items()] for block in self._blocks()]

    def bytes_without_data(self) -> int:
        """Memory of one weight that reads units, of those that make them, and of their squares, in float64."""
        infos = self.smaller.checkpoint.infos
        most = [infos[name].size for block in self._blocks() for name in block.readers]
        return 40 * max(most, default=0)

    def run(self, calibrator: Calibrator | None) -> dict[str, Piece]:
        """All tensors of the smaller model. calibrator: of the model as it is, None where no data is needed."""
        blocks = self._blocks()
        with_data = calibrator is not None and bool(self.needs)
        if calibrator is not None and with_data and not self.finished:
            calibrator.collect({name: needs for block in blocks for name, needs in block.wanted().items()})
        for index, (block, file) in enumerate(zip(blocks, self.files, strict=True)):
            if not file.exists():
                if calibrator is not None and with_data:
                    calibrator.forget_before(block.name)
                    with calibrator.open(block.name, lambda _: None) as opened:
                        block.choose_with(opened)
                else:
                    block.choose()
                kept = {f"{KEPT}{name}": chosen for name, chosen in block.kept.items()}
                write_safetensors(file, {**kept, **block.moved}, {"lost": json.dumps(block.lost)})
                if calibrator is not None and index + 1 == len(blocks):
                    calibrator.forget_all()
        return self._pieces()

    def _pieces(self) -> dict[str, Piece]:
        kept: dict[tuple[int, str], Indices] = {}
        moved: dict[str, Path] = {}
        for index, path in enumerate(self.files):
            with SafetensorsFile(path) as file:
                for name in file.infos:
                    if name.startswith(KEPT):
                        kept[index, name.removeprefix(KEPT)] = file.read(name)
                    else:
                        moved[name] = path
                self.lost |= json.loads(file.metadata["lost"])
        pieces = self.smaller.pieces(kept)
        return {
            name: Piece(piece.source, piece.rows, piece.columns, moved.get(piece.source))
            for name, piece in pieces.items()
        }


class Block:
    """kept: group → the units that stay.  moved: weights that make up for those that go.  lost: as `Narrowing`'s."""

    def __init__(self, smaller: Resize, index: int, method: str) -> None:
        self.checkpoint, self.prefix = smaller.checkpoint, smaller.prefix(index)
        self.name, self.linears = self.prefix.removesuffix("."), smaller.linears(index)
        self.groups = {group.name: group for group in smaller.groups(index)}
        self.config = units.Config(method, seed=zlib.crc32(self.name.encode()))
        self.kept: dict[str, Indices] = {}
        self.moved: dict[str, NDArray[Any]] = {}
        self.lost: dict[str, float] = {}
        self.readers = {self._stored(g.reader): g for g in self.groups.values() if g.reader is not None}

    def _stored(self, linear: Linear) -> str:
        return f"{self.prefix}{locate(self.checkpoint, self.prefix, linear).name}.weight"

    def _downs(self) -> dict[str, int]:
        """The weights whose outputs are the experts', if experts go, each with its expert's number."""
        if EXPERTS_GROUP not in self.groups:
            return {}
        roles = {role: expert_of(role) for role in self.linears}
        return {
            self._stored(self.linears[role]): number
            for role, (number, part) in roles.items()
            if number is not None and part == "down"
        }

    def wanted(self) -> dict[str, tuple[str, ...]]:
        """Statistics of which weights' inputs are needed."""
        return dict.fromkeys(self.readers, self.config.needs) | dict.fromkeys(self._downs(), ("hessian", "input_norm"))

    def choose(self) -> None:
        """Choose without data, what is not chosen yet."""
        for group in self.groups.values():
            if group.name in self.kept:
                continue
            if group.name == EXPERTS_GROUP:
                self._keep_experts(group, np.array([self._size(number) for number in range(group.count)]))
            else:
                assert group.reader is not None
                plain = self.config if not self.config.needs else units.Config("l2")
                weight = self.checkpoint.read(self._stored(group.reader))
                self._keep(group, weight, Statistics(), plain)

    def choose_with(self, opened: OpenBlock) -> None:
        """Choose by what comes into the block, and pass it on with what stays."""
        from ..calibrate.influence import expert_influence

        downs, outputs, cut = self._downs(), dict[int, float](), dict[str, NDArray[Any]]()
        for each, statistics in opened.inputs():
            for module in each.modules:
                name = f"{module}.weight"
                weight = opened.get(name)
                if name in downs:
                    outputs[downs[name]] = float(linalg.losses(weight, statistics["hessian"]).sum())
                if name in self.readers:
                    cut[name] = self._cut(self.readers[name], name, weight, statistics)
        if (experts := self.groups.get(EXPERTS_GROUP)) is not None:
            scores = expert_influence(opened, outputs, experts.count)
            if scores is not None:
                self._keep_experts(experts, scores)
        self.choose()
        for name, weight in cut.items():
            opened.live.set(name, weight)
        opened.advance()

    def _cut(self, group: Group, name: str, weight: NDArray[Any], statistics: Statistics) -> NDArray[Any]:
        """The reader with zeros where units go, and what stays moved."""
        self._keep(group, weight, statistics, self.config)
        columns = np.sort(group.columns[self.kept[group.name]].reshape(-1))
        zeroed = np.zeros_like(weight)
        zeroed[:, columns] = weight[:, columns]
        if "hessian" not in statistics or self.config.way != "obs":
            return zeroed
        self.moved[name] = units.refit(weight, columns, statistics, self.config.damping)
        zeroed[:, columns] = self.moved[name]
        module = name.removesuffix(".weight")
        self.lost[module] = linalg.relative_loss(weight, zeroed, statistics["hessian"])
        return zeroed

    def _keep(self, group: Group, weight: NDArray[Any], statistics: Statistics, config: units.Config) -> None:
        makers = (
            [self._maker(role, places) for role, places in group.rows.items()] if config.way in ("l1", "l2") else []
        )
        self.kept[group.name] = units.choose(
            weight, group.columns, group.keep, makers, statistics, config, group.sections
        )

    def _maker(self, role: str, places: Indices) -> NDArray[Any]:
        """What makes each unit: (units, n)."""
        source = locate(self.checkpoint, self.prefix, self.linears[role])
        stored = self.checkpoint.read(f"{self.prefix}{source.name}.weight")
        rows = source.indices()
        return stored[places if rows is None else rows[places]].reshape(len(places), -1)

    def _keep_experts(self, group: Group, scores: NDArray[np.float64]) -> None:
        self.kept[group.name] = np.sort(np.argsort(-scores, kind="stable")[: group.keep])

    def _size(self, number: int) -> float:
        """The sum of an expert's squared weights; drawn where experts go at random."""
        if self.config.way == "random":
            return float(np.random.default_rng([self.config.seed, number]).random())
        own = [linear for role, linear in self.linears.items() if expert_of(role)[0] == number]
        weights = (self.checkpoint.read(self._stored(linear)).astype(np.float32) for linear in own)
        return float(sum(np.square(weight).sum(dtype=np.float64) for weight in weights))
