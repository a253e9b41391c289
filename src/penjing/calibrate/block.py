"""A block of a graph with its weights in memory: read, computed with, changed, and dropped again."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .graph import Call, Graph, Part, Piece, as_rows, to_torch
from .products import Products


@dataclass(frozen=True)
class _Place:
    """Where rows of a tensor of the checkpoint lie: in ``rows``, a parameter seen as a matrix."""

    rows: Tensor
    piece: Piece


class LiveBlock:
    """A block whose tensors are read as it is made, and freed as its context ends.

    name: the checkpoint's block.  module: transformers' module of it.  dtype: what products are made in.  states: what
    it computes in between them.
    """

    def __init__(self, graph: Graph, name: str, dtype: torch.dtype, states: torch.dtype) -> None:
        self.graph, self.name, self.dtype, self.states = graph, name, dtype, states
        self.module = graph.model.get_submodule(graph.modules[name])
        self.parts = graph.block_parts(name)
        self._places: dict[str, list[_Place]] = {}
        self._storages: dict[int, tuple[int, tuple[Piece, ...]]] = {}
        graph.check_filled(name)

    def __enter__(self) -> LiveBlock:
        for target, part in self.parts.items():
            tensor = self.graph.filled(target, self.states)
            self.graph.put(target, tensor)
            self._note(tensor, part)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._places.clear()
        self._storages.clear()
        for target in self.parts:
            self.graph.put(target, None)

    def _note(self, tensor: Tensor, part: Part) -> None:
        if part.pieces is None:
            return
        rows = as_rows(tensor, part)
        self._storages[tensor.untyped_storage().data_ptr()] = (rows.shape[1], part.pieces)
        for piece in part.pieces:
            self._places.setdefault(piece.name, []).append(_Place(rows, piece))

    def names_of(self, weight: Tensor) -> tuple[str, ...]:
        """The checkpoint's tensors that a weight, or a slice of one, is made of; none when it is not the block's."""
        columns, pieces = self._storages.get(weight.untyped_storage().data_ptr(), (0, ()))
        if weight.ndim != 2 or weight.shape[1] != columns or not weight.is_contiguous():
            return ()
        low = weight.storage_offset() // columns
        high = low + weight.shape[0]
        return tuple(dict.fromkeys(p.name for p in pieces if p.at < high and p.at + p.rows > low))

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint's tensors that the block computes with, row by row."""
        return tuple(self._places)

    def is_live(self, name: str) -> bool:
        """Is a tensor of the checkpoint one that the block computes with, row by row?"""
        return name in self._places

    def slot_of(self, name: str) -> tuple[int, int] | None:
        """Which matrix of which parameter of several (experts) a tensor lies in, or None."""
        for target, part in self.parts.items():
            tensor = self.graph.tensor(target)
            for piece in part.pieces or ():
                if piece.name == name and tensor.ndim == 3:
                    return id(tensor), piece.at // tensor.shape[1]
        return None

    def get(self, name: str) -> NDArray[Any]:
        """A tensor of the checkpoint as the block has it, in its stored shape and dtype: a copy."""
        info = self.graph.checkpoint.infos[name]
        places = self._places[name]
        found = torch.empty(
            (sum(place.piece.rows for place in places), places[0].rows.shape[1]), dtype=places[0].rows.dtype
        )
        for place in places:
            piece = place.piece
            found[piece.first : piece.first + piece.rows] = place.rows[piece.at : piece.at + piece.rows].cpu()
        return to_numpy(found).astype(info.dtype, copy=False).reshape(info.shape)

    def set(self, name: str, values: NDArray[Any]) -> None:
        """Let the block compute with other values of a tensor, in its stored shape."""
        for place in self._places[name]:
            piece, rows = place.piece, place.rows
            matrix = values.reshape(-1, rows.shape[1])
            rows[piece.at : piece.at + piece.rows] = to_torch(matrix[piece.first : piece.first + piece.rows])

    def run(self, call: Call, hidden: Tensor, seen: Any = None) -> Tensor:
        """Hidden states (batch, length, width) that come out for those that come in, which are of the type ``states``.

        seen: is told of each product, as `products.Products` says.
        """
        with torch.no_grad(), Products(self, self.dtype, seen):
            return call(self.module, hidden)


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """A tensor on the CPU as an array on the same memory."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    found: NDArray[Any] = np.asarray(tensor.numpy())
    return found
