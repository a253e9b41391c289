"""`penjing compress`: a checkpoint folder in, a smaller one out, block by block and never whole in memory.

`_run` is the loop. Around it stand a plan (which rule applies to which module, which tensors go into which file, what
memory and disk that takes), a journal that lets a killed run go on, and the self-check at the end.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from . import __version__, hardware, kernels, verify
from .checkpoint import Checkpoint, artifact, open_checkpoint, storage
from .checkpoint.atomic import write_json
from .checkpoint.folder import CONFIG, INDEX
from .checkpoint.journal import ARTIFACT, Journal, fingerprint
from .checkpoint.plan import CHUNK_BYTES, Plan, Shard, make_plan, scale_dtype
from .checkpoint.safetensors import Chunks, Tensor, sha256_of, write_safetensors
from .checkpoint.storage import Weight
from .errors import BadCheckpoint, BadInput, OutOfBudget, PenjingError, Unsupported
from .formats.affine import AffineTensor
from .methods import Statistics, apply
from .models.stacked import unstack
from .recipe import Recipe, Rule, build

# Bytes of the original that are done, and all of them.
Progress = Callable[[float, float], None]
SHARD_BYTES = 64 << 20
_SMALLEST_CHUNK = 1 << 20


@dataclass(frozen=True)
class CompressResult:
    """What a run made. Sizes in bytes, seconds of this run; see docs/compress.md for the fields.

    bits_per_weight: all weight files over all parameters.  target_bits_per_weight: compressed modules alone.
    sparsity: share of the compressed modules' weights that was pruned.  stacked_bytes: of tensors of several matrices
    each (the experts of some families), which are written as they are.  resumed_at_block: None for a fresh run.
    digest: what ``sha256sum *.safetensors | sha256sum`` says in the folder.  check: what the self-check found.
    evaluation: ΔL on held-out text, if it was asked for.
    """

    output: str
    size_bytes: int
    original_size_bytes: int
    bits_per_weight: float
    target_bits_per_weight: float
    sparsity: float
    stacked_bytes: int
    seconds: float
    peak_rss_bytes: int
    memory_bound_bytes: int
    blocks: int
    resumed_at_block: int | None
    already_done: bool
    digest: str
    check: dict[str, Any]
    evaluation: dict[str, Any] | None

    def __str__(self) -> str:
        smaller = self.original_size_bytes / self.size_bytes
        rows = {
            "output": self.output,
            "size": f"{self.size_bytes:,} bytes, {smaller:.2f} × smaller",
            "bits per weight": f"{self.bits_per_weight:.3f} ({self.target_bits_per_weight:.3f} in what was compressed)",
            "sparsity": f"{self.sparsity:.1%}",
            "self-check": self.check["verdict"],
            "time": f"{self.seconds:.1f} s, peak memory {self.peak_rss_bytes / 2**20:.0f} MiB",
            "digest": self.digest,
        }
        if self.stacked_bytes:
            rows["as it was"] = f"{self.stacked_bytes:,} bytes of experts that lie in tensors of all of them"
        if self.evaluation is not None:
            low, high = self.evaluation["loss_change_ci95"] or (float("nan"), float("nan"))
            rows["ΔL"] = f"{self.evaluation['loss_change']:+.4f}, 95 % [{low:+.4f}, {high:+.4f}]"

        return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def compress(
    model: str | Path,
    output: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    sparse_storage: Literal["dense", "bitmask"] = "dense",
    memory_limit: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    restart: bool = False,
    check: Literal["sample", "full", "none"] = "sample",
    evaluate: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> CompressResult:
    """Compress a checkpoint folder into another.

    recipe: a preset, a file, or a `Recipe`; ``settings`` (``bits=4, group_size=64, sparsity=0.5, …``, see
    `recipe.build`) change it or stand alone.  memory_limit: bytes; refused when the run cannot keep it.
    shard_bytes: blocks share a file until they have that many bytes of the original, and a killed run goes on at a
    file.  check: how many blocks' logits the self-check computes.  evaluate: a file of held-out text to measure ΔL on.

    The same call after a crash goes on where it was and ends with the same bytes; after success it returns what is
    there. Raises BadInput (BadCheckpoint, BadRecipe, Unsupported) for what cannot be done, OutOfBudget for memory and
    disk, PenjingError when the self-check fails or the run is interrupted; no folder is left that looks whole.
    """
    start = time.monotonic()
    if sparse_storage not in ("dense", "bitmask"):
        raise BadInput(f"sparse_storage={sparse_storage!r}: give dense or bitmask")
    if check not in ("sample", "full", "none"):
        raise BadInput(f"check={check!r}: give sample, full or none")
    made = build(recipe, **settings)
    for rule in made.rules:
        apply.check(rule)
        _check_needs(rule)
    checkpoint, folder = open_checkpoint(model), Path(output)
    unstack(checkpoint)
    if folder.resolve() == checkpoint.path.resolve():
        raise BadInput(f"{folder}: is the model itself; give another folder")
    plan = make_plan(checkpoint, made, bitmask=sparse_storage == "bitmask", shard_bytes=shard_bytes)
    plan, bound = _fit_memory(plan, memory_limit)
    journal = Journal(folder, _identity(plan), _files(plan))
    if not restart and (done := journal.finished_artifact()) is not None:
        if evaluate is not None:
            done = _evaluated(folder, done, checkpoint.path, Path(evaluate))
        return _result(folder, done, start, bound, None, already=True)
    try:
        resumed = journal.begin(restart=restart)
        first = next((shard.first_block for shard in plan.shards if journal.finished(shard.name) is None), plan.blocks)
        _check_disk(plan, journal)
        entries = _run(plan, journal, progress or (lambda done, total: None))
        made_artifact = _complete(plan, journal, entries, check)
    except KeyboardInterrupt:
        left = sum(journal.finished(shard.name) is None for shard in plan.shards)
        raise PenjingError(
            f"interrupted with {left} of {len(plan.shards)} files left; the same command goes on from there"
        ) from None
    if evaluate is not None:
        made_artifact = _evaluated(folder, made_artifact, checkpoint.path, Path(evaluate))
    return _result(folder, made_artifact, start, bound, first if resumed else None, already=False)


def _check_needs(rule: Rule) -> None:
    """Unsupported for a method that wants to see what comes into a layer."""
    if found := apply.needs(rule):
        methods = [each.method for each in (rule.transform, rule.prune, rule.quantize) if each is not None]
        raise Unsupported(
            f"{' + '.join(dict.fromkeys(methods))} needs calibration ({', '.join(found)} of each layer's input), which"
            " penjing compress cannot collect yet; rtn and hqq, l1, l2 and random need no data"
        )


def _run(plan: Plan, journal: Journal, progress: Progress) -> dict[str, dict[str, Any]]:
    """Read, solve, pack, write, journal; a file is written while the next one is computed."""
    total = sum(plan.input_bytes(shard) for shard in plan.shards)
    done, entries = 0, {}
    pending: Future[dict[str, Any]] | None = None
    with ThreadPoolExecutor(1, "penjing-write") as writer:
        for shard in plan.shards:
            entry = journal.finished(shard.name)
            if entry is None:
                tensors, zeros = _solve_shard(plan, shard)
                if pending is not None:
                    pending.result()
                pending = writer.submit(_write, journal, shard, tensors, zeros)
            elif sha256_of(journal.output / shard.name) != entry["sha256"]:
                raise PenjingError(f"{journal.output / shard.name}: damaged since it was written; run with --restart")
            done += plan.input_bytes(shard)
            progress(done, total)
        if pending is not None:
            pending.result()
    for shard in plan.shards:
        entries[shard.name] = journal.finished(shard.name) or {}
    return entries


def _solve_shard(plan: Plan, shard: Shard) -> tuple[dict[str, Tensor], dict[str, int]]:
    """All tensors of a file → what to write, and how many weights were pruned in each module."""
    tensors: dict[str, Tensor] = {name: _copy(plan, name) for name in shard.copies}
    zeros: dict[str, int] = {}
    pieces = [(module, rows) for module in shard.modules for rows in _row_ranges(plan, module)]
    solved = ((piece[0], _solve(plan, piece[0], weight)) for piece, weight in _read_ahead(plan, pieces))
    for module, parts in itertools.groupby(solved, key=lambda item: item[0]):
        whole, rule = apply.join([weight for _, weight in parts]), plan.rules[module]
        if rule.prune is not None:
            zeros[module] = storage.count_zeros(whole)
        stored = storage.encode(whole, rule.quantize, sparse=plan.is_sparse(module))
        tensors |= {f"{module}.{part}": array for part, array in stored.items()}
    return tensors, zeros


def _read_ahead(plan: Plan, pieces: Iterable[tuple[str, slice]]) -> Iterator[tuple[tuple[str, slice], NDArray[Any]]]:
    """Rows of weights, the next ones being read while the last ones are computed on."""
    with ThreadPoolExecutor(1, "penjing-read") as reader:
        waiting: tuple[tuple[str, slice], Future[NDArray[Any]]] | None = None
        for piece in pieces:
            ahead = (piece, reader.submit(read_rows, plan.checkpoint, f"{piece[0]}.weight", piece[1]))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = ahead
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def read_rows(checkpoint: Checkpoint, name: str, rows: slice | None) -> NDArray[Any]:
    """Rows of a tensor; BadCheckpoint names it when a number is not finite."""
    array = checkpoint.read(name, rows)
    if array.dtype in storage.SCALE_NAMES and kernels.has_nonfinite(array):
        raise BadCheckpoint(f"{checkpoint.file_of(name)}: tensor {name} has a NaN or an infinity")
    return array


def _copy(plan: Plan, name: str) -> Chunks:
    """A tensor that is written as it is read, in parts."""
    info = plan.checkpoint.infos[name]
    ranges = plan.row_ranges(info) if info.shape else (None,)
    return Chunks(info.dtype, info.shape, (read_rows(plan.checkpoint, name, rows) for rows in ranges))


def _solve(plan: Plan, module: str, rows: NDArray[Any]) -> NDArray[Any] | AffineTensor:
    """What the module's rule makes of its weight, or of some rows of it."""
    seed = zlib.crc32(module.encode(), plan.recipe.seed & 0xFFFFFFFF)
    steps = scale_dtype(plan.weight(module))
    return apply.solve(plan.rules[module], rows, Statistics(), scale_dtype=steps, seed=seed)


