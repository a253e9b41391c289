"""A model as a GGUF file that llama.cpp runs: one matrix in memory at a time.

Weights on a grid keep their integers where a format of ggml holds them: symmetric ones with a step for 32 columns or a
multiple of that (it is repeated) become Q4_0, Q5_0 or Q8_0. Everything else is rounded anew, and `Lost` counts what
that changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint, Weight
from ..checkpoint.gguf import Written, write_gguf
from ..checkpoint.gguf.names import EMBEDDING, FINAL_NORM, HEAD, NORMS, ROLES, Architecture
from ..errors import Unsupported, nearest
from ..formats.affine import AffineTensor
from ..formats.floats import FloatGrid
from ..formats.ggml import KINDS, Kind, decode
from ..formats.ggml_encode import ENCODED, encode, pack
from ..formats.mxfp4 import Mxfp4Tensor
from ..models.config import Linear, ModelConfig
from ..models.weights import check_tensors, read_bias, read_norm, read_weight
from .gguf_metadata import describe

TYPES = ("auto", *ENCODED)
_ROWS_BYTES = 32 << 20
# What a row is stored in when its length is no multiple of a K-format's 256, or of 32.
_SHORTER = {"q4_k": "q5_0", "q5_k": "q8_0", "q6_k": "q8_0"}


@dataclass
class Lost:
    """Of the weights that were rounded anew: how many matrices, the sum of squares, and that of what was changed."""

    matrices: int = 0
    squares: float = 0.0
    changed: float = 0.0

    @property
    def relative(self) -> float:
        return float(np.sqrt(self.changed / self.squares)) if self.squares else 0.0


def write(checkpoint: Checkpoint, config: ModelConfig, output: Path, kind: str) -> tuple[str, int, list[str]]:
    """→ digest, bytes, and what a user should know. Unsupported for what llama.cpp or the format does not have."""
    if kind not in TYPES:
        raise Unsupported(f"type {kind!r} cannot be written; {nearest(kind, TYPES)}")
    check_tensors(checkpoint, config)
    architecture, metadata, extra, notes = describe(checkpoint, config)
    lost = Lost()
    writer = _Writer(checkpoint, config, architecture, kind, lost)
    tensors = [*writer.outside(), *(each for index in range(config.layers) for each in writer.block(index))]
    for name, values in extra.items():
        tensors.append(Written(name, KINDS["f32"], values.shape, [values.astype(np.float32).view(np.uint8)]))
    digest, length = write_gguf(output, metadata, tensors)
    if lost.matrices:
        notes.append(
            f"{lost.matrices} quantized matrices were rounded again to another grid, which changed them by"
            f" {lost.relative:.2%} of their size; --type auto keeps the integers of symmetric grids"
        )
    return digest, length, notes


@dataclass(frozen=True)
class _Part:
    """A matrix to be written, or some rows of it: role None is the embedding's or the head's."""

    rows: int
    read: Any  # () -> Weight
    heads: int = 0  # rows of queries and keys are put in llama.cpp's order for so many


@dataclass(frozen=True)
class _Writer:
    checkpoint: Checkpoint
    config: ModelConfig
    architecture: Architecture
    kind: str
    lost: Lost

    def outside(self) -> Iterator[Written]:
        config, shape = self.config, (self.config.vocab_size, self.config.hidden)
        tied = config.tied_embeddings and self.architecture.tied
        last = self._better(self.kind)
        for name, module in ((EMBEDDING, config.embedding), (HEAD, config.head)):
            if name == HEAD and tied:
                continue
            kind = last if name == HEAD or tied else self.kind
            part = _Part(shape[0], lambda module=module: self.checkpoint.weight(module))
            yield self._matrix(f"{name}.weight", [part], shape, self._choose(module, kind, shape[1]))
        yield from self._norm(FINAL_NORM, config.stem, config.final_norm)

    def block(self, index: int) -> Iterator[Written]:
        block, prefix = self.config.blocks[index], f"{self.config.block(index)}."
        for place, norm in block.norms.items():
            yield from self._norm(f"blk.{index}.{NORMS[place]}", prefix, norm)
        groups: dict[str, list[Linear]] = {}
        fused = {role: name for name, roles in self.architecture.fused.items() for role in roles}
        for linear in block.linears:
            groups.setdefault(fused.get(linear.role) or ROLES[linear.role], []).append(linear)
        for name, linears in groups.items():
            yield from self._linears(f"blk.{index}.{name}", prefix, linears)

    def _linears(self, name: str, prefix: str, linears: list[Linear]) -> Iterator[Written]:
        heads = {"q": self.config.blocks[0].mixer.heads, "k": self.config.blocks[0].mixer.kv_heads}  # type: ignore[union-attr]
        first, turn = linears[0], self.architecture.neighbours
        parts = [
            _Part(
                each.shape[0],
                lambda each=each: read_weight(self.checkpoint, prefix, each),
                heads.get(each.role, 0) if turn else 0,
            )
            for each in linears
        ]
        columns, rows = first.shape[1], sum(part.rows for part in parts)
        kind = self._choose(f"{prefix}{first.name}", self.kind, columns)
        yield self._matrix(f"{name}.weight", parts, (rows, columns), kind)
        biases = [read_bias(self.checkpoint, prefix, each) for each in linears]
        if biases[0] is not None:
            turned = [_turn(bias, part.heads) for bias, part in zip(biases, parts, strict=True) if bias is not None]
            values = np.ascontiguousarray(np.concatenate(turned))
            yield Written(f"{name}.bias", KINDS["f32"], values.shape, [values.view(np.uint8)])

    def _norm(self, name: str, prefix: str, norm: Any) -> Iterator[Written]:
        weight, bias = read_norm(self.checkpoint, prefix, norm)
        for kind, values in (("weight", weight), ("bias", bias)):
            if values is not None:
                yield Written(f"{name}.{kind}", KINDS["f32"], values.shape, [values.view(np.uint8)])

    @staticmethod
    def _better(kind: str) -> str:
        """The format of the matrix that makes logits, which rounding harms most."""
        return {"q4_k": "q6_k", "q5_k": "q6_k"}.get(kind, "q8_0" if kind in ("q4_0", "q4_1", "q5_0") else kind)

    def _choose(self, module: str, kind: str, columns: int) -> Kind:
        if kind == "auto":
            kind = self._as_stored(module)
        if columns % KINDS[kind].size:
            kind = _SHORTER.get(kind, "f16")
        return KINDS[kind if columns % KINDS[kind].size == 0 else "f16"]

    def _as_stored(self, module: str) -> str:
        """The format that holds what a weight is stored in."""
        checkpoint, grid = self.checkpoint, None
        if f"{module}.weight_scale" in checkpoint.infos:
            grid = checkpoint.scheme(module).grid
            if isinstance(grid, FloatGrid):
                return "bf16"
        elif f"{module}.qweight" in checkpoint.infos:
            weight = checkpoint.weight(module)
            if not isinstance(weight, AffineTensor):  # of scattered groups
                return "f16"
            grid = weight.grid
        if grid is not None:
            if not grid.symmetric and grid.bits <= 4:
                return "q4_1"
            return "q4_0" if grid.bits <= 4 else "q5_0" if grid.bits == 5 and grid.symmetric else "q8_0"
        info = checkpoint.infos.get(f"{module}.weight") or checkpoint.infos.get(f"{module}.weight.compressed")
        kinds = {"float32": "f32", "float16": "f16"}
        return "bf16" if info is None else kinds.get(str(info.dtype), "bf16")

    def _matrix(self, name: str, parts: list[_Part], shape: tuple[int, ...], kind: Kind) -> Written:
        return Written(name, kind, shape, (raw for part in parts for raw in self._rows(part, kind)))

    def _rows(self, part: _Part, kind: Kind) -> Iterator[NDArray[np.uint8]]:
        weight: Weight | Mxfp4Tensor = part.read()
        if isinstance(weight, AffineTensor):
            yield _turn(self._requantized(weight, kind), part.heads)
            return
        plain = weight if isinstance(weight, np.ndarray) else weight.decode()
        plain = _turn(plain, part.heads)
        step = max(1, _ROWS_BYTES // (4 * plain.shape[1]))
        for low in range(0, len(plain), step):
            yield encode(kind, plain[low : low + step].astype(np.float32))

    def _requantized(self, weight: AffineTensor, kind: Kind) -> NDArray[np.uint8]:
        exact = _same_integers(weight, kind)
        if exact is not None:
            return exact
        numbers = weight.decode()
        raw = encode(kind, numbers)
        if kind.name != "f32":
            self.lost.matrices += 1
            self.lost.squares += float(np.square(numbers).sum(dtype=np.float64))
            self.lost.changed += float(np.square(numbers - decode(kind, raw)).sum(dtype=np.float64))
        return raw


def _same_integers(weight: AffineTensor, kind: Kind) -> NDArray[np.uint8] | None:
    """A weight in a format with a step for 32, its own integers in it; None where they, or the steps, do not fit."""
    rows, columns = weight.shape
    if kind.size != 32 or (columns // weight.scale.shape[1]) % 32:
        return None
    steps = np.broadcast_to(weight.scale, (rows, weight.scale.shape[1]))
    scale = np.repeat(steps, columns // 32 // steps.shape[1], axis=1)
    if not np.array_equal(scale.astype(np.float16).astype(np.float32), scale):
        return None
    codes: NDArray[Any] = weight.codes.astype(np.int16)
    if weight.zero_point is not None:
        zero = np.repeat(np.broadcast_to(weight.zero_point, steps.shape), columns // steps.shape[1], axis=1)
        if not kind.symmetric:
            low = weight.grid.qmin
            offset = (zero[:, ::32].astype(np.float32) - low) * scale
            return pack(kind, (codes - low).astype(np.int8), scale, offset)
        codes = codes - zero
    if not kind.symmetric or codes.min() < kind.low or codes.max() > kind.high:
        return None
    return pack(kind, codes.astype(np.int8), scale)


def _turn(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows half a head apart become neighbours; 0 heads: as they are."""
    if not heads:
        return rows
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
