"""safetensors files: a strict reader that holds one tensor at a time, and a writer that streams.

A file is a length (8 bytes), a JSON header (name → dtype, shape, place) and the tensors' bytes, one after another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import BadCheckpoint
from .atomic import replacing
from .tensors import TensorFile, TensorInfo

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
_CHUNK = 16 << 20


class SafetensorsFile(TensorFile):
    """A safetensors file open for reading; its header has been checked against its length.

    metadata: the header's own strings.  Raises BadCheckpoint, naming the file and the tensor, for a header that is
    damaged, contradicts itself or does not fit the file.
    """

    metadata: dict[str, str]

    def _read_infos(self, size: int) -> dict[str, TensorInfo]:
        if size < 8:
            raise BadCheckpoint(f"{self.path}: {size} bytes; a safetensors file begins with 8 bytes of header length")
        length = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))[0]
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise BadCheckpoint(
                f"{self.path}: the header should be {length} bytes long, the file has {size - 8} after the length:"
                " truncated, or not safetensors"
            )
        raw = np.empty(length, np.uint8)
        self._read_into(raw, 8, "the header")
        try:
            header = json.loads(raw.tobytes(), object_pairs_hook=self._no_duplicates)
        except ValueError as error:
            raise BadCheckpoint(f"{self.path}: the header is not JSON: {error}") from None
        except RecursionError:
            raise BadCheckpoint(f"{self.path}: the header is nested too deeply") from None
        if not isinstance(header, dict):
            raise BadCheckpoint(f"{self.path}: the header is not an object of tensors")
        metadata = header.pop("__metadata__", {})
        self.metadata = metadata if isinstance(metadata, dict) else {}
        infos = sorted((self._info(name, entry, 8 + length) for name, entry in header.items()), key=lambda i: i.start)
        self._check_places(infos, 8 + length, size)
        return {info.name: info for info in infos}

    def _no_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise BadCheckpoint(f"{self.path}: {twice!r} is in the header twice")
        return found

    def _info(self, name: str, entry: Any, data: int) -> TensorInfo:
        where = f"{self.path}: tensor {name}"
        if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
            raise BadCheckpoint(f"{where}: needs dtype, shape and data_offsets, has {entry!r:.80}")
        dtype, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise BadCheckpoint(f"{where}: dtype {dtype!r} cannot be read; known: {', '.join(DTYPES)}")
        if not _counts(shape) or not _counts(places) or len(places) != 2 or places[0] > places[1]:
            raise BadCheckpoint(f"{where}: shape {shape!r:.60} at {places!r:.60} makes no sense")
        info = TensorInfo(name, DTYPES[dtype], tuple(shape), data + places[0])
        if info.nbytes != places[1] - places[0]:
            raise BadCheckpoint(
                f"{where}: shape {tuple(shape)} of {dtype} takes {info.nbytes} bytes, its place has"
                f" {places[1] - places[0]}"
            )
        return info

    def _check_places(self, infos: list[TensorInfo], end: int, size: int) -> None:
        """Tensors follow one another without holes or overlaps, and the last ends where the file does."""
        for info in infos:
            if info.start != end:
                what = "overlaps the one before it" if info.start < end else "leaves a hole before it"
                raise BadCheckpoint(f"{self.path}: tensor {info.name} {what} (byte {info.start}, expected {end})")
            end = info.start + info.nbytes
            if end > size:
                raise BadCheckpoint(
                    f"{self.path}: truncated: tensor {info.name} ends at byte {end}, the file has {size}"
                )
        if end != size:
            raise BadCheckpoint(f"{self.path}: {size - end} bytes after the last tensor; the header does not name them")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


@dataclass(frozen=True)
class Chunks:
    """A tensor that is written in parts, so that it need not be in memory whole; ``parts`` are in order."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    parts: Iterable[NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Tensor = NDArray[Any] | Chunks


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and the header of a file with these tensors in this order, padded so that data begin 8-aligned."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        dtype = DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            raise TypeError(f"tensor {name}: safetensors has no {tensor.dtype}")
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Write a file whole or not at all → its SHA-256 (hexadecimal) and its length in bytes.

    Wide dtypes come first, so that every tensor is aligned to its items, then the order of names.
    Raises OutOfBudget on a full disk, ValueError when parts do not add up to their tensor.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    digest, length = hashlib.sha256(), 0
    with replacing(Path(path)) as temporary, open(temporary, "wb", buffering=0) as file:
        for piece in _pieces(tensors, metadata):
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]
            digest.update(piece)
            length += memoryview(piece).nbytes
        os.fsync(file.fileno())
    return digest.hexdigest(), length


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> Iterator[Any]:
    yield header_bytes(tensors, metadata)
    for name, tensor in tensors.items():
        written = 0
        for part in tensor.parts if isinstance(tensor, Chunks) else (tensor,):
            raw = np.ascontiguousarray(part, tensor.dtype).reshape(-1).view(np.uint8)
            written += len(raw)
            for low in range(0, len(raw), _CHUNK):
                yield raw[low : low + _CHUNK].data
        if written != tensor.nbytes:
            raise ValueError(f"tensor {name}: {written} bytes came, its shape needs {tensor.nbytes}")


def read_safetensors(path: str | Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """All tensors of a file and its metadata, in memory."""
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file.infos}, file.metadata


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
