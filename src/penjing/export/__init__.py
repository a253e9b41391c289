"""`penjing export`: the same model in a format that other programs read, a shard or a matrix in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint, qweight
from ..checkpoint.describe import sparsity_of
from ..checkpoint.gguf import GgufCheckpoint
from ..errors import BadInput, Unsupported, nearest
from ..models import read_config
from . import compressed_tensors, gguf

FORMATS = ("compressed-tensors", "gguf")


@dataclass(frozen=True)
class ExportResult:
    """digest: SHA-256 of a GGUF file; of a folder what ``sha256sum *.safetensors | sha256sum`` says in it.

    notes: what the result does not hold as the model had it.
    """

    output: str
    size_bytes: int
    digest: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.size_bytes:,} bytes, digest {self.digest}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def export(
    model: str | Path, output: str | Path, format: str = "compressed-tensors", type: str = "auto"
) -> ExportResult:
    """Write a model in another format.

    type: of a GGUF file's matrices: q4_0, q8_0, q4_k, f16 and so on, or auto, what the weights are stored in.
    Raises Unsupported for a format, a type or a model that cannot be written, BadInput for an output that is there.
    """
    if format not in FORMATS:
        raise Unsupported(f"format {format!r} cannot be written; {nearest(format, FORMATS)}")
    checkpoint, path = open_checkpoint(model), Path(output)
    if format == "gguf":
        if path.exists():
            raise BadInput(f"{path}: is there; give the name of a new file")
        digest, size, notes = gguf.write(checkpoint, read_config(checkpoint), path, type)
        return ExportResult(str(path), size, digest, (*notes, *_sparse(checkpoint, "llama.cpp")))
    if isinstance(checkpoint, GgufCheckpoint):
        raise Unsupported(f"{checkpoint.path}: it has no compressed-tensors form; compress it instead")
    if any(scheme.format in qweight.FORMATS for scheme in checkpoint.schemes):
        raise Unsupported(f"{checkpoint.path}: vLLM and transformers read its format as it is; gguf can be written")
    if type != "auto":
        raise BadInput(f"type={type!r} is of GGUF files; leave it out for {format}")
    digest, size = compressed_tensors.write(checkpoint, path)
    return ExportResult(str(path), size, digest, _sparse(checkpoint, "transformers and vLLM"))


def _sparse(checkpoint: Checkpoint, readers: str) -> tuple[str, ...]:
    """What is said of a model with pruned weights: other readers have no kernels for them."""
    sparsity = sparsity_of(checkpoint)
    if not sparsity:
        return ()
    return (
        f"{sparsity:.0%} of the compressed weights are zeros, written as zeros: {readers} give them the room and the"
        " time of any other; only Penjing's engine gains by them",
    )
