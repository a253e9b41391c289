"""`penjing compress`: a checkpoint folder in, a smaller one out, block by block and never whole in memory.

`_run` is the loop. Around it stand a job (which rule applies to which module, which tensors go into which file, what
memory that takes), a journal that lets a killed run go on, and the self-check at the end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import distilled, hardware, verify
from .checkpoint import Checkpoint, artifact, kv_cache, open_checkpoint
from .checkpoint.atomic import write_json
from .checkpoint.decoded import Decoded
from .checkpoint.describe import format_of
from .checkpoint.journal import ARTIFACT, FOLDER, Journal
from .checkpoint.plan import Plan, Shard
from .checkpoint.safetensors import sha256_of, write_safetensors
from .errors import BadInput, PenjingError
from .evaluate import evaluate as measure
from .evaluate import interval, read_texts
from .footprint import check_disk
from .job import Job, Text
from .models import Outline, read_any
from .models.stacked import unstack
from .models.tokenizer import Tokenizer
from .overlap import check_held_out
from .presets import build
from .recipe import Recipe
from .shards import Contents, solve_shard, solved_again

if TYPE_CHECKING:
    from .calibrate import Calibrator

# Bytes of the original that are done, and all of them.
Progress = Callable[[float, float], None]
SHARD_BYTES = 64 << 20
BITMASK_NOTE = (
    "sparse: what is pruned is stored as a bitmask, smaller, which only Penjing reads;"
    " penjing export --format compressed-tensors makes the form that everything reads"
)
DENSE_NOTE = (
    "sparse: what is pruned is stored as zeros, which transformers and vLLM read and treat as any other weight;"
    " --sparse-storage bitmask is smaller, for Penjing alone"
)
MUCH_CLIPPED = 0.01  # share of a layer's weights; more is said at the end


@dataclass(frozen=True)
class CompressResult:
    """What a run made. Sizes in bytes, seconds of this run; see docs/compress.md for the fields.

    bits_per_weight: all weight files over all parameters.  target_bits_per_weight: compressed modules alone.
    sparsity: share of the compressed modules' weights that was pruned.  stacked_bytes: of tensors of several matrices
    each (the experts of some families), which are written as they are.  resumed_at_block: None for a fresh run.
    digest: what ``sha256sum *.safetensors | sha256sum`` says in the folder.  check: what the self-check found.
    calibration: on what, and what each layer loses (see `artifact.calibration`); None for methods without data.
    evaluation: ΔL on held-out text, if it was asked for.  shrunk: which layers stay, sizes before and after, and what
    that costs the modules that read the units; None where nothing went as a whole.  clipped: modules of whose weights a
    share lies beyond the range of its steps.  recovered: block → error of its output ``before`` and ``after`` training.
    distilled: KL to the original on calibration text, ``before`` and ``after`` all blocks were trained together.
    kv_cache: what steps of the cache lose, layer by layer (see `artifact.describe`); None where it stays as it is.
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
    calibration: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    shrunk: dict[str, Any] | None
    clipped: dict[str, float]
    recovered: dict[str, dict[str, float]]
    distilled: dict[str, float] | None
    kv_cache: dict[str, Any] | None

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
        if self.shrunk is not None:
            sizes = self.shrunk["sizes"].items()
            rows["shrunk"] = ", ".join(f"{key} {before} → {after}" for key, (before, after) in sizes)
        if self.recovered:
            before, after = (sum(its[when] for its in self.recovered.values()) for when in ("before", "after"))
            rows["recovered"] = f"blocks' outputs are off by {after / max(before, 1e-30):.2f} × what they were"
        if self.distilled is not None:
            before, after = (self.distilled[when] for when in ("before", "after"))
            rows["distilled"] = f"KL {before:.5f} → {after:.5f} on calibration text that was not trained on"
        if self.calibration is not None:
            rows["calibration"] = _calibration_line(self.calibration)
        if self.kv_cache is not None:
            rows["kv cache"] = _cache_line(self.kv_cache)
        if many := {module: share for module, share in self.clipped.items() if share > MUCH_CLIPPED}:
            worst = max(many, key=lambda module: many[module])
            rows["clipped"] = (
                f"{len(many)} layers have more than {MUCH_CLIPPED:.0%} of their weights beyond the range of their"
                f" steps; most {worst}, {many[worst]:.1%}"
            )
        rows["loss"] = "change not measured: give held-out text, --evaluate FILE"
        if (found := self.evaluation) is not None:
            rows["loss"] = (
                f"ΔL {found['loss_change']:+.4f}, {interval(found['loss_change_ci95'], '+.4f')};"
                f" KL {found['kl']:.5f}, {interval(found['kl_ci95'], '.5f')};"
                f" perplexity {found['base_perplexity']:.3f} → {found['perplexity']:.3f}"
            )
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
    calibration: Sequence[str | Path] = (),
    samples: int | None = None,
    sequence_length: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    **settings: Any,
) -> CompressResult:
    """Compress a checkpoint folder into another.

    recipe: a preset, a file, or a `Recipe`; ``settings`` (``bits=4, group_size=64, sparsity=0.5, …``, see
    `presets.build`) change it or stand alone; with text to calibrate on, the preset balanced if nothing else is said.
    memory_limit: bytes; refused when the run cannot keep it.  shard_bytes: blocks share a file until they have that
    many bytes of the original, and a killed run goes on at a file.  check: how many blocks' logits the self-check
    computes.  evaluate: a file of held-out text to measure ΔL on.  calibration, samples, sequence_length, device: for
    methods that need data; see `calibrate.Calibration`.  progress: is told bytes of the original that are done, and all
    (before that, of tokens that the model writes itself).  announce: is told, line by line before the run, the bound of
    the memory, when the model is compressed already, and how a sparse result is stored.

    The same call after a crash goes on where it was and ends with the same bytes; after success it returns what is
    there. Raises BadInput (BadCheckpoint, BadRecipe, Unsupported) for what cannot be done, OutOfBudget for memory and
    disk, PenjingError when the self-check fails or the run is interrupted; no folder is left that looks whole.
    """
    start = time.monotonic()
    hardware.return_freed_memory()
    folder, say, report = Path(output), announce or _say_nothing, progress or _say_nothing
    _check_asked(folder, sparse_storage, check)
    held_out = read_texts(evaluate) if evaluate is not None else []
    made = build(recipe, with_data=bool(calibration), **settings)
    checkpoint = _open(model, say)
    if folder.resolve() == checkpoint.path.resolve():
        raise BadInput(f"{folder}: is the model itself; give another folder")
    text = Text(tuple(map(Path, calibration)), samples, sequence_length, made.seed, device)
    job = Job(checkpoint, made, folder / FOLDER, text, sparse_storage == "bitmask", shard_bytes, memory_limit)
    check_held_out(held_out, job.calibrated_text(), str(evaluate))
    journal = Journal(folder, job.identity, job.files)
    finished = None if restart else journal.finished_artifact()
    if finished is None:
        described, resumed_at = _work(job, journal, restart, check, report, say)
    else:
        described, resumed_at = finished, None
    if evaluate is not None:
        described = _evaluated(folder, described, checkpoint.path, Path(evaluate))
    return _result(folder, described, start, job.footprint.total, resumed_at, already=finished is not None)


