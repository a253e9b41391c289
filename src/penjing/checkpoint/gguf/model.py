"""A GGUF file as a checkpoint: Hugging Face's names and order of rows, the file's own integers where they fit a grid.

Formats without an offset are grids as they are: Q4_0, Q5_0, Q8_0, Q3_K and Q6_K are computed on with their own
integers and steps. Q4_1 and Q5_1 are, where every offset is a whole number of steps; other offsets have no place in a
grid, so those weights are put on int8 with a step for 32 (`Checkpoint.notes` says which).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadCheckpoint, Unsupported
from ...formats import affine, ggml
from ...formats.affine import AffineTensor, Grid
from ..folder import Checkpoint
from ..storage import Weight
from ..tensors import DecodedInfo
from .config import Keys, read_config
from .file import GgufFile, GgufTensor
from .names import ROPE, ROPE_LONG, ROPE_SHORT
from .tokenizer import read_tokenizer

# An offset of a Q4_1 block is a whole number of steps when float16 knows no difference.
_WHOLE = 2.0**-10


@dataclass(frozen=True)
class _View(DecodedInfo):
    """A stored tensor under Hugging Face's name.

    tensor: as the file has it.  order: the stored row of each row, None as it is.  offset: what is taken off it.
    """

    tensor: GgufTensor
    order: NDArray[np.int64] | None
    offset: float


class GgufCheckpoint(Checkpoint):
    """A file opened for reading; quantized tensors look like float32 ones to those who read numbers."""

    def __init__(self, path: str | Path) -> None:
        self._gguf = GgufFile(path)
        super().__init__(Path(path), read_config(self._gguf), {})
        self._keys = Keys(self._gguf)
        self.infos = {view.name: view for view in self._views()}
        self.weight_files = [self.path.name]

    def close(self) -> None:
        self._gguf.close()

    @property
    def weight_paths(self) -> list[Path]:
        return [self.path]

    def file_of(self, stored_name: str) -> Path:
        return self.path

    @cached_property
    def notes(self) -> tuple[str, ...]:
        kinds: dict[str, int] = {}
        for view in map(self._view, self.infos):
            name = view.tensor.kind.name.upper()
            if not view.tensor.kind.symmetric:
                kinds[name] = kinds.get(name, 0) + 1
        return tuple(
            f"{self.path}: {count} weights in {kind} are put on int8 with a step for 32, which changes them by about"
            f" 0.6 %{', unless their offsets are whole steps' if kind.endswith('_1') else ''}"
            for kind, count in sorted(kinds.items())
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The formats of its matrices."""
        kinds = {view.tensor.kind for view in map(self._view, self.infos) if len(view.shape) == 2}
        return tuple(sorted(kind.name.upper() for kind in kinds))

    def _stored(self, stored_name: str, rows: slice | None) -> NDArray[Any]:
        view = self._view(stored_name)
        raw = self._raw(view, rows)
        numbers = ggml.decode(view.tensor.kind, raw)
        if len(view.shape) == 1:
            whole = numbers.reshape(-1)
            numbers = (whole if view.order is None else whole[view.order])[rows or slice(None)]
        return numbers - np.float32(view.offset) if view.offset else numbers

    def weight(self, module: str) -> Weight:
        view = self._view(f"{module}.weight")
        if view.tensor.kind.is_float:
            return self.read(view.name)
        found = _on_grid(view.tensor.kind, self._raw(view, None))
        if not np.isfinite(found.scale).all():
            raise BadCheckpoint(f"{self.path}: tensor {view.name} has a step that is a NaN or an infinity")
        return found

    def check_weight(self, module: str, shape: tuple[int, int]) -> None:
        self.check_tensor(f"{module}.weight", shape)

    def is_compressed(self, module: str) -> bool:
        view = self.infos.get(f"{module}.weight")
        return isinstance(view, _View) and not view.tensor.kind.is_float

    def tensor(self, name: str) -> NDArray[Any]:
        return self.read(name)

    @cached_property
    def side_files(self) -> Mapping[str, bytes]:
        """The tokenizer, in Hugging Face's files."""
        if "tokenizer.ggml.tokens" not in self._gguf.metadata:
            return {}
        return {name: text.encode() for name, text in read_tokenizer(self._gguf).items()}

    def _view(self, name: str) -> _View:
        view = self.infos.get(name)
        if not isinstance(view, _View):
            raise BadCheckpoint(f"{self.path}: tensor {name} is missing")
        return view

    def _raw(self, view: _View, rows: slice | None) -> NDArray[np.uint8]:
        if len(view.shape) == 1 or (rows is None and view.order is None):
            return self._gguf.read(view.tensor.name)
        low, high, _ = (rows or slice(None)).indices(view.tensor.rows)
        if view.order is None:
            return self._gguf.read(view.tensor.name, low, max(high - low, 0))
        wanted = view.order[low:high]
        if not len(wanted):
            return self._gguf.read(view.tensor.name, 0, 0)
        start = int(wanted.min())
        return self._gguf.read(view.tensor.name, start, int(wanted.max()) + 1 - start)[wanted - start]

    def _views(self) -> Iterator[_View]:
        architecture = self._keys.architecture
        for name, tensor in self._gguf.tensors.items():
            if name in (ROPE, ROPE_SHORT, ROPE_LONG):
                continue
            stored = architecture.stored(name)
            if stored is None:
                raise Unsupported(f"{self.path}: tensor {name} is not one that {architecture.name} is read with")
            dtype, step = np.dtype(np.float32), np.dtype(np.float16)
            if tensor.kind.is_float:
                dtype = step = tensor.kind.layout
            offset = architecture.norm_offset if "norm" in name else 0.0
            order = self._order(name) if architecture.neighbours else None
            yield _View(stored, dtype, tensor.shape, tensor.start, tensor.nbytes, step, 0, tensor, order, offset)

    def _order(self, name: str) -> NDArray[np.int64] | None:
        """Rows of queries and keys: neighbours of a pair become rows half a head apart."""
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        tensor = self._gguf.tensors[name]
        size = tensor.shape[-1] if len(tensor.shape) == 1 else tensor.shape[0]
        if heads is None:
            return None
        count = self.config[heads]
        if size % (2 * count):
            raise BadCheckpoint(f"{self.path}: tensor {name} has {size} rows, expected whole pairs of {count} heads")
        return np.arange(size).reshape(count, -1, 2).swapaxes(1, 2).reshape(-1)


