"""Files that are either whole or not there: written beside their place, forced to disk, renamed into it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BadInput, OutOfBudget, PenjingError

# What an unfinished file's name ends with; the process id keeps two writers apart.
TEMPORARY = ".partial"


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (new names, renames) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to ``path`` when the block ends, removed when it fails.

    The block itself forces its data to disk. Raises OutOfBudget on a full disk and PenjingError when the system
    refuses, each with the path.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with plain_errors(path):
            yield temporary
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Say in one line what the system refused."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise OutOfBudget(f"{path}: the disk is full ({free} bytes free); free some and run again") from error
        raise PenjingError(f"{path}: {error.strerror or error}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Put a file in place whole, or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a newline at its end, put in place whole."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path, error: type[BadInput]) -> Any:
    """The value in a JSON file; ``error`` names the file, the line and the column of what is wrong."""
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as why:
        raise error(f"{path}: not JSON, line {why.lineno} column {why.colno}: {why.msg}") from None
    except UnicodeDecodeError:
        raise error(f"{path}: not JSON: its bytes are not UTF-8") from None
    except RecursionError:
        raise error(f"{path}: nested too deeply") from None
    except OSError as why:
        raise error(f"{path}: {why.strerror}") from None