def _check_asked(folder: Path, sparse_storage: str, check: str) -> None:
    """BadInput for what would otherwise show when the work is done."""
    for name, value, choices in (
        ("sparse_storage", sparse_storage, ("dense", "bitmask")),
        ("check", check, ("sample", "full", "none")),
    ):
        if value not in choices:
            raise BadInput(f"{name}={value!r}: give {', '.join(choices[:-1])} or {choices[-1]}")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file; give a folder that is empty or does not exist")


def _open(model: str | Path, say: Callable[[str], None]) -> Checkpoint:
    """The original, as numbers; said, where they are what an earlier compression left."""
    stored = open_checkpoint(model)
    unstack(stored)
    _say_who_serves(stored, say)
    if (stored.path / "tokenizer.json").is_file():
        Tokenizer(stored.path)  # BadCheckpoint where it is damaged: what is written would serve no text
    if steps := kv_cache.steps(stored):
        say(
            f"{stored.path}: its {len(steps)} steps for the cache of keys and values are left out, for they are of the"
            " weights as they were; --kv-cache finds new ones"
        )
    if stored.compressed:
        say(
            f"{stored.path}: its weights are compressed already ({format_of(stored)}), and what that lost stays lost;"
            " compress the original where there is one"
        )
    return Decoded(stored) if (stored.compressed or steps) and "quantization_config" in stored.config else stored


def _say_who_serves(stored: Checkpoint, say: Callable[[str], None]) -> None:
    """Say before the work what would otherwise show after it: that Penjing's engine will not run the result itself."""
    try:
        found = read_any(stored)
    except BadInput as why:
        say(f"Penjing will not serve the result: {why}")
        return
    if isinstance(found, Outline):
        say(
            f"{stored.path}: model_type {found.family!r} has no description: what is made of it is served by"
            " transformers' graph, slower, if it writes text, and its logits are not part of the self-check"
        )


