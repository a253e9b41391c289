"""The journal of a run: what it is, what it has finished. It makes a killed run go on where it was.

``OUT/.journal/run.json`` says which model and which recipe the folder is for, and which files the run writes;
``OUT/.journal/<shard>.json`` says that a shard is finished, with its digest. Both are written whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput, PenjingError
from .atomic import TEMPORARY, plain_errors, read_json, sync_folder, write_json
from .folder import CONFIG, Checkpoint

FOLDER = ".journal"
ARTIFACT = "penjing.json"
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over config.json, the headers of all weight files and 64 samples of each file's bytes.

    The whole of a large model is not read for it: two models that differ only between the samples look the same.
    """
    digest = hashlib.sha256((checkpoint.path / CONFIG).read_bytes() if checkpoint.path.is_dir() else b"")
    for path in checkpoint.weight_paths:
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, (size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)))
                digest.update(file.read(_SAMPLE_BYTES))
    for name, info in checkpoint.infos.items():
        digest.update(f"{name} {info.dtype} {info.shape} {info.start}\n".encode())
    return digest.hexdigest()


class Journal:
    """The journal of an output folder.

    identity: what must be the same for a run to go on (model, recipe, storage, version).  files: the names that the
    run writes into the folder.
    """

    def __init__(self, output: Path, identity: dict[str, Any], files: Sequence[str]) -> None:
        self.output = output
        self.folder = output / FOLDER
        self.identity = identity
        self.files = list(files)

    def finished_artifact(self) -> dict[str, Any] | None:
        """penjing.json of a folder in which this very run has been finished, or None."""
        if not (self.output / CONFIG).exists() or not (self.output / ARTIFACT).exists():
            return None
        artifact = read_json(self.output / ARTIFACT, BadInput)
        if isinstance(artifact, dict) and artifact.get("identity") == self.identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            return artifact
        return None

    def begin(self, *, restart: bool) -> bool:
        """Make the folder ours → is this the rest of an earlier run?

        Raises BadInput when the folder holds something else, or a run of another model or recipe.
        """
        began_here = restart and self._remove_own_files()
        with plain_errors(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
            run = self.folder / "run.json"
            if run.exists():
                self._check_identity(read_json(run, BadInput))
                for left in (*self.output.glob(f"*{TEMPORARY}"), *self.folder.glob(f"*{TEMPORARY}")):
                    left.unlink()
                return True
            others = sorted(path.name for path in self.output.iterdir() if path.name != FOLDER)
            if others and not began_here:
                what = "another finished model" if ARTIFACT in others else f"something else ({others[0]})"
                raise BadInput(f"{self.output}: the folder holds {what}; give one that is empty or does not exist")
            self.folder.mkdir(exist_ok=True)
            sync_folder(self.output)
        write_json(run, {"identity": self.identity, "files": self.files})
        return False

    def finished(self, shard: str) -> dict[str, Any] | None:
        """What was recorded of a shard when it was finished; None when it has to be written (again)."""
        record = self.folder / f"{shard}.json"
        if not record.exists():
            return None
        entry: dict[str, Any] = read_json(record, BadInput)
        path = self.output / shard
        return entry if path.exists() and path.stat().st_size == entry["bytes"] else None

    def finish(self, shard: str, entry: dict[str, Any]) -> None:
        write_json(self.folder / f"{shard}.json", entry)

    def close(self) -> None:
        """The artifact is complete: the journal goes."""
        shutil.rmtree(self.folder)
        sync_folder(self.output)

    def _check_identity(self, run: Any) -> None:
        before = run.get("identity") if isinstance(run, dict) else None
        if before != self.identity:
            before = before if isinstance(before, dict) else {}
            other = [key for key, value in self.identity.items() if before.get(key) != value]
            raise BadInput(
                f"{self.output}: holds an unfinished run with another {' and '.join(other)};"
                " give another folder, or --restart to throw that run away"
            )

    def _remove_own_files(self) -> bool:
        """Remove what an earlier run wrote, as it noted itself; anything else stays → was there a run?"""
        found = False
        for note in (self.folder / "run.json", self.output / ARTIFACT):
            if note.exists():
                found = True
                written = read_json(note, BadInput).get("files", [])
                for name in written:
                    if os.sep in name or name in ("", ".", ".."):
                        raise PenjingError(f"{note}: {name!r} is not the name of a file in this folder")
                    (self.output / name).unlink(missing_ok=True)
        for left in self.output.glob(f"*{TEMPORARY}"):
            left.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        return found
