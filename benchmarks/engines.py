"""Penjing's engine beside llama.cpp, OpenVINO, vLLM and vllm.cpp: one model, one machine, one run, in turn.

    python benchmarks/engines.py [--rounds 5] [--only penjing,llama.cpp] [--peers build/peers] [--work build/engines]
                                 [--model FOLDER] [--write docs/benchmarks] [--quick]

Each peer lives in an environment of its own, made when it is first needed and used again; one that cannot be made is
reported and the others run on. The model is a Llama of 1.1 billion seeded random weights. Every round asks each engine
in turn, while all others are stopped, so that a slow minute of the machine meets all of them; what another program
disturbed is measured again. The table, the figures and the pictures are written after every round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_speed import forget
from engines_report import Results, write
from make_llama import make
from peers.environments import Unavailable, commit_of_vllm_cpp, library_of_vllm_cpp, python_of
from penjing import hardware

HERE = Path(__file__).parent
ROOT = HERE.parent
PATIENCE = 1200  # seconds for one answer
ONCE = 30  # a measurement of so many seconds is made a single time
DISTURBED = 0.05  # share of the processor that other programs may take during a measurement
TRIES = 3  # of a disturbed measurement
KEEP_FREE = 6 << 30  # engines stay loaded while so much memory is available


@dataclass(frozen=True)
class Contender:
    """An engine with a model in one format. driver: a file of `peers/`.  measures: names of `MEASURES`."""

    name: str
    peer: str
    driver: str
    model: str
    measures: tuple[str, ...] = ("prefill", "decode", "batch")
    options: dict[str, Any] = field(default_factory=dict)


def _penjing(name: str, kind: str, *more: str) -> Contender:
    measures = ("prefill", "decode", "batch", *more)
    return Contender(f"Penjing {name}", "penjing", "penjing_engine.py", kind, measures, {"kind": kind})


CONTENDERS = (
    _penjing("int4", "int4", "prefix"),
    Contender("llama.cpp Q4_0", "llama.cpp", "llamacpp.py", "Q4_0"),
    Contender("OpenVINO int4", "openvino", "openvino_llm.py", "openvino"),
    _penjing("int4, head too", "int4h4"),
    _penjing("int4 + 50 % sparse", "int4-sparse50"),
    _penjing("int4 + 50 % sparse, head too", "int4s50h4"),
    _penjing("int4 + 2:4 sparse", "int4s24"),
    _penjing("int4 + 2:4 sparse, head too", "int4s24h4"),
    Contender("llama.cpp Q8_0", "llama.cpp", "llamacpp.py", "Q8_0"),
    _penjing("int8", "int8"),
    _penjing("int8, head too", "int8h8"),
    Contender("vLLM W8A8", "vllm", "vllm_cpu.py", "w8a8", options={"kind": "w8a8"}),
    _penjing("W8A8", "w8a8"),
    Contender("vLLM bfloat16", "vllm", "vllm_cpu.py", "bf16", options={"kind": "bf16"}),
    Contender("vllm.cpp bfloat16", "vllm.cpp", "vllm_cpp.py", "vllm.cpp"),
    Contender(
        "Penjing int4, int8 cache",
        "penjing",
        "penjing_engine.py",
        "int4",
        ("short", "long"),
        {"kind": "int4", "cache": "int8"},
    ),
)


def measures(quick: bool) -> dict[str, dict[str, Any]]:
    """What the drivers are asked, by name."""
    tokens = 16 if quick else 64
    return {
        "prefill": {"do": "prefill", "tokens": 512},
        "decode": {"do": "decode", "streams": 1, "tokens": tokens, "context": 16},
        "batch": {"do": "decode", "streams": 8, "tokens": tokens // 2, "context": 16},
        "short": {"do": "decode", "streams": 1, "tokens": tokens, "context": 100},
        "long": {"do": "decode", "streams": 1, "tokens": tokens, "context": 1000 if quick else 4000},
        "prefix": {"do": "prefix", "tokens": 1000},
    }


# The head is compressed as well, as llama.cpp's is.
HEAD_TOO = """version: 1
ignore: ["re:.*embed", "re:.*norm"]
rules:
  - targets: "*"
"""
PLAIN = """version: 1
rules:
  - targets: "*"
