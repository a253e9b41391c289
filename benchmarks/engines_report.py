"""What `engines.py` measured, as Markdown, as JSON and as pictures."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines_picture import draw
from peers.environments import ENVIRONMENTS, VLLM_CPP, VLLM_CPP_BUILD
from penjing import hardware

QUIET = 0.05  # share of the processor that others may take before the document says so
TITLES = {"prefill": "prefill of 512", "decode": "decode, 1 stream", "batch": "decode, 8 streams"}


@dataclass
class Results:
    """values: contender → measure → tokens per second, one a round (prefix: share of the cold time).

    loaded: what each driver said of itself.  starts: seconds to load, and of the whole process, one a start.
    shares: what a stream read over what memory gave beside it, one a round.
    others: share of the processor that other programs took, one a measurement.
    missing: why a contender has no figures.  once: measures so slow that they were made a single time.
    """

    rounds: int
    threads: int
    quick: bool
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    once: dict[str, list[str]] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    starts: list[tuple[float, float]] = field(default_factory=list)

    def add(self, name: str, measure: str, asked: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        if measure == "prefix":
            value = answer["seconds"] / answer["cold"]
        else:
            value = answer.get("tokens", asked["tokens"]) / answer["seconds"]
        self.values.setdefault(name, {}).setdefault(measure, []).append(value)
        self.seconds.setdefault(name, {}).setdefault(measure, []).append(answer["seconds"])
        if measure == "decode" and "bandwidth" in answer:
            share = value * self.loaded[name]["bytes"] / answer["bandwidth"]
            self.shares.setdefault(name, []).append(share)
        self.others.append(answer["others"])
        if "note" in answer:
            self.notes.setdefault(name, {})[measure] = answer["note"]

    def median(self, name: str, measure: str) -> float | None:
        values = self.values.get(name, {}).get(measure)
        return statistics.median(values) if values else None

    def said(self, name: str, measure: str) -> str:
        values = self.values.get(name, {}).get(measure)
        return number(values[-1]) if values else self.missing.get(name, "–")

    def to_dict(self) -> dict[str, Any]:
        return {
            "machine": {"cpu": hardware.cpu_name(), "isa": hardware.isa(), "cores": hardware.cores()},
            "threads": self.threads,
            "rounds": self.rounds,
            "quick": self.quick,
            "bandwidth_gbps": self.bandwidth,
            "others": [round(share, 4) for share in self.others],
            "bandwidth_shares": self.shares,
            "engines": {
                name: self.loaded[name]
                | {"tokens_per_second": values, "seconds": self.seconds[name], "notes": self.notes.get(name, {})}
                for name, values in self.values.items()
            },
            "loads": [{"load_seconds": load, "process_seconds": process} for load, process in self.starts],
            "missing": self.missing,
            "targets": [target.__dict__ | {"met": target.met} for target in targets(self)],
        }


@dataclass(frozen=True)
class Target:
    """A figure of Penjing's beside what it should be; ``most``: should be at most that."""

    name: str
    value: float | None
    wanted: float
    most: bool = False

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.wanted if self.most else self.value >= self.wanted


def targets(results: Results) -> list[Target]:
    """Every aim, for every variant that it is about. A value of None was not measured."""
    made: list[Target] = []

    def against(kind: str, measure: str, peer: str, wanted: float) -> None:
        ours, theirs = results.median(f"Penjing {kind}", measure), results.median(peer, measure)
        ratio = ours / theirs if ours and theirs else None
        made.append(Target(f"{TITLES[measure]}: {kind} ÷ {peer}", ratio, wanted))

    for kind in ("int4", "int4, head too"):
        against(kind, "decode", "llama.cpp Q4_0", 1.2)
    for kind in ("int4", "int4, head too"):
        shares = results.shares.get(f"Penjing {kind}")
        share = statistics.median(shares) if shares else None
        made.append(Target(f"decode, 1 stream: {kind} ÷ what memory's bandwidth allows", share, 0.85))
    for kind in ("int4 + 50 % sparse", "int4 + 2:4 sparse"):
        for variant in (kind, f"{kind}, head too"):
            against(variant, "decode", "llama.cpp Q4_0", 1.7)
    for kind in ("int8", "int8, head too"):
        against(kind, "decode", "llama.cpp Q8_0", 1.2)
    for kind, peer in (("int4", "llama.cpp Q4_0"), ("int8", "llama.cpp Q8_0")):
        against(kind, "prefill", "OpenVINO int4", 1.25)
        against(kind, "prefill", peer, 2.5)
    for kind in ("int4", "int4, head too"):
        against(kind, "batch", "OpenVINO int4", 1.2)
    cached = "Penjing int4, int8 cache"
    near, far = results.median(cached, "short"), results.median(cached, "long")
    made.append(Target("decode at 4000 tokens ÷ at 100, int8 cache", far / near if near and far else None, 0.8))
    prefix = results.median("Penjing int4", "prefix")
    made.append(Target("first token of 1000 seen before ÷ of 1000 new", prefix, 0.05, most=True))
    again = [load for load, _ in results.starts[1:]]
    made.append(Target("seconds of the second load, int4", statistics.median(again) if again else None, 1.0, most=True))
    return made


