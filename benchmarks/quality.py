"""What compressing costs in quality: Penjing beside the tools that do the same, on one model and the same texts.

    python benchmarks/quality.py --calibration FILE [--model FOLDER] [--test FILE] [--only WORD …]

Every tool makes its own checkpoint, in a process and an environment of its own, from the same rows of text. All of them
are measured by one evaluator: transformers in float32 on the weights that the codes decode to, so that nothing
but weights differs. The two texts share nothing, and the test text chooses nothing. A cell that is in the results
already is not run again; --only runs those whose tool or method has that word, whether it is there or not.
Writes docs/benchmarks/quality.{json,md,svg}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import quality_report
from peers.environments import Unavailable, python_of
from penjing.stats import paired_change

ROOT = Path(__file__).parents[1]
LENGTH = 512
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRAINED = {"epochs": 4, "rate": 0.02, "codes": True, "tokens": 512, "distill": 1}
SYMMETRIC = {2: False, 3: False, 4: True, 8: True}  # with few bits every tool is better with zero points
K_QUANTS = {2: "Q2_K", 3: "Q3_K_S", 4: "Q4_K_S", 8: "Q8_0"}


@dataclass(frozen=True)
class Cell:
    """One row of the table.  task: bits, "50 %" or "50 % + 4"."""

    tool: str
    method: str
    task: str

    @property
    def bits(self) -> int:
        return {"50 %": 16, "50 % + 4": 4}.get(self.task) or int(self.task)

    @property
    def sparse(self) -> bool:
        return self.task.startswith("50 %")

    def stored(self, group: int) -> float:
        """Bits a weight: codes, steps and zero points, and for what is sparse one bit of a mask a weight."""
        codes = self.bits / 2 + 1 if self.sparse else self.bits
        if self.bits == 16:
            return codes
        zero = 16 if self.tool == "hqq" else 0 if SYMMETRIC[self.bits] else self.bits
        return codes + (16 + zero) / group


def cells() -> Iterator[Cell]:
    """All rows; the first of Penjing's for each task is what the preset balanced does, which the targets are about."""
    for bits in map(str, SYMMETRIC):
        methods = ("gptq, trained", "gptq") if int(bits) <= 3 else ("gptq", "gptq, trained")
        for method in (*methods, "hqq"):
            yield Cell("penjing", method, bits)
        for method in ("rtn", "gptq", "gptq, mse", "awq"):
            yield Cell("llm-compressor", method, bits)
        yield Cell("gptqmodel", "gptq", bits)
        yield Cell("auto-round", "autoround", bits)
        yield Cell("hqq", "hqq", bits)
        yield Cell("torchao", "rtn", bits)
        yield Cell("llama.cpp", K_QUANTS[int(bits)], bits)
    for method in ("gradual, trained", "gradual"):
        yield Cell("penjing", method, "50 %")
    yield Cell("llm-compressor", "sparsegpt", "50 %")
    yield Cell("llm-compressor", "wanda", "50 %")
    yield Cell("penjing", "joint, trained", "50 % + 4")
    yield Cell("penjing", "joint", "50 % + 4")
    yield Cell("llm-compressor", "sparsegpt+gptq", "50 % + 4")


def recipe(cell: Cell, group: int) -> dict[str, Any]:
    """What `penjing compress --recipe` is given: methods with their default options; "trained": blocks too."""
    rule: dict[str, Any] = {"targets": "*"}
    method, _, trained = cell.method.partition(", ")
    words = method.split("+")
    if cell.sparse:
        rule["prune"] = {"method": words[0], "sparsity": 0.5}
    if cell.bits < 16:
        grid = {"bits": cell.bits, "group_size": group, "symmetric": SYMMETRIC[cell.bits]}
        rule["quantize"] = {"method": words[-1], **grid}
    return {"version": 1, "rules": [rule], "recover": TRAINED if trained else None}


