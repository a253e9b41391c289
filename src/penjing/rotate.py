"""A model seen along other axes: its stream, and the values of its heads, turned by rotations folded into the weights.

Along the axes of a Hadamard rotation no channel stands out, and rounding costs less (QuaRot, Ashkboos et al., 2024,
arXiv 2404.00456). An RMS norm without a gain commutes with a rotation Q, so the gains go into what reads the norm's
result: readers become W G Q, writers Qᵀ W, embeddings E Q. Values turn head by head between v and o (Liu et al., 2024,
arXiv 2405.16406). The model computes what it did, by the same graph; embeddings that were tied to the head are no more,
since the last norm's gain goes into the head alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .checkpoint.tensors import TensorInfo
from .errors import Unsupported
from .methods.rotation import Rotation, largest_block, random_rotation
from .models.config import Attention, Block, LatentAttention, ModelConfig, Norm
from .models.families import read_family
from .models.weights import locate

Indices = NDArray[np.int64]
_SLAB = 1 << 18  # numbers that are turned at a time
# What reads the stream → the norm in between; and the norms that see nothing of the stream.
_BEFORE = {"attention_input": "attention_in", "mlp_input": "mlp_in"}
_INNER = {"query", "key", "q_latent", "kv_latent", "state"}
_TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Turn:
    """What becomes of a tensor (out, in), or (out,).

    source: its name in the whole model.  gain: the norm that its columns take over, with the tensor's whole name.
    columns: of its columns.  rows: of its rows, or of those among ``places``.  ones: what a norm's gain becomes.
    """

    source: str
    gain: Norm | None = None
    columns: Rotation | None = None
    rows: Rotation | None = None
    places: Indices | None = None
    ones: float | None = None


@dataclass(frozen=True)
class TurnedInfo(TensorInfo):
    """Of a tensor whose rows depend on one another: it is held whole, in float32 and as it is stored."""

    stored: TensorInfo

    @property
    def stored_bytes(self) -> int:
        return self.stored.stored_bytes

    @property
    def decoding_bytes(self) -> int:
        return self.stored.decoding_bytes + self.nbytes + 4 * self.size

    @property
    def step_dtype(self) -> np.dtype[Any]:
        return self.stored.step_dtype


class Rotated(Checkpoint):
    """``whole`` turned by rotations that the seed draws; computed as it is read, one such tensor held at a time.

    stream: that of the hidden states.  Raises Unsupported, in one line, for what cannot be rotated.
    """

    def __init__(self, whole: Checkpoint, seed: int) -> None:
        self.whole, self.path, self.schemes, self.weight_files = whole, whole.path, (), whole.weight_files
        try:
            model = read_family(whole, whole.config)
        except Unsupported as error:
            raise Unsupported(f"rotate takes a family with a description: {error}") from None
        self.stream = random_rotation(model.hidden, seed)
        self.config = _untied(whole.config)
        self.turns = _turns(whole, model, self.stream, seed)
        self.infos = {name: self._info(name) for name in (*whole.infos, *(self.turns.keys() - whole.infos.keys()))}
        self._held: tuple[str, NDArray[np.float32] | None] = ("", None)

    def _info(self, name: str) -> TensorInfo:
        turn = self.turns.get(name, Turn(name))
        info = replace(self.whole.infos[turn.source], name=name)
        return info if turn.rows is None else TurnedInfo(name, info.dtype, info.shape, info.start, info)

    def close(self) -> None:
        self.whole.close()

    def file_of(self, stored_name: str) -> Path:
        return self.whole.file_of(self.turns.get(stored_name, Turn(stored_name)).source)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.whole.notes

    @cached_property
    def side_files(self) -> Mapping[str, bytes | Path]:
        return self.whole.side_files

    def read(self, stored_name: str, rows: slice | None = None) -> NDArray[Any]:
        turn = self.turns.get(stored_name)
        if turn is None:
            return self.whole.read(stored_name, rows)
        info = self.infos[stored_name]
        if turn.ones is not None:
            return np.full(info.shape, turn.ones, info.dtype)[rows or slice(None)]
        if turn.rows is not None:
            return self._turned_whole(stored_name, turn)[rows or slice(None)].astype(info.dtype)
        low, high, _ = (rows or slice(None)).indices(info.shape[0])
        found = np.empty((max(high - low, 0), info.shape[1]), info.dtype)
        for part in _slabs(*info.shape):  # whole ones, whichever rows are asked for: BLAS sums by how many it is given
            first, last = max(low, part.start), min(high, part.stop)
            if first < last:
                turned = self._columns(turn, self.whole.read(turn.source, part))
                found[first - low : last - low] = turned[first - part.start : last - part.start]
        return found

    def _columns(self, turn: Turn, weight: NDArray[Any]) -> NDArray[np.float32]:
        """Rows of a weight with the gain and the rotation of their columns."""
        found = weight.astype(np.float32)
        if turn.gain is not None and turn.gain.weight is not None:
            found *= self.whole.read(turn.gain.weight).astype(np.float32) + np.float32(turn.gain.offset)
        return found if turn.columns is None else turn.columns.rows(found)

    def _turned_whole(self, name: str, turn: Turn) -> NDArray[np.float32]:
        held, found = self._held
        if held == name and found is not None:
            return found
        self._held, info = ("", None), self.infos[name]
        found = np.empty((info.shape[0], info.size // info.shape[0]), np.float32)
        raw = self.whole.read(turn.source).reshape(found.shape)
        for part in _slabs(*found.shape):
            found[part] = self._columns(turn, raw[part])
        rows, places = turn.rows, slice(None) if turn.places is None else turn.places
        assert rows is not None
        for part in _slabs(*found.shape[::-1]):
            found[places, part] = rows.output_side(found[places, part])
        found = found.reshape(info.shape)
        self._held = name, found
        return found


def _slabs(count: int, width: int) -> Iterator[slice]:
    step = max(1, _SLAB // max(width, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    within = {"text_config": {**text, _TIED: False}} if isinstance(text, dict) else {}
    return {**config, **within, _TIED: False}


def _turns(whole: Checkpoint, model: ModelConfig, stream: Rotation, seed: int) -> dict[str, Turn]:
    """Tensor → what becomes of it; Unsupported where a tensor sees the stream that nothing is known of."""
    _check(whole, model)
    head, embedding, final = f"{model.head_name}.weight", f"{model.embedding}.weight", model.final_norm
    found = {
        embedding: Turn(embedding, columns=stream),
        head: Turn(embedding if model.tied_embeddings else head, _named(final, model.stem), stream),
    }
    if final.weight is not None:
        found[f"{model.stem}{final.weight}"] = Turn(f"{model.stem}{final.weight}", ones=1 - final.offset)
    inner = set[str]()
    for index, block in enumerate(model.blocks):
        prefix = f"{model.block(index)}."
        found |= _of_block(whole, prefix, block, stream, zlib.crc32(prefix.encode(), seed & 0xFFFFFFFF))
        inner |= {f"{prefix}{norm.weight}" for norm in block.norms.values()}
        inner |= {f"{prefix}{vector.name}" for vector in block.vectors.values()}
        inner |= {f"{prefix}{locate(whole, prefix, linear).name}.weight" for linear in block.linears}
    for name in sorted(whole.infos.keys() - found.keys() - inner):
        if model.hidden in whole.infos[name].shape and not name.endswith(".bias"):
            raise _unsupported(whole, model, f"tensor {name} is as wide as the stream, and its description lacks it")
    return found


def _of_block(whole: Checkpoint, prefix: str, block: Block, stream: Rotation, seed: int) -> dict[str, Turn]:
    norms = {place: _named(block.norms[place], prefix) for place in _BEFORE.values()}
    found = {norm.weight: Turn(norm.weight, ones=1 - norm.offset) for norm in norms.values() if norm.weight}
    values, mixed = _of_values(block, seed)
    for linear in block.linears:
        source = locate(whole, prefix, linear)
        name, bias, places = f"{prefix}{source.name}.weight", f"{prefix}{source.bias}", source.indices()
        turn = found.get(name, Turn(name))
        if linear.reads in _BEFORE:
            turn = replace(turn, gain=norms[_BEFORE[linear.reads]], columns=stream)
        elif linear.reads == "attention_output" and mixed is not None:
            turn = replace(turn, columns=mixed)
        rows = stream if linear.makes == "stream" else values if linear.role in ("v", "v_b") else None
        if rows is not None:
            turn = replace(turn, rows=rows, places=places)
            if bias in whole.infos:
                found[bias] = Turn(bias, rows=rows, places=places)
        found[name] = turn
    return found


def _of_values(block: Block, seed: int) -> tuple[Rotation | None, Rotation | None]:
    """Rotations of a block's values, head by head, and of what attention mixes of them; None where they must stay."""
    mixer = block.mixer
    if isinstance(mixer, LatentAttention):
        turn = random_rotation(mixer.heads * mixer.value_dim, seed, largest_block(mixer.value_dim))
        return turn, turn
    makers = {linear.role for linear in block.linears}
    if not isinstance(mixer, Attention) or mixer.output_gate or "v" not in makers or "value" in block.norms:
        return None, None
    turn = random_rotation(mixer.kv_heads * mixer.value_dim, seed, largest_block(mixer.value_dim))
    heads = turn.signs.reshape(mixer.kv_heads, mixer.value_dim)
    return turn, Rotation(np.repeat(heads, mixer.heads // mixer.kv_heads, axis=0).ravel(), turn.block)


def _named(norm: Norm, prefix: str) -> Norm:
    """A norm whose tensors have their whole names."""
    return norm if norm.weight is None else replace(norm, weight=f"{prefix}{norm.weight}")


def _check(whole: Checkpoint, model: ModelConfig) -> None:
    """Unsupported unless all that a block does with the stream commutes with a rotation."""
    norms = [("final", model.final_norm, "")]
    for index, block in enumerate(model.blocks):
        prefix = f"{model.block(index)}."
        norms += [(place, norm, prefix) for place, norm in block.norms.items() if place not in _INNER]
        for linear in block.linears:
            if locate(whole, prefix, linear).expert is not None:
                raise _unsupported(whole, model, "its experts lie in tensors of all of them")
            place = _BEFORE.get(linear.reads)
            if place is not None and place not in block.norms:
                raise _unsupported(whole, model, f"no norm stands before {prefix}{linear.name}")
    for place, norm, prefix in norms:
        if norm.kind != "rms" or norm.bias is not None:
            raise _unsupported(whole, model, f"{prefix}{norm.weight} is a layer norm, which takes a mean of the stream")
        if place not in ("final", *_BEFORE.values()):
            raise _unsupported(whole, model, f"{prefix}{norm.weight} norms the stream, or what is added to it, apart")


def _unsupported(whole: Checkpoint, model: ModelConfig, reason: str) -> Unsupported:
    return Unsupported(f"{whole.path}: {model.family} cannot be rotated: {reason}; leave rotate out")