def _write(journal: Journal, shard: Shard, tensors: dict[str, Tensor], zeros: dict[str, int]) -> dict[str, Any]:
    digest, length = write_safetensors(journal.output / shard.name, tensors, {"format": "pt"})
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    entry = {"sha256": digest, "bytes": length, "tensors": sizes, "zeros": zeros}
    journal.finish(shard.name, entry)
    return entry


def _complete(plan: Plan, journal: Journal, entries: Mapping[str, dict[str, Any]], check: str) -> dict[str, Any]:
    """Index, side files, self-check, penjing.json, and config.json last → what penjing.json says."""
    output = journal.output
    if len(entries) > 1:
        artifact.write_index(output, {name: entry["tensors"] for name, entry in entries.items()})
    artifact.copy_side_files(plan.checkpoint, output)
    config = dict(plan.checkpoint.config)
    if (quantization := artifact.quantization_config(plan)) is not None:
        config["quantization_config"] = quantization
    saved = open_checkpoint(output, config)
    verdict = verify.verify(plan.checkpoint, saved, plan.rules, lambda module: _solved_again(plan, module), check)
    saved.close()
    described = artifact.describe(plan, journal.identity, journal.files, entries) | {"check": verdict}
    write_json(output / ARTIFACT, described)
    artifact.complete(output, config)
    journal.close()
    return described