"""
TWO_OF_FOUR = '    prune: {method: l1, pattern: "2:4"}\n'
INT4 = "    quantize: {method: rtn, bits: 4, group_size: 128}\n"
INT8 = "    quantize: {method: rtn, bits: 8, group_size: -1}\n"
RECIPES = {
    "int4": "int4",
    "int4-sparse50": "int4-sparse50",
    "int8": "int8",
    "w8a8": "w8a8",
    "int4h4": HEAD_TOO + INT4,
    "int4s50h4": HEAD_TOO + "    prune: {method: l1, sparsity: 0.5}\n" + INT4,
    "int4s24": PLAIN + TWO_OF_FOUR + INT4,
    "int4s24h4": HEAD_TOO + TWO_OF_FOUR + INT4,
    "int8h8": HEAD_TOO + INT8,
}


def prepare(kind: str, model: Path, work: Path, python: str) -> Path:
    """The model in the format that a contender reads, made once."""
    if kind == "bf16":
        return model
    target = work / {"Q4_0": "Q4_0.gguf", "Q8_0": "Q8_0.gguf"}.get(kind, kind)
    if target.exists():
        return target
    part = target.with_name("part-" + target.name)
    if part.is_dir():
        shutil.rmtree(part)
    drivers = HERE / "peers"
    if kind in RECIPES:
        recipe = RECIPES[kind]
        if "\n" in recipe:
            file = work / f"{kind}.yaml"
            file.write_text(recipe)
            recipe = str(file)
        command = [sys.executable, "-m", "penjing", "compress", str(model), "-o", str(part), "--recipe", recipe]
    elif kind in ("Q4_0", "Q8_0"):
        command = [python, str(drivers / "llamacpp.py"), "convert", str(model), str(part), kind]
    else:
        driver = {"openvino": "openvino_llm.py", "vllm.cpp": "vllm_cpp.py"}[kind]
        command = [python, str(drivers / driver), "convert", str(model), str(part)]
    print(f"making {target}", file=sys.stderr)
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    part.rename(target)
    return target


class Clock:
    """The processor's time since it was made, as Linux counts it: all of it, and that of one process."""

    def __init__(self, pid: int) -> None:
        self.pid, self.start = pid, time.monotonic()
        self.busy, self.own = self._busy(), self._own()

    def others(self) -> float:
        """The share of all cores that other processes, and other machines on the same host, have taken."""
        wall = (time.monotonic() - self.start) * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        return max(0.0, (self._busy() - self.busy) - (self._own() - self.own)) / max(wall, 1.0)

    @staticmethod
    def _busy() -> int:
        user, nice, system, _idle, _wait, *interrupts_and_stolen = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        return user + nice + system + sum(interrupts_and_stolen)

    def _own(self) -> int:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


class Driver:
    """A process that answers for one contender; stopped while others are asked."""

    def __init__(self, python: str, contender: Contender, environ: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / "peers" / contender.driver)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | (environ or {}),
            start_new_session=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a command; {"error": …} also when the process died or is silent."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        self._signal(signal.SIGCONT)
        clock = Clock(process.pid)
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], PATIENCE)[0]:
                return {"error": f"no answer in {PATIENCE} s"}
            line = process.stdout.readline()
        except OSError as error:
            return {"error": str(error)}
        if not line:
            return {"error": f"ended with exit code {process.wait()}"}
        others = clock.others()
        self._signal(signal.SIGSTOP)
        return json.loads(line) | {"others": others}

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