def write(results: Results, folder: Path) -> None:
    """Write engines.md, engines.json, engines.svg and engines-narrow.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engines.json").write_text(json.dumps(results.to_dict(), indent=1, ensure_ascii=False) + "\n")
    (folder / "engines.md").write_text(markdown(results))
    bars = {
        title: {name: found for name in results.values if (found := results.values[name].get(measure))}
        for measure, title in TITLES.items()
    }
    draw(bars, folder / "engines.svg", wide=True)
    draw(bars, folder / "engines-narrow.svg", wide=False)


def markdown(results: Results) -> str:
    parts = [
        "# Engines on one CPU",
        "",
        "A Llama of 1.1 billion seeded random weights, decoded greedily by each engine in its own process, in turn,"
        f" the others stopped: {results.rounds} round{'s' * (results.rounds > 1)}, {results.threads} threads, the same"
        f" random tokens. {hardware.cpu_name()} ({platform.machine()}, {hardware.isa()}); its memory"
        f" gave {min(results.bandwidth):.0f} to {max(results.bandwidth):.0f} GB/s: shares of that are of what was read"
        " just before and after. Medians of tokens per second, with the least and the most."
        " Made by `benchmarks/engines.py`; all single values are in [engines.json](engines.json).",
        *(["", "**A quick run: it shows that everything works, not how fast it is.**"] if results.quick else []),
        *disturbance(results),
        "",
        "<picture>",
        '  <source media="(max-width: 700px)" srcset="engines-narrow.svg">',
        '  <img src="engines.svg" alt="Tokens per second of each engine: prefill, decode, decode of eight streams">',
        "</picture>",
        "",
        *speeds(results),
        "",
        *computes(results),
        "",
        "## What was aimed at",
        "",
        *aims(results),
        "",
        *others(results),
        *missing(results),
        *how_to_run(),
    ]
    return "\n".join(parts) + "\n"


def disturbance(results: Results) -> list[str]:
    """What other programs took meanwhile: engines whose threads wait by spinning then lose far more than that."""
    disturbed = sum(share > QUIET for share in results.others)
    if not disturbed:
        return []
    return [
        "",
        f"**Other programs took more than {QUIET:.0%} of the processor in {disturbed} of {len(results.others)}"
        f" measurements, at most {max(results.others):.0%}: run it again on an idle machine before believing it.**",
    ]


def speeds(results: Results) -> list[str]:
    rows = [
        f"| tokens per second | {' | '.join(TITLES.values())} | of memory's bandwidth, 1 stream |",
        "|---|---|---|---|---|",
    ]
    for name in results.values:
        if not any(measure in TITLES for measure in results.values[name]):
            continue
        cells = [spread(results.values[name].get(measure)) for measure in TITLES]
        for index, measure in enumerate(TITLES):
            if measure in results.once.get(name, ()):
                cells[index] += ", once"
        shares = results.shares.get(name)
        rows.append(f"| {name} | {' | '.join(cells)} | {f'{statistics.median(shares):.0%}' if shares else '–'} |")
    return rows


def computes(results: Results) -> list[str]:
    rows = ["| computes in | weights | activations | cache | head | version |", "|---|---|---|---|---|---|"]
    for name, loaded in results.loaded.items():
        cells = [loaded[key] for key in ("weights", "activations", "cache", "head", "version")]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    chosen = {
        f"{name}, {TITLES[measure]}: {note}" for name, of in results.notes.items() for measure, note in of.items()
    }
    if chosen:
        rows += ["", "Chosen for speed before the rounds began: " + "; ".join(sorted(chosen)) + "."]
    return rows


def aims(results: Results) -> list[str]:
    rows = ["| | measured | wanted | |", "|---|---|---|---|"]
    for target in targets(results):
        value = "–" if target.value is None else f"{target.value:.2f}"
        verdict = {True: "met", False: "**missed**", None: "not measured"}[target.met]
        rows.append(f"| {target.name} | {value} | {'≤' if target.most else '≥'} {target.wanted:g} | {verdict} |")
    return rows


def others(results: Results) -> list[str]:
    lines = []
    if results.starts:
        (first, process), *rest = results.starts
        lines = [f"Loading int4 took {first:.2f} s from a disk that had not been read ({process:.2f} s of the process)"]
        if rest:
            load, process = (statistics.median(column) for column in zip(*rest, strict=True))
            lines[0] += f", and {load:.2f} s ({process:.2f} s) when it was started again"
        lines = [lines[0] + ".", ""]
    return lines


def missing(results: Results) -> list[str]:
    if not results.missing:
        return []
    return ["Not measured:", "", *(f"- {name}: `{reason}`" for name, reason in results.missing.items()), ""]


def how_to_run() -> list[str]:
    lines = [
        "## How to run",
        "",
        "`make engines`, or `python benchmarks/engines.py --help`. The first run makes the peers' environments under"
        " `build/peers` (10 minutes on two cores, 5.5 GB), and the model with its conversions under `build/engines`"
        " (9 GB); later ones use them again. Five rounds then take about half an hour on an otherwise idle machine,"
        " and it has to be idle: threads that wait by spinning, as llama.cpp's do, lose most of their speed to one busy"
        " neighbour. Each environment is",
        "",
        "```sh",
    ]
    for peer, environment in ENVIRONMENTS.items():
        variables = "".join(f"{name}='{value}' " for name, value in environment.environ.items())
        first, *rest = environment.commands()
        lines += [f"# {peer}", variables + " ".join(first), *(" ".join(command) for command in rest)]
    lines += [
        "# vllm.cpp",
        f"git clone --depth 1 {VLLM_CPP} source",
        *VLLM_CPP_BUILD,
        "```",
        "",
        "A tree of vllm.cpp that lies in `build/peers/vllm.cpp/source` is built instead of cloned. It reads no"
        " quantized Llama, and on x86 its bfloat16 products use SSE2.",
    ]
    return lines


def spread(values: list[float] | None) -> str:
    if not values:
        return "–"
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))}–{number(max(values))})"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"
