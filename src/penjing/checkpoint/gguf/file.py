"""GGUF files: a strict reader that holds one tensor at a time, and a writer that streams.

A file is a header (magic, version, counts), pairs of key and value, the tensors' names, shapes, formats and places,
and from the next multiple of the alignment on their bytes. Shapes are written innermost first; here they are as numpy
has them. Description: docs/gguf.md of ggml.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...errors import BadCheckpoint, Unsupported
from ...formats import ggml
from ...formats.ggml import Kind
from ..atomic import replacing

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")))
_MOST_DIMENSIONS = 4
MAX_HEADER_BYTES = 1 << 28  # the largest vocabularies take a tenth
# Formats that exist and are not read, by number: errors name them.
_OTHERS = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"},
    **{22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M"},
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"},
}


@dataclass(frozen=True)
class GgufTensor:
    """shape: as numpy has it, (out, in).  start: first byte in the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return self.kind.row_bytes(self.shape[-1])

    @property
    def rows(self) -> int:
        """All axes but the last, as one."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class GgufFile:
    """A file open for reading; all of its header has been checked against its length.

    metadata: key → number, string, flag, or list of these.  tensors: name → GgufTensor.
    Raises BadCheckpoint, naming the file and the key or the tensor, for a file that is damaged or cut off, Unsupported
    for a version or a number format that is not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115  (closed by `close`)
        except OSError as error:
            raise BadCheckpoint(f"{self.path}: {error.strerror}") from None
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            header = _Header(self.path, self._file, self._size)
            self.metadata: dict[str, Any] = header.metadata
            self.tensors: dict[str, GgufTensor] = header.tensors
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, name: str, first: int = 0, count: int | None = None) -> NDArray[np.uint8]:
        """Rows of a tensor as they are stored, uint8 (rows, bytes of a row), in memory of their own."""
        tensor = self.tensors[name]
        count = tensor.rows - first if count is None else count
        raw = np.empty((count, tensor.row_bytes), np.uint8)
        view, done, start = raw.reshape(-1).data, 0, tensor.start
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done:]], start + first * tensor.row_bytes + done)
            if not got:
                raise BadCheckpoint(f"{self.path}: ends inside {name}: the file was cut while it was being read")
            done += got
        return raw


