"""Tensors as they lie in a file, whatever its format says of them: name, dtype, shape and first byte."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import BadCheckpoint


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``start`` is its first byte in the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self.size * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """What it takes in its file."""
        return self.nbytes

    @property
    def decoding_bytes(self) -> int:
        """What is held besides the rows that are asked for, while it is read."""
        return 0

    @property
    def step_dtype(self) -> np.dtype[Any]:
        """What steps are stored in when the tensor is quantized: its own dtype, which is what readers hold it in."""
        return self.dtype


@dataclass(frozen=True)
class DecodedInfo(TensorInfo):
    """A weight that is stored quantized, to those who read numbers: float32.

    stored: its bytes in the file.  step: the dtype of its steps there.  decoding: see `decoding_bytes`.
    """

    stored: int
    step: np.dtype[Any]
    decoding: int

    @property
    def stored_bytes(self) -> int:
        return self.stored

    @property
    def decoding_bytes(self) -> int:
        return self.decoding

    @property
    def step_dtype(self) -> np.dtype[Any]:
        return self.step


class TensorFile(ABC):
    """A file of tensors open for reading.

    Tensors are read with `pread` into memory of their own, not mapped, so that resident memory is what is in use.
    infos: name → TensorInfo in the order of the file.  Raises BadCheckpoint, naming the file, when it cannot be read.
    """

    infos: dict[str, TensorInfo]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise BadCheckpoint(f"{self.path}: {error.strerror}") from None
        try:
            self.infos = self._read_infos(os.fstat(self._descriptor).st_size)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _read_infos(self, size: int) -> dict[str, TensorInfo]:
        """What the file says is in it, checked against its ``size`` in bytes."""

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """A tensor, or some of its rows (first axis, step 1), in memory of its own."""
        info = self.infos[name]
        shape, start = info.shape, info.start
        if rows is not None:
            low, high, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError("rows are read with step 1")
            shape = (max(high - low, 0), *shape[1:])
            start += low * math.prod(shape[1:]) * info.dtype.itemsize
        raw = np.empty(math.prod(shape) * info.dtype.itemsize, np.uint8)
        self._read_into(raw, start, name)
        return raw.view(info.dtype).reshape(shape)

    def _read_into(self, raw: NDArray[np.uint8], start: int, what: str) -> None:
        view, done = raw.data, 0
        while done < len(raw):
            got = os.preadv(self._descriptor, [view[done:]], start + done)
            if not got:
                raise BadCheckpoint(f"{self.path}: ends inside {what}: the file was cut while it was being read")
            done += got