class Race:
    """All contenders, their processes, and what was measured."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.asked = measures(given.quick)
        self.work: Path = given.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.model = given.model or self.work / "bf16"
        if not (self.model / "config.json").is_file():
            print(f"making {self.model}", file=sys.stderr)
            make(self.model, "1.1b")
            for file in (ROOT / "examples/novelist").glob("tokenizer*.json"):
                shutil.copy(file, self.model)
        self.results = Results(rounds=given.rounds, threads=given.threads, quick=given.quick)
        self.pythons: dict[str, str] = {}
        self.drivers: dict[str, Driver] = {}
        self.seeds = itertools.count(1)

    def run(self) -> None:
        contenders = [each for each in CONTENDERS if self._ready(each)]
        total = self.given.rounds * sum(len(each.measures) for each in contenders)
        done, began = 0, time.monotonic()
        try:
            if any(each.model == "int4" for each in contenders):
                self._starts()
            for number in range(self.given.rounds):
                self.results.bandwidth.append(hardware.bandwidth_gbps())
                for contender in contenders:
                    for said in self._visit(contender):
                        done += 1
                        left = (time.monotonic() - began) / done * (total - done) / 60
                        print(
                            f"round {number + 1} of {self.given.rounds}, {said}; about {left:.0f} min left",
                            file=sys.stderr,
                        )
                write(self.results, self.given.write)
        finally:
            for driver in self.drivers.values():
                driver.close()

    def _ready(self, contender: Contender) -> bool:
        """Environment and model of a contender are there now."""
        if self.given.only and contender.peer not in self.given.only:
            return False
        try:
            self.pythons[contender.peer] = python_of(contender.peer, self.given.peers)
            prepare(contender.model, self.model, self.work, self.pythons[contender.peer])
        except Unavailable as error:
            self.results.missing[contender.name] = str(error)
            print(f"{contender.name} is not to be had: {error}", file=sys.stderr)
            return False
        return True

    def _visit(self, contender: Contender) -> Iterator[str]:
        """Measure a contender once in everything; yields a line for each."""
        name = contender.name
        for measure in contender.measures:
            if name in self.results.missing or measure in self.results.once.get(name, ()):
                yield f"{name}: {measure} left out"
                continue
            driver = self.drivers.get(name) or self._start(contender)
            answer = self._undisturbed(driver, measure) if driver else {}
            if "error" in answer:
                self.results.missing[name] = f"{measure}: {answer['error']}"
                self.drivers.pop(name).close()
            elif answer:
                self.results.add(name, measure, self.asked[measure], answer)
                if answer["seconds"] > ONCE:
                    self.results.once.setdefault(name, []).append(measure)
            yield f"{name}: {measure} {self.results.said(name, measure)}"
        if name in self.drivers and hardware.memory_available_bytes() < KEEP_FREE:
            self.drivers.pop(name).close()

    def _undisturbed(self, driver: Driver, measure: str) -> dict[str, Any]:
        """The answer during which other programs took the least, of some tries unless the first is good."""
        answers: list[dict[str, Any]] = []
        while len(answers) < (1 if self.given.quick else TRIES):
            answers.append(driver.ask(**self.asked[measure], seed=next(self.seeds)))
            if "error" in answers[-1]:
                return answers[-1]
            if answers[-1]["others"] <= DISTURBED:
                break
        return min(answers, key=lambda answer: answer["others"])

    def _start(self, contender: Contender) -> Driver | None:
        """Load, and do everything once unseen; what was very slow is not done again, and that is its figure."""
        name = contender.name
        driver = self.drivers[name] = Driver(self.pythons[contender.peer], contender)
        loaded = driver.ask(**self._load(contender))
        if "error" in loaded:
            self.results.missing[name] = loaded["error"]
            self.drivers.pop(name).close()
            return None
        self.results.loaded[name] = loaded
        for measure in contender.measures:
            if measure == "long":  # as warm as "short", and slow
                continue
            answer = driver.ask(**self.asked[measure], seed=next(self.seeds))
            if answer.get("seconds", 0) > ONCE:
                self.results.add(name, measure, self.asked[measure], answer)
                self.results.once.setdefault(name, []).append(measure)
        return driver

    def _load(self, contender: Contender) -> dict[str, Any]:
        path = prepare(contender.model, self.model, self.work, self.pythons[contender.peer])
        options = dict(contender.options)
        if contender.peer == "vllm.cpp":
            options["commit"] = commit_of_vllm_cpp(self.given.peers)
            options["library"] = str(library_of_vllm_cpp(self.given.peers).resolve())
        return {"do": "load", "model": str(path.resolve()), "threads": self.given.threads, **options}

    def _starts(self) -> None:
        """Load a fresh copy that is not in the page cache, then the same again and again."""
        contender = CONTENDERS[0]
        copy, cache = self.work / "start", self.work / "start-cache"
        for folder in (copy, cache):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.work / contender.model, copy)
        forget(copy)
        for _ in range(1 + self.given.rounds):
            start = time.perf_counter()
            environ = {"XDG_CACHE_HOME": str(cache)}
            driver = self.drivers["start"] = Driver(self.pythons["penjing"], contender, environ)
            answer = driver.ask(**self._load(contender) | {"model": str(copy)})
            self.drivers.pop("start").close()
            if "error" not in answer:
                self.results.starts.append((answer["seconds"], time.perf_counter() - start))
        for folder in (copy, cache):
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=lambda text: text.split(","), help="peers: penjing, llama.cpp, openvino, …")
    parser.add_argument("--peers", type=Path, default=ROOT / "build/peers", help="folder of their environments")
    parser.add_argument("--work", type=Path, default=ROOT / "build/engines", help="folder of the converted models")
    parser.add_argument("--model", type=Path, help="a Llama checkpoint in bfloat16 (one of 1.1 billion is made)")
    parser.add_argument("--threads", type=int, default=hardware.cores())
    parser.add_argument("--write", type=Path, default=ROOT / "docs/benchmarks", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one round of few tokens: does everything run?")
    given = parser.parse_args()
    given.rounds = 1 if given.quick else given.rounds
    given.peers, given.work = given.peers.resolve(), given.work.resolve()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stopped driver outlives this process
    Race(given).run()
    print((given.write / "engines.md").read_text())


if __name__ == "__main__":
    main()
