"""What a compressed model learned as a whole, put into files that are there already.

New files are made beside the old ones, in the journal's folder, and noted together; then each takes the place of an old
one by a rename. So a run that is killed finds all files as they were, or goes on putting the new ones in their places.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, storage
from .checkpoint.atomic import plain_errors, read_json, sync_folder, write_json
from .checkpoint.journal import Journal
from .checkpoint.plan import Plan, Shard
from .checkpoint.safetensors import Tensor, read_safetensors, write_safetensors
from .errors import BadInput
from .formats.affine import AffineTensor

if TYPE_CHECKING:
    from .calibrate import Calibrator
    from .calibrate.recover import Solution

Entries = dict[str, dict[str, Any]]
_NOTE, _FOLDER = "distilled.json", "distilled"


def finished(journal: Journal) -> Entries | None:
    """What the journal says of each file, with those that are new in their places; None before they are made."""
    note = journal.folder / _NOTE
    if not note.exists():
        return None
    entries: Entries = read_json(note, BadInput)
    with plain_errors(journal.output):
        for name in entries:
            if (made := journal.folder / _FOLDER / name).exists():
                os.replace(made, journal.output / name)
        sync_folder(journal.output)
    return entries


def distil(
    plan: Plan, journal: Journal, calibrator: Calibrator, saved: Checkpoint, entries: Entries, tick: Callable[[], None]
) -> Entries:
    """Train a saved model as a whole, and put what it learned into its files → what the journal says of them then."""
    from .calibrate.distil import distil as train

    original, asked = calibrator.original, plan.recipe.recover
    assert original is not None
    assert asked is not None
    found, errors = train(calibrator, original, saved, asked, tick)
    folder = journal.folder / _FOLDER
    with plain_errors(folder):
        folder.mkdir(exist_ok=True)
    made = {shard.name: _made(plan, shard, journal.output, folder, found, entries[shard.name]) for shard in plan.shards}
    for entry in made.values():
        entry["distilled"] = errors
    write_json(journal.folder / _NOTE, made)
    return finished(journal) or made


def _made(
    plan: Plan, shard: Shard, output: Path, folder: Path, found: Mapping[str, Solution], entry: dict[str, Any]
) -> dict[str, Any]:
    """Write a file with what was found in it in place of what was there → its entry."""
    tensors: dict[str, Tensor] = dict(read_safetensors(output / shard.name)[0])
    verdicts = dict(entry.get("verdicts", {}))
    for name in (name for block in shard.blocks for name in block.tensors if name in found):
        solved, module = found[name], name.removesuffix(".weight")
        if isinstance(solved, AffineTensor):
            stored = storage.encode(solved, plan.rules[module].quantize, sparse=plan.is_sparse(module))
            tensors |= {f"{module}.{part}": array for part, array in stored.items()}
            verdicts[module] = verdicts.get(module, {}) | {"checksum": storage.checksum(solved)}
        else:
            tensors[name] = solved
    digest, length = write_safetensors(folder / shard.name, tensors, {"format": "pt"})
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    return entry | {"sha256": digest, "bytes": length, "tensors": sizes, "verdicts": verdicts}
