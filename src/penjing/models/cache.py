"""Weights in the layout of their kernels, kept in a file so that the next start need not pack them.

The file belongs to one checkpoint: it is used only while the checkpoint's files are what they were, and only if every
checksum is right; otherwise the weights are packed anew and the file is replaced. It holds numbers, and is never
executed. Sections of `kernels.stored` come first, then an index (JSON), then where that is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from .. import __version__
from ..checkpoint import Checkpoint
from ..checkpoint.atomic import TEMPORARY
from ..checkpoint.journal import fingerprint
from ..kernels import Matrix, checksum, stored

log = logging.getLogger("penjing.models")

SUFFIX = ".weights"
SMALLEST = 64 << 20  # bytes of a checkpoint; smaller ones are packed in the time that it takes to look
MAGIC, FORMAT = b"PENJINGW", 1
MAX_INDEX_BYTES = 1 << 28
_END = struct.Struct("<8sIIQQQ")  # magic, format, nothing, where the index is, its bytes, its checksum


class Index(msgspec.Struct, forbid_unknown_fields=True):
    """identity: what all of this was made from and by.  sections: name, offset, bytes, checksum, in their order."""

    identity: dict[str, str]
    sections: list[tuple[str, int, int, int]]


class DamagedCache(Exception):
    """What is wrong with a cache file."""


def cache_folder() -> Path:
    """``$PENJING_CACHE``, or ``penjing`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Raises RuntimeError without a home."""
    if chosen := os.environ.get("PENJING_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penjing"


def cached_files() -> tuple[Path | None, list[int]]:
    """Where packed weights are kept (None: nowhere), and how large each model's file is."""
    try:
        folder = cache_folder()
        return folder, [file.stat().st_size for file in folder.glob(f"*{SUFFIX}")]
    except (RuntimeError, OSError):
        return None, []


class WeightCache:
    """Matrices by name: those of the file, if it is right, or new ones that go into it.

    A context manager: what was built is kept when the block ends well. No trouble with the file is an error; one line
    of the log says why there is none.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self.path, self._identity = path, identity
        self._found: dict[str, Matrix] = {}
        self._sections: list[tuple[str, int, int, int]] = []
        self._file = -1  # that is being written
        self._temporary: Path | None = None
        self._complete = True
        self.hit = self._read()

    def matrix(self, name: str, shape: tuple[int, int], build: Callable[[], Matrix]) -> Matrix:
        """The matrix of that name, (out, in) as in ``shape``; ``build`` makes it when it is not in the file."""
        found = self._found.pop(name, None)
        if found is not None and (found.rows, found.columns) == shape:
            return found
        matrix = build()
        if self.hit:
            self._complete = False
        elif self._file >= 0:
            try:
                size, checked = stored.store(matrix, self._file)
                start = self._sections[-1][1] + self._sections[-1][2] if self._sections else 0
                self._sections.append((name, start, size, checked))
            except OSError as error:
                self._give_up(error)
        return matrix

    def __enter__(self) -> WeightCache:
        if not self.hit:
            self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._file >= 0:
            try:
                self._finish()
            except OSError as error:
                self._give_up(error)
        if kind is None and self.hit and not (self._complete and not self._found):
            log.warning("%s: not the matrices of this model; it is removed", self.path)
            self.path.unlink(missing_ok=True)
        self._drop()

    def _read(self) -> bool:
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            index = read_index(file)
            if index.identity != self._identity:
                log.info(
                    "%s: of another state of the model, or of another version; the weights are packed anew", self.path
                )
                return False
            matrices = stored.restore(file, [section[1:] for section in index.sections])
            for (name, *_), matrix in zip(index.sections, matrices, strict=True):
                if matrix is None or name in self._found:
                    raise DamagedCache(f"{name} is not what was written")
                self._found[name] = matrix
        except (DamagedCache, OSError, ValueError) as error:
            log.warning("%s: damaged (%s); the weights are packed anew", self.path, error)
            self._found.clear()
            return False
        finally:
            os.close(file)
        return True

    def _begin(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
            free, wanted = shutil.disk_usage(self.path.parent).free, int(self._identity["bytes"])
            if free < 2 * wanted:
                log.warning("%s: %d bytes free, too few to keep packed weights of about %d", self.path, free, wanted)
                return
            self._file, name = tempfile.mkstemp(TEMPORARY, f"{self.path.name}.", self.path.parent)
            self._temporary = Path(name)
            fcntl.flock(self._file, fcntl.LOCK_EX)  # until it is closed: tells a writer from what one left behind
        except OSError as error:
            self._give_up(error)

    def _sweep(self) -> None:
        """Remove the files of models that are gone, and what writers of this file that were killed have left."""
        for other in self.path.parent.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError, DamagedCache), open(other, "rb") as file:
                if not Path(read_index(file.fileno()).identity.get("place", "")).exists():
                    other.unlink()
        for left in self.path.parent.glob(f"{self.path.name}.*{TEMPORARY}"):
            with contextlib.suppress(OSError), open(left, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()

    def _finish(self) -> None:
        """Nothing is forced to disk: after a crash of the machine the checksums tell."""
        body = msgspec.json.encode(Index(self._identity, self._sections))
        start = self._sections[-1][1] + self._sections[-1][2] if self._sections else 0
        end = _END.pack(MAGIC, FORMAT, 0, start, len(body), checksum(body))
        with open(self._file, "wb", closefd=False) as file:
            file.write(body + end)
        if self._temporary is not None:
            os.replace(self._temporary, self.path)

    def _give_up(self, error: OSError) -> None:
        log.warning("%s: %s; the weights stay in memory only", self.path, error.strerror or error)
        self._drop()

    def _drop(self) -> None:
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        if self._file >= 0:
            os.close(self._file)
        self._file, self._temporary = -1, None


def read_index(file: int) -> Index:
    """What an open cache file says that it holds, within its own length. Raises DamagedCache."""
    size = os.fstat(file).st_size
    if size < _END.size:
        raise DamagedCache("it is too short")
    magic, format, _, start, length, checked = _END.unpack(os.pread(file, _END.size, size - _END.size))
    if magic != MAGIC or format != FORMAT:
        raise DamagedCache("it does not end as a cache does")
    if start + length + _END.size != size or length > MAX_INDEX_BYTES:
        raise DamagedCache("its index is not where it should be")
    body = os.pread(file, length, start)
    if len(body) != length or checksum(body) != checked:
        raise DamagedCache("its index is not what was written")
    try:
        index = msgspec.json.decode(body, type=Index)
    except msgspec.DecodeError as error:
        raise DamagedCache(str(error)) from None
    at = 0
    for name, offset, count, checked in index.sections:
        if offset != at or count < 0 or count % 64 or not 0 <= checked < 2**64:
            raise DamagedCache(f"{name} is not where it should be")
        at += count
    if at != start:
        raise DamagedCache("its matrices do not end where its index begins")
    return index


def weight_cache(checkpoint: Checkpoint, activations: str, screen: bool = False) -> WeightCache | None:
    """The cache of a checkpoint; None for small ones, and where there is no place."""
    files = [path.stat() for path in checkpoint.weight_paths]
    total = sum(file.st_size for file in files)
    if total < SMALLEST:
        return None
    try:
        folder = cache_folder()
    except RuntimeError as error:
        log.warning("no place for packed weights (%s); set PENJING_CACHE", error)
        return None
    place = checkpoint.path.resolve()
    identity = {
        "place": str(place),
        "model": fingerprint(checkpoint),
        "modified": " ".join(str(file.st_mtime_ns) for file in files),
        "bytes": str(total),
        "activations": activations,
        "penjing": __version__,
        "layout": str(stored.LAYOUT),
        "screen": str(screen),
    }
    key = hashlib.sha256(f"{place}\n{activations}".encode()).hexdigest()[:16]
    return WeightCache(folder / f"{place.name}-{key}{SUFFIX}", identity)
