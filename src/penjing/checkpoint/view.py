"""A checkpoint of which only a part is seen: fewer layers, rows and columns, as if it had been saved like that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadCheckpoint
from .folder import Checkpoint
from .safetensors import SafetensorsFile
from .tensors import TensorInfo

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A tensor as it is seen.  source: its name in the whole checkpoint.  rows, columns: ascending; None is all.

    replaced: a file that has its numbers under ``source``, already cut, in place of the checkpoint's.
    """

    source: str
    rows: Indices | None = None
    columns: Indices | None = None
    replaced: Path | None = None


class View(Checkpoint):
    """Tensors of a plain checkpoint under other names, or less of them, read as they are asked for.

    whole: what is seen.  config: what config.json would say of it.  pieces: name → where it comes from.
    """

    def __init__(self, whole: Checkpoint, config: dict[str, Any], pieces: Mapping[str, Piece]) -> None:
        self.path, self.config, self.schemes = whole.path, config, ()
        self.weight_files = whole.weight_files
        self.whole, self.pieces = whole, dict(pieces)
        self.infos = {name: self._info(name, piece) for name, piece in self.pieces.items()}

    def _info(self, name: str, piece: Piece) -> TensorInfo:
        info = self.whole.infos[piece.source]
        shape = list(info.shape)
        for axis, kept in enumerate((piece.rows, piece.columns)):
            if kept is not None:
                shape[axis] = len(kept)
        return replace(info, name=name, shape=tuple(shape))

    def close(self) -> None:
        self.whole.close()

    @property
    def weight_paths(self) -> list[Path]:
        return self.whole.weight_paths

    @property
    def notes(self) -> tuple[str, ...]:
        return self.whole.notes

    @cached_property
    def side_files(self) -> Mapping[str, bytes | Path]:
        return self.whole.side_files

    def file_of(self, stored_name: str) -> Path:
        return self.whole.file_of(self.pieces[stored_name].source)

    def read(self, stored_name: str, rows: slice | None = None) -> NDArray[Any]:
        if stored_name not in self.pieces:
            raise BadCheckpoint(f"{self.path}: tensor {stored_name} is missing")
        piece = self.pieces[stored_name]
        if piece.replaced is not None:
            with SafetensorsFile(piece.replaced) as file:
                return file.read(piece.source, rows)
        found = self._rows(piece, rows)
        return found if piece.columns is None else np.ascontiguousarray(found[:, piece.columns])

    def _rows(self, piece: Piece, rows: slice | None) -> NDArray[Any]:
        if piece.rows is None:
            return self.whole.read(piece.source, rows)
        wanted = piece.rows if rows is None else piece.rows[rows]
        if not len(wanted):
            return self.whole.read(piece.source, slice(0, 0))
        low, high = int(wanted[0]), int(wanted[-1]) + 1
        return self.whole.read(piece.source, slice(low, high))[wanted - low]
