"""Logits of whole texts by transformers' graph, for `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...checkpoint import Checkpoint
from ..layers import Array
from ..outline import Outline
from .graph import Graph


class GraphTexts:
    """A model that is in memory as a whole; see `Stream` for those that are there block by block."""

    def __init__(self, checkpoint: Checkpoint, outline: Outline) -> None:
        self.checkpoint = checkpoint
        self._graph = Graph(checkpoint, outline)
        self.config = self._graph.config

    def reader(self, texts: Sequence[NDArray[np.int64]]) -> Callable[[NDArray[np.int64]], Array]:
        """logits(rows) → (n, vocabulary) of tokens, numbered through all texts; ask in ascending order.

        A text is computed up to the last token that was asked for, and on from there the next time.
        """
        starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
        current, computed = -1, 0

        def logits(rows: NDArray[np.int64]) -> Array:
            nonlocal current, computed
            found = []
            numbers = np.searchsorted(starts, rows, side="right") - 1
            for number in np.unique(numbers):
                places = rows[numbers == number] - starts[number]
                current, computed = number, computed if number == current else 0
                end = int(places[-1]) + 1
                made = self._graph.logits(0, texts[number][computed:end], computed, end - int(places[0]))
                found.append(made[places - places[0]])
                computed = end
            return np.concatenate(found)

        return logits
