"""A fuzz target for the loader: damaged model folders must be refused in one line, or compute.

    python tests/fuzz_loader.py [--seconds 60] [--seed 0] [--cases N]

Each case damages a small model (flipped bytes, cut files, config and header values replaced), loads it as the server
does and writes three tokens. A `PenjingError` is right, and so is a text; anything else, a crash included, is a bug:
the case is printed as it starts, so that the last one named is the one that ended the process.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import penjing
from penjing.engine.messages import Load, Request, SamplingParams
from penjing.engine.process import load
from penjing.errors import PenjingError
from tiny_llama import make_model

RECIPES = (None, "int4", "int8", "w8a8", "int4-sparse50")
VALUES: tuple[Any, ...] = (
    None,
    0,
    -1,
    1,
    2,
    3,
    7,
    2**31,
    2**63,
    1e308,
    -0.5,
    True,
    "",
    "llama",
    [],
    {},
    [1, 2],
    "F32",
    "BF16",
)


def seeds_for(folder: Path) -> list[Path]:
    """The whole models that are damaged: one plain, one of each kind of storage."""
    made = [make_model(folder / "plain")]
    for recipe in RECIPES[1:]:
        group = {} if recipe in ("int8", "w8a8") else {"group_size": 32}
        penjing.compress(made[0], folder / str(recipe), recipe, **group)
        made.append(folder / str(recipe))
    return made


def damage(folder: Path, rng: random.Random) -> str:
    """Change one thing in a folder; says what."""
    weights = sorted(folder.glob("*.safetensors"))
    kind = rng.choice(["config", "header", "flip", "cut", "grow", "index"])
    if kind == "config":
        path = folder / "config.json"
        values = json.loads(path.read_text())
        return _write_json(path, values, _replace_one(values, rng))
    if kind == "index" and (folder / "model.safetensors.index.json").exists():
        path = folder / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        return _write_json(path, values, _replace_one(values, rng))
    path = rng.choice(weights)
    raw = bytearray(path.read_bytes())
    length = struct.unpack("<Q", raw[:8])[0]
    if kind == "header":
        header = json.loads(raw[8 : 8 + length])
        what = _replace_one(header, rng)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
        return f"{path.name}: header {what}"
    if kind == "cut":
        size = rng.randrange(len(raw))
        path.write_bytes(raw[:size])
        return f"{path.name}: cut to {size} bytes"
    if kind == "grow":
        path.write_bytes(raw + bytes(rng.randrange(1, 100)))
        return f"{path.name}: grown"
    places = [rng.randrange(len(raw)) for _ in range(rng.choice([1, 1, 4, 64]))]
    for place in places:
        raw[place] = rng.randrange(256)
    path.write_bytes(raw)
    return f"{path.name}: bytes {places[:4]} changed"


def _write_json(path: Path, values: Any, what: str) -> str:
    path.write_text(json.dumps(values))
    return f"{path.name}: {what}"


def _replace_one(values: Any, rng: random.Random) -> str:
    """Replace, remove or rename one entry somewhere in a tree of JSON."""
    holders: list[Any] = []

    def collect(node: Any) -> None:
        if isinstance(node, dict | list) and node:
            holders.append(node)
            for child in node.values() if isinstance(node, dict) else node:
                collect(child)

    collect(values)
    holder = rng.choice(holders)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    action = rng.choice(["replace", "replace", "replace", "remove", "rename"])
    if action == "replace" or not isinstance(holder, dict):
        holder[key] = rng.choice(VALUES)
        return f"{key} = {holder[key]!r}"
    value = holder.pop(key)
    if action == "rename":
        holder[f"{key}_"] = value
    return f"{key} {action}d"


def attempt(folder: Path) -> str:
    """Load the folder and write three tokens: "text", or the error's class. Anything unexpected is raised."""
    settings = Load(folder=str(folder), memory_budget=1 << 30, max_model_len=None, max_num_seqs=1, threads=1)
    try:
        engine, _ = load(settings)
        request = Request("fuzz", [1, 2, 3], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
        for event in engine.run(request):
            if event.error:
                return "refused while computing"
    except PenjingError as error:
        if "\n" in str(error):
            raise AssertionError(f"an error of more than one line: {error}") from error
        return type(error).__name__
    return "text"


def run(seed: int, seconds: float, cases: int, *, say: bool = True) -> dict[str, int]:
    """How often each outcome came."""
    outcomes: dict[str, int] = {}
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        wholes = seeds_for(Path(scratch))
        until, damaged = time.monotonic() + seconds, Path(scratch) / "damaged"
        for case in range(cases):
            if time.monotonic() > until:
                break
            whole = rng.choice(wholes)
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(whole, damaged)
            what = damage(damaged, rng)
            if say:
                print(f"case {case}: {whole.name}: {what}", flush=True)
            outcome = attempt(damaged)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1 << 30)
    arguments = parser.parse_args()
    print(run(arguments.seed, arguments.seconds, arguments.cases))


if __name__ == "__main__":
    main()