def _evaluated(output: Path, made: dict[str, Any], original: Path, data: Path) -> dict[str, Any]:
    """ΔL on held-out text, noted in penjing.json."""
    from .evaluate import evaluate

    measured = evaluate(output, data, original).to_dict()
    kept = {name: value for name, value in measured.items() if name not in ("seconds", "peak_rss_bytes")}
    made = made | {"evaluation": {"data": data.name, "data_sha256": sha256_of(data)} | kept}
    write_json(output / ARTIFACT, made)
    return made


def _solved_again(plan: Plan, module: str) -> Iterator[tuple[slice, Weight]]:
    """What a module's rows were solved to, computed from the original once more."""
    for rows in _row_ranges(plan, module):
        yield rows, _solve(plan, module, read_rows(plan.checkpoint, f"{module}.weight", rows))


def _row_ranges(plan: Plan, module: str) -> Iterator[slice]:
    return plan.row_ranges(plan.weight(module), apply.by_rows(plan.rules[module]))


def _identity(plan: Plan) -> dict[str, Any]:
    return {
        "model": fingerprint(plan.checkpoint),
        "recipe": plan.recipe.to_json(),
        "storage": "bitmask" if plan.bitmask else "dense",
        "files": [shard.name for shard in plan.shards],
        "version": __version__,
    }


def _files(plan: Plan) -> list[str]:
    """Every name that a run writes into the folder."""
    shards = [shard.name for shard in plan.shards]
    index = [INDEX] if len(shards) > 1 else []
    return [*shards, *index, *(file.name for file in plan.checkpoint.side_files()), ARTIFACT, CONFIG]


def _fit_memory(plan: Plan, limit: int | None) -> tuple[Plan, int]:
    """A plan that keeps the limit (reading less at a time where that helps), and what it needs at most."""
    apart = {module: apply.by_rows(rule) for module, rule in plan.rules.items()}
    here = hardware.peak_memory_bytes()
    bounds = []
    chunk = CHUNK_BYTES
    while chunk >= _SMALLEST_CHUNK:
        smaller = dataclasses.replace(plan, chunk_bytes=chunk)
        bounds.append(here + smaller.memory_bytes(apart))
        if limit is None or bounds[-1] <= limit:
            return smaller, bounds[-1]
        chunk //= 2
    raise OutOfBudget(
        f"memory_limit={limit} bytes: this model and recipe need {min(bounds)} bytes at least;"
        " smaller files (--shard-size) or a higher limit would do"
    )


def _check_disk(plan: Plan, journal: Journal) -> None:
    left = sum(plan.output_bytes(shard) for shard in plan.shards if journal.finished(shard.name) is None)
    free = shutil.disk_usage(journal.output).free
    if left > free:
        raise OutOfBudget(f"{journal.output}: {left} bytes are needed on the disk, {free} are free")


def _result(
    output: Path, made: Mapping[str, Any], start: float, bound: int, resumed_at: int | None, *, already: bool
) -> CompressResult:
    same = (
        "size_bytes",
        "original_size_bytes",
        "bits_per_weight",
        "target_bits_per_weight",
        "sparsity",
        "stacked_bytes",
    )
    return CompressResult(
        output=str(output),
        seconds=time.monotonic() - start,
        peak_rss_bytes=hardware.peak_memory_bytes(),
        memory_bound_bytes=bound,
        resumed_at_block=resumed_at,
        already_done=already,
        **{name: made[name] for name in (*same, "digest", "blocks", "check", "evaluation")},
    )