def _work(
    job: Job, journal: Journal, restart: bool, check: str, report: Progress, say: Callable[[str], None]
) -> tuple[dict[str, Any], int | None]:
    """Do a job, or what is left of it → what penjing.json says, and the first block that was left; None for all."""
    try:
        resumed = journal.begin(restart=restart)
        if job.text.files and not job.calibrated:
            say("no method of this recipe needs calibration data; it is not used")
        say(str(job.footprint))
        if job.undistilled is not None:
            say(job.undistilled)
        if any(rule.prune for rule in job.plan.rules.values()):
            say(BITMASK_NOTE if job.plan.bitmask else DENSE_NOTE)
        check_disk(job.plan, journal, job.calibrators)
        job.begin(report, say)
        plan = job.plan
        first = next((shard.first_block for shard in plan.shards if journal.finished(shard.name) is None), plan.blocks)
        entries = distilled.finished(journal) or _distilled(
            job, journal, _run(plan, journal, job.calibrator, report), report
        )
        return _complete(job, journal, entries, check), first if resumed else None
    except KeyboardInterrupt:
        left = sum(journal.finished(shard.name) is None for shard in job.plan.shards)
        raise PenjingError(
            f"interrupted with {left} of {len(job.plan.shards)} files left; the same command goes on from there"
        ) from None


def _calibration_line(found: Mapping[str, Any]) -> str:
    """What is said of calibration at the end: gains over rounding, and every layer that is not as was asked."""
    both = [its for its in found["layers"].values() if its.get("plain_loss")]
    line = f"{found['samples']} × {found['sequence_length']} tokens"
    line += " THAT THE MODEL WROTE ITSELF, for no text was given" if found.get("own_samples") else ""
    if both:
        share = sum(its["loss"] / its["plain_loss"] for its in both) / len(both)
        line += f"; layers lose {share:.2f} × what rounding alone would"
    words = {
        "kept_plain": "were no better than rounded, and are rounded",
        "starved": "of experts that were rarely chosen, which were given all tokens",
        "unfolded": "whose input nothing makes that a scale could be folded into",
        "uncalibrated": "that nothing came to, and are rounded",
    }
    for flag, what in words.items():
        if found[flag]:
            line += f"; {len(found[flag])} layers {what}"
    return line


def _cache_line(found: Mapping[str, Any]) -> str:
    """What is said of the cache at the end: its steps, the worst of what they lose, and who has none."""
    line = f"steps of {found['kind']} for {len(found['layers'])} layers"
    for each in ("keys", "values"):
        worst = max(found["layers"], key=lambda name: found["layers"][name][f"{each}_loss"])
        largest = max(its[f"largest_{each}"] for its in found["layers"].values())
        line += f"; {each} up to {largest:.3g}, off by {found['layers'][worst][f'{each}_loss']:.1e} of their squares"
        line += f" at most ({worst})"
    if found["left_as_is"]:
        line += f"; {len(found['left_as_is'])} layers keep none, and are left as they are"
    return line


def _say_nothing(*_: Any) -> None:
    pass


def _run(plan: Plan, journal: Journal, calibrator: Calibrator | None, progress: Progress) -> dict[str, dict[str, Any]]:
    """Solve, write, journal; a file is written while the next one is computed."""
    total = sum(plan.input_bytes(shard) for shard in plan.shards)
    done, entries = 0, {}
    pending: Future[dict[str, Any]] | None = None
    with ThreadPoolExecutor(1, "penjing-write") as writer:
        for shard in plan.shards:
            entry, size = journal.finished(shard.name), plan.input_bytes(shard)
            if entry is None:
                ticker = _Ticker(progress, done, size, total)
                contents = solve_shard(plan, shard, calibrator, ticker.tick)
                if pending is not None:
                    pending.result()
                pending = writer.submit(_write, plan, journal, calibrator, shard, contents)
            elif sha256_of(journal.output / shard.name) != entry["sha256"]:
                raise PenjingError(f"{journal.output / shard.name}: damaged since it was written; run with --restart")
            done += size
            progress(done, total)
        if pending is not None:
            pending.result()
    for shard in plan.shards:
        entries[shard.name] = journal.finished(shard.name) or {}
    return entries