class Made:
    """Checkpoints of all cells, under one folder."""

    def __init__(self, given: argparse.Namespace, text: Path) -> None:
        self.given, self.text = given, text

    def command(self, cell: Cell, output: Path) -> list[str]:
        if cell.tool == "penjing":
            file = output.with_suffix(".json")
            file.write_text(json.dumps(recipe(cell, self.given.group)))
            words = [sys.executable, "-m", "penjing", "compress", str(self.given.model), "-o", str(output)]
            words += ["--recipe", str(file), "--restart", "--calibration", str(self.text)]
            return [*words, "--samples", str(self.given.rows), "--sequence-length", str(LENGTH)]
        driver = Path(__file__).parent / "peers" / f"quality_{cell.tool.replace('-', '').replace('.', '')}.py"
        job = {
            "model": str(self.given.model),
            "text": str(self.text),
            "rows": self.given.rows,
            "length": LENGTH,
            "output": str(output),
            "method": cell.method,
            "bits": cell.bits,
            "group": self.given.group,
            "symmetric": SYMMETRIC.get(cell.bits, True),
        }
        return [python_of(cell.tool, self.given.peers), str(driver), json.dumps(job)]

    def run(self, cell: Cell) -> tuple[Path, dict[str, Any]]:
        """The folder, and seconds and peak memory of the whole process. Raises Unavailable."""
        output = self.given.work / " ".join(dataclasses.astuple(cell))
        command = self.command(cell, output)
        start = time.perf_counter()
        with open(self.given.work / "log", "w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            if process.returncode:
                raise Unavailable((log.read().strip() or f"exit code {process.returncode}").splitlines()[-1])
        measured = {"seconds": time.perf_counter() - start, "peak_rss_bytes": usage.ru_maxrss * 1024, "device": DEVICE}
        about = output / "about.json"
        return output, measured | (json.loads(about.read_text()) if about.exists() else {})


class Evaluator:
    """Losses of next tokens on windows of the test text, and the distance to the model as it was."""

    def __init__(self, model: Path, text: Path, windows: int) -> None:
        self.model = model
        tokens = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8")).input_ids
        windows = min(windows, len(tokens) // LENGTH)
        self.rows = torch.tensor(tokens[: windows * LENGTH]).reshape(windows, LENGTH)
        net = self.load(model)
        self.base = [self.scores(net, row) for row in self.rows.split(4)]
        self.losses = np.concatenate(
            [self.loss(base, row) for base, row in zip(self.base, self.rows.split(4), strict=True)]
        )

    def load(self, folder: Path) -> Any:
        """A model in float32 with the weights that are stored."""
        if (folder / "weights.npz").exists():
            net = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
            for name, values in np.load(folder / "weights.npz").items():
                net.get_parameter(name).data = torch.from_numpy(values)
            return net
        packed = "quantization_config" in json.loads((folder / "config.json").read_text())
        how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)

    @staticmethod
    def scores(net: Any, rows: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(net.to(DEVICE)(rows.to(DEVICE)).logits[:, :-1], -1).cpu()

    @staticmethod
    def loss(scores: torch.Tensor, rows: torch.Tensor) -> np.ndarray:
        """(windows,) means over their tokens."""
        return -scores.gather(-1, rows[:, 1:, None]).mean((1, 2)).double().numpy()

    def measure(self, folder: Path) -> dict[str, Any]:
        net, losses, kl, same = self.load(folder), [], [], []
        for base, rows in zip(self.base, self.rows.split(4), strict=True):
            scores, before = self.scores(net, rows), base
            losses.append(self.loss(scores, rows))
            kl.append((before.exp() * (before - scores)).sum(-1).mean().item() * len(rows))
            same.append((before.argmax(-1) == scores.argmax(-1)).float().mean().item() * len(rows))
        after = np.concatenate(losses)
        change = paired_change(self.losses, after)
        return {
            "perplexity": float(np.exp(after.mean())),
            "loss_change": change.mean,
            "loss_change_ci95": [change.low, change.high],
            "kl": sum(kl) / len(self.rows),
            "top1_agreement": sum(same) / len(self.rows),
        }


def calibration(given: argparse.Namespace) -> Path:
    """The first rows of the calibration text in a file of their own, and beside it the mean squares of inputs."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokens = tokenizer(given.calibration.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    used = given.rows * LENGTH
    if len(tokens) < used + LENGTH:
        raise SystemExit(f"{given.calibration}: {len(tokens)} tokens; {used + LENGTH} are needed")
    file = given.work / "calibration.txt"
    file.write_text(tokenizer.decode(tokens[: used + 8]), encoding="utf-8")
    net, sums = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32), {}
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":

            def see(_: Any, seen: Any, key: str = f"{name}.weight") -> None:
                sums[key] = sums.get(key, 0) + seen[0].flatten(0, -2).square().sum(0)

            layer.register_forward_pre_hook(see)
    with torch.inference_mode():
        for rows in torch.tensor(tokens[:used]).reshape(-1, LENGTH).split(4):
            net(rows)
    np.savez(f"{file}.npz", **{name: (values / used).numpy() for name, values in sums.items()})
    return file


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "novelist")
    parser.add_argument("--calibration", type=Path, required=True, help="text of the training kind")
    parser.add_argument("--test", type=Path, default=ROOT / "examples" / "novelist" / "evaluation.txt")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128, help=f"of {LENGTH} tokens, to calibrate on")
    parser.add_argument("--windows", type=int, default=96, help=f"of {LENGTH} tokens, to measure on")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="where environments are made")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "quality")
    return parser.parse_args()


def main() -> None:
    given = read_arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    file = given.output.with_suffix(".json")
    settings = {
        "model": given.model.name,
        "group": given.group,
        "rows": given.rows,
        "windows": given.windows,
        "calibration": given.calibration.name,
        "test": given.test.name,
    }
    report = json.loads(file.read_text()) if file.exists() else {}
    if report.get("settings") != settings:
        report = {"settings": settings, "rows": []}
    made, evaluator = Made(given, calibration(given)), Evaluator(given.model, given.test, given.windows)
    report["base_perplexity"] = float(np.exp(evaluator.losses.mean()))
    done = {(row["tool"], row["method"], row["task"]): row for row in report["rows"]}
    for cell in cells():
        key = dataclasses.astuple(cell)
        wanted = any(word in (*key, " ".join(key)) for word in given.only)
        if not (wanted if given.only else key not in done):
            continue
        row: dict[str, Any] = dataclasses.asdict(cell) | {"bits_per_weight": cell.stored(given.group)}
        try:
            folder, measured = made.run(cell)
            row |= measured | evaluator.measure(folder)
        except Unavailable as reason:
            row["reason"] = str(reason)
        print(json.dumps(row), flush=True)
        done[key] = row
        report["rows"] = [done[key] for key in map(dataclasses.astuple, cells()) if key in done]
        file.write_text(json.dumps(report, indent=1) + "\n")
    quality_report.write(report, given.output)


if __name__ == "__main__":
    main()
