"""How fast a checkpoint becomes int4, and in how much memory: Penjing, the disk alone, and llm-compressor.

    python benchmarks/compress_speed.py [--size 1.1b] [--method rtn] [--runs 5] [--peer-python PYTHON]
                                        [--write docs/benchmarks]

`--method gptq` calibrates on 32 × 512 tokens of Novelist's text: Penjing's preset `balanced`, and its gptq without
sweeps, which is the paper's and llm-compressor's.

Runs alternate; before each one the checkpoint is dropped from the page cache. "Disk alone" reads the same bytes and
writes as many as the result has, in one thread, with the data forced to disk at the end. Times are of whole processes;
peak memory is the operating system's (`ru_maxrss` of the finished child), less that of an interpreter that only
imports numpy.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from make_llama import SIZES, make

HERE = Path(__file__).parent
DRIVER = HERE / "peers/llmcompressor_int4.py"
NOVELIST = HERE.parent / "examples/novelist"
TEXT, SAMPLES, LENGTH = NOVELIST / "evaluation.txt", 32, 512  # of speed, not of quality: any text is good
MB = 1_000_000


@dataclass
class Runs:
    """What the finished runs of one contender took: seconds, and peak resident bytes."""

    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def add(self, command: list[str]) -> None:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert child.stderr is not None
        said = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} failed:\n{said.decode()[-2000:]}")
        self.seconds.append(time.perf_counter() - start)
        self.peaks.append(usage.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--layers", type=int, help="fewer or more than a model of that size has")
    parser.add_argument("--method", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-python", help="a Python that has llmcompressor; without it the peer is left out")
    parser.add_argument("--folder", type=Path, help="where to work (a new temporary folder)")
    parser.add_argument("--write", type=Path, help="folder for compress_speed.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        model, output = Path(work) / "model", Path(work) / "int4"
        make(model, arguments.size, depth=arguments.layers, tokenizer=NOVELIST)
        title = f"{TITLES[arguments.method]}: {arguments.size} parameters"
        title += f", {arguments.layers} layers" if arguments.layers else ""
        commands = COMMANDS[arguments.method](model, output, arguments.peer_python)
        report = compare(title, model, output, commands, arguments.runs)
    print(report)
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        method = "" if arguments.method == "rtn" else f"_{arguments.method}"
        (arguments.write / f"compress_speed{method}_{arguments.size}.md").write_text(report)


def rtn(model: Path, output: Path, peer: str | None) -> dict[str, list[str]]:
    commands = {"Penjing": [*penjing(model, output), "--bits", "4", "--group-size", "128"]}
    if peer:
        commands["llm-compressor"] = [peer, str(DRIVER), str(model), str(output)]
    return commands


def gptq(model: Path, output: Path, peer: str | None) -> dict[str, list[str]]:
    calibrated = [*penjing(model, output), "--calibration", str(TEXT)]
    calibrated += ["--samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
    as_paper = ["--method", "gptq", "--bits", "4", "--group-size", "128", "--option", "sweeps=0"]
    commands = {
        "Penjing": [*calibrated, "--recipe", "balanced"],
        "Penjing, no sweeps": [*calibrated, *as_paper],
    }
    if peer:
        commands["llm-compressor"] = [peer, str(DRIVER), str(model), str(output), str(TEXT), str(SAMPLES), str(LENGTH)]
    return commands


def penjing(model: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "penjing", "compress", str(model), "-o", str(output), "--json"]


COMMANDS = {"rtn": rtn, "gptq": gptq}
TITLES = {
    "rtn": "Round-to-nearest int4, groups of 128",
    "gptq": f"GPTQ int4, groups of 128, {SAMPLES} × {LENGTH} tokens",
}


def compare(title: str, model: Path, output: Path, commands: dict[str, list[str]], runs: int) -> str:
    read = sum(file.stat().st_size for file in model.iterdir())
    results = {name: Runs() for name in ("disk alone", *commands)}
    interpreter = Runs()
    interpreter.add([sys.executable, "-c", "import numpy"])
    written = 0
    for _ in range(runs):
        for name, command in commands.items():
            forget(model)
            results[name].add(command)
            if name == "Penjing":
                written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
            shutil.rmtree(output)
        forget(model)
        results["disk alone"].seconds.append(disk_seconds(model, written, output.with_name("plain")))
    return render(title, read, written, results, interpreter.peaks[0])


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_seconds(model: Path, written: int, target: Path) -> float:
    """Seconds to read all of a folder and to write that many bytes, forced to disk."""
    start = time.perf_counter()
    left = written
    buffer = bytearray(16 << 20)
    with open(target, "wb", buffering=0) as sink:
        for file in sorted(model.iterdir()):
            with open(file, "rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    part = min(count, left)
                    sink.write(memoryview(buffer)[:part])
                    left -= part
        os.fsync(sink.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def render(title: str, read: int, written: int, results: dict[str, Runs], interpreter: int) -> str:
    ours = results["Penjing"].seconds
    rows = []
    for name, runs in results.items():
        seconds = sorted(runs.seconds)
        ratio = statistics.median(a / b for a, b in zip(ours, runs.seconds, strict=True))
        peak = f"{(statistics.median(runs.peaks) - interpreter) / MB:,.0f} MB" if runs.peaks else "–"
        took = f"{statistics.median(seconds):.2f} s ({seconds[0]:.2f}–{seconds[-1]:.2f})"
        rows.append(f"| {name} | {took} | {ratio:.2f} | {peak} |")
    return "\n".join(
        [
            f"# {title}",
            "",
            f"{read / MB:,.0f} MB read, {written / MB:,.0f} MB written;"
            f" alternating runs: {len(ours)}; median (spread).",
            f"{platform.machine()}, {os.cpu_count()} cores. Made by `benchmarks/compress_speed.py`.",
            "",
            "| | time | Penjing's time ÷ this | peak RSS over the interpreter's |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