class _Ticker:
    """Adds up shares of a file's work, and reports them as bytes."""

    def __init__(self, progress: Progress, before: float, size: float, total: float) -> None:
        self._progress, self._before, self._size, self._total, self._share = progress, before, size, total, 0.0

    def tick(self, share: float) -> None:
        self._share = min(1.0, self._share + share)
        self._progress(self._before + self._share * self._size, self._total)


def _write(
    plan: Plan, journal: Journal, calibrator: Calibrator | None, shard: Shard, contents: Contents
) -> dict[str, Any]:
    digest, length = write_safetensors(journal.output / shard.name, contents.tensors, {"format": "pt"})
    sizes = {name: tensor.nbytes for name, tensor in contents.tensors.items()}
    entry = {"sha256": digest, "bytes": length, "tensors": sizes, "zeros": contents.zeros, "clipped": contents.clipped}
    entry |= {"recovered": contents.recovered, "cache": contents.cache}
    if contents.verdicts:
        entry["verdicts"] = contents.verdicts
    journal.finish(shard.name, entry)
    after = plan.shards.index(shard) + 1
    if calibrator is not None and after < len(plan.shards):
        calibrator.forget_before(plan.shards[after].blocks[0].name)
    return entry


def _distilled(
    job: Job, journal: Journal, entries: dict[str, dict[str, Any]], report: Progress
) -> dict[str, dict[str, Any]]:
    """What is written, trained as a whole where that was asked for, and memory allows it."""
    if job.calibrator is None or job.calibrator.original is None:
        return entries
    saved = _saved(job.plan, journal, entries)[0]
    whole = float(sum(job.plan.input_bytes(shard) for shard in job.plan.shards))
    try:
        return distilled.distil(job.plan, journal, job.calibrator, saved, entries, lambda: report(whole, whole))
    finally:
        saved.close()


def _saved(plan: Plan, journal: Journal, entries: Mapping[str, dict[str, Any]]) -> tuple[Checkpoint, dict[str, Any]]:
    """What is written, as a checkpoint, and the config.json that it is to have."""
    if len(entries) > 1:
        artifact.write_index(journal.output, {name: entry["tensors"] for name, entry in entries.items()})
    config = dict(plan.checkpoint.config)
    if (quantization := artifact.quantization_config(plan)) is not None:
        config["quantization_config"] = quantization
    return open_checkpoint(journal.output, config), config


def _complete(job: Job, journal: Journal, entries: Mapping[str, dict[str, Any]], check: str) -> dict[str, Any]:
    """Index, side files, self-check, penjing.json, and config.json last → what penjing.json says."""
    plan, output = job.plan, journal.output
    artifact.copy_side_files(plan.checkpoint, output)
    saved, config = _saved(plan, journal, entries)
    verdicts = {module: its for entry in entries.values() for module, its in entry.get("verdicts", {}).items()}
    checksums = {module: its["checksum"] for module, its in verdicts.items()}
    solved = checksums if checksums or plan.recipe.recover is not None else None
    again = functools.partial(solved_again, plan)
    verdict = verify.verify(plan.checkpoint, saved, plan.rules, again, check, solved)
    described = artifact.describe(plan, journal.identity, journal.files, entries)
    if described["kv_cache"] is not None:
        kv_cache.check(saved, described["kv_cache"]["layers"])
    saved.close()
    described |= {
        "check": verdict,
        "calibration": artifact.calibration(journal.identity, verdicts),
        "shrunk": job.shrunk,
    }
    described["calibrated_text"] = job.calibrated_text()
    described["distilled"] = next(iter(entries.values())).get("distilled")
    described["recovered"] = {block: its for entry in entries.values() for block, its in entry["recovered"].items()}
    write_json(output / ARTIFACT, described)
    artifact.complete(output, config)
    journal.close()
    return described


def _evaluated(output: Path, made: dict[str, Any], original: Path, data: Path) -> dict[str, Any]:
    """ΔL on held-out text, noted in penjing.json."""
    measured = measure(output, data, original).to_dict()
    kept = {name: value for name, value in measured.items() if name not in ("seconds", "peak_rss_bytes")}
    made = made | {"evaluation": {"data": data.name, "data_sha256": sha256_of(data)} | kept}
    write_json(output / ARTIFACT, made)
    return made


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
        **{
            name: made[name]
            for name in (
                *same,
                "digest",
                "blocks",
                "check",
                "calibration",
                "evaluation",
                "shrunk",
                "clipped",
                "recovered",
                "distilled",
                "kv_cache",
            )
        },
    )