class _Header:
    """Everything before the tensors' bytes, read front to back."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._what = "the header"
        if self._take(4) != MAGIC:
            raise BadCheckpoint(f"{path}: does not begin with 'GGUF': not a GGUF file")
        (version,) = self._numbers("I", 1)
        if version not in (2, 3):
            raise Unsupported(f"{path}: version {version} of GGUF (or the other byte order); versions 2 and 3 are read")
        tensors, keys = self._numbers("Q", 2)
        if 13 * keys + 24 * tensors > size:
            raise BadCheckpoint(f"{path}: {keys} keys and {tensors} tensors cannot be in {size} bytes: damaged")
        self.metadata = self._pairs(keys)
        entries = [self._tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise BadCheckpoint(f"{path}: general.alignment = {alignment!r}, expected a multiple of 8")
        data = -(-file.tell() // alignment) * alignment
        self.tensors = self._placed(entries, data, alignment)

    def _take(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise BadCheckpoint(f"{self._path}: truncated: {self._what} goes beyond the end of the file")
        if count > MAX_HEADER_BYTES - self._file.tell():
            raise BadCheckpoint(f"{self._path}: {self._what} goes beyond {MAX_HEADER_BYTES} bytes of header: damaged")
        return self._file.read(count)

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        raw = self._take(count * struct.calcsize(f"<{code}"))
        return struct.unpack(f"<{count}{code}", raw)

    def _text(self) -> str:
        raw = self._take(self._numbers("Q", 1)[0])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise BadCheckpoint(f"{self._path}: {self._what} holds a text that is not UTF-8") from None

    def _pairs(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(count):
            self._what = f"key {index + 1} of {count}"
            key = self._text()
            self._what = f"key {key}"
            if key in found:
                raise BadCheckpoint(f"{self._path}: key {key} is there twice")
            found[key] = self._value(self._numbers("I", 1)[0])
        return found

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._numbers(self._code(kind), 1)[0]
        inner, count = self._numbers("I", 1)[0], self._numbers("Q", 1)[0]
        if inner == _STRING:
            if 8 * count > self._size:
                raise BadCheckpoint(f"{self._path}: truncated: {self._what} goes beyond the end of the file")
            return [self._text() for _ in range(count)]
        return list(self._numbers(self._code(inner), count))

    def _code(self, kind: int) -> str:
        code = _SCALARS.get(kind)
        if not code:
            raise BadCheckpoint(f"{self._path}: {self._what} has type {kind}, which GGUF does not have")
        return code

    def _tensor(self) -> tuple[str, Kind, tuple[int, ...], int]:
        self._what = "a tensor's name"
        name = self._text()
        self._what = f"tensor {name}"
        (dimensions,) = self._numbers("I", 1)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise BadCheckpoint(f"{self._path}: tensor {name} has {dimensions} axes, expected 1 to {_MOST_DIMENSIONS}")
        shape = self._numbers("Q", dimensions)[::-1]
        number, offset = self._numbers("I", 1)[0], self._numbers("Q", 1)[0]
        kind = ggml.BY_NUMBER.get(number)
        if kind is None:
            called = _OTHERS.get(number, f"number {number}")
            known = ", ".join(name.upper() for name in ggml.KINDS)
            raise Unsupported(f"{self._path}: tensor {name} is in format {called}; read are {known}")
        if 0 in shape:
            raise BadCheckpoint(f"{self._path}: tensor {name} has shape {shape}, expected no axis of 0")
        if shape[-1] % kind.size:
            raise BadCheckpoint(
                f"{self._path}: tensor {name} has rows of {shape[-1]}, {kind.name.upper()} has blocks of {kind.size}"
            )
        return name, kind, shape, offset

    def _placed(self, entries: Sequence[tuple[str, Kind, tuple[int, ...], int]], data: int, step: int) -> Any:
        found: dict[str, GgufTensor] = {}
        end = data
        for name, kind, shape, offset in sorted(entries, key=lambda entry: entry[3]):
            tensor = GgufTensor(name, kind, shape, data + offset)
            if name in found:
                raise BadCheckpoint(f"{self._path}: tensor {name} is there twice")
            if offset % step or tensor.start < end:
                raise BadCheckpoint(
                    f"{self._path}: tensor {name} at byte {offset} overlaps or is not aligned to {step}"
                )
            end = tensor.start + tensor.nbytes
            if end > self._size:
                raise BadCheckpoint(
                    f"{self._path}: truncated: tensor {name} ends at byte {end}, the file has {self._size}"
                )
            found[name] = tensor
        return found


@dataclass(frozen=True)
class Written:
    """A tensor to write: ``parts`` are its bytes in order, made as they are asked for."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    parts: Iterable[NDArray[np.uint8]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Written]) -> tuple[str, int]:
    """Write a file whole or not at all → its SHA-256 (hexadecimal) and its length in bytes.

    metadata: texts, flags, numbers (an int is uint32, a float float32, numpy scalars and arrays are what they are) and
    lists of texts.  Raises OutOfBudget on a full disk, ValueError when parts do not add up to their tensor.
    """
    digest, length = hashlib.sha256(), 0
    with replacing(path) as temporary, open(temporary, "wb", buffering=0) as file:
        for piece in _pieces(metadata, tensors):
            view = memoryview(piece).cast("B")
            digest.update(view)
            length += len(view)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return digest.hexdigest(), length


def _pieces(metadata: Mapping[str, Any], tensors: Sequence[Written]) -> Iterable[Any]:
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _typed(value)
    place = 0
    for tensor in tensors:
        header += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape[::-1], tensor.kind.number, place)
        place += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    yield bytes(header) + bytes(-len(header) % ALIGNMENT)
    for tensor in tensors:
        written = 0
        for part in tensor.parts:
            written += part.nbytes
            yield np.ascontiguousarray(part).reshape(-1)
        if written != tensor.nbytes:
            raise ValueError(f"tensor {tensor.name}: {written} bytes came, its shape needs {tensor.nbytes}")
        yield bytes(-written % ALIGNMENT)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


_NUMBERS = {np.dtype(f"<{code}"): number for number, code in _SCALARS.items() if code}


def _typed(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, int) and not isinstance(value, bool):
        value = np.uint32(value)
    elif isinstance(value, float):
        value = np.float32(value)
    array = np.asarray(value)
    head = (_ARRAY, _NUMBERS[array.dtype], len(array)) if array.ndim else (_NUMBERS[array.dtype],)
    return struct.pack("<IIQ" if array.ndim else "<I", *head) + array.tobytes()