def _on_grid(kind: ggml.Kind, raw: NDArray[np.uint8]) -> AffineTensor:
    """A quantized weight as integers: its own, or int8 with a step for 32."""
    blocks = ggml.unpack(kind, raw)
    rows = len(raw)
    codes, scale = blocks.codes.reshape(rows, -1), blocks.scale.reshape(rows, -1)
    bits = (kind.high - kind.low).bit_length()
    if blocks.offset is None:
        step = "float16" if kind.size == 32 else "float32"
        return AffineTensor(codes, scale, None, Grid(bits, kind.group, True, step))
    if kind.size == 32:
        zero = np.divide(blocks.offset, blocks.scale, out=np.zeros_like(blocks.scale), where=blocks.scale != 0)
        whole = np.rint(zero)
        close = np.abs(zero - whole) <= _WHOLE * np.maximum(np.abs(whole), 1)
        held = (blocks.scale != 0) | (blocks.offset == 0)
        if (close & held & (whole >= kind.low) & (whole <= kind.high)).all():
            half = 1 << (bits - 1)
            zero_point = (whole.reshape(rows, -1) - half).astype(np.int8)
            return AffineTensor(codes - np.int8(half), scale, zero_point, Grid(bits, 32, False, "float16"))
    grid = Grid(8, 32, True, "float32")
    numbers = blocks.decode().reshape(rows, -1)
    step, _ = affine.fit(*affine.ranges(numbers, grid), grid)
    return AffineTensor(affine.encode(numbers, step, None, grid), step, None, grid)
