"""A fuzz target for the loader: damaged models must be refused in one line, or compute.

    python tests/fuzz_loader.py [--seconds 60] [--seed 0] [--cases N]

Each case damages a small model (a folder, a GGUF file, or its file of packed weights: flipped bytes, cut files, values
of config and headers replaced, huge counts, nesting without end), loads it as the server does and writes three tokens.
A `PenjingError` is right, and so is a text; anything else, a crash or memory without bound included, is a bug: the case
is printed as it starts, so that the last one named is the one that ended the process. Packed weights that are damaged
are made anew: with them the text is the right one, unless the damage was given a checksum that fits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np

import penjing
from packing import packed_llama
from penjing.checkpoint.gguf.file import GgufFile, Written, write_gguf
from penjing.engine.messages import Load, Request, SamplingParams
from penjing.engine.process import load
from penjing.errors import PenjingError
from penjing.export import export
from penjing.kernels import checksum
from penjing.models import cache
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
    2**63 - 1,
    -(2**63),
    10**30,
    1e308,
    float("nan"),
    -0.5,
    True,
    "",
    "llama",
    [],
    {},
    [1, 2],
    "F32",
    "BF16",
    "two\nlines",
)
KEYS: tuple[Any, ...] = (
    *(0, 1, 3, 7, 2**31, 2**32 - 1, True, "", "llama", 1e30, -0.5, float("nan")),
    *(np.int32(-1), np.uint64(2**64 - 1), np.int64(-(2**63)), np.array([], np.int32), np.array([1, 2], np.int32)),
    *(np.array([5] * 3, np.uint32), ["a", "b"], []),
)  # all that a GGUF key can be
NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1)
MOST_MEMORY = 2 << 30  # bytes of address space that a small model may take beyond what the process has


def seeds_for(folder: Path) -> list[Path]:
    """The whole models that are damaged: one plain, one of each kind of storage."""
    made = [make_model(folder / "plain")]
    for recipe in RECIPES[1:]:
        group = {} if recipe in ("int8", "w8a8") else {"group_size": 32}
        penjing.compress(made[0], folder / str(recipe), recipe, **group)
        made.append(folder / str(recipe))
    for source, kind in ((made[0], "f16"), (made[1], "q4_0")):
        silent = folder / "silent"  # without a tokenizer
        shutil.copytree(source, silent)
        (silent / "tokenizer.json").unlink()
        made.append(folder / kind / "model.gguf")
        made[-1].parent.mkdir()
        export(silent, made[-1], "gguf", kind)
        shutil.rmtree(silent)
    return [*made, *(packed_llama(folder / method, method)[0] for method in ("gptq", "awq"))]


def damage(folder: Path, rng: random.Random) -> str:
    """Change one thing in a folder; says what."""
    weights = sorted(folder.glob("*.safetensors"))
    kind = rng.choice(["config", "header", "flip", "cut", "grow", "index", "nest", "number"])
    if kind == "nest":
        path = rng.choice([*folder.glob("*.json"), weights[0]])
        text = rng.choice([b"[", b'{"a":']) * 200_000
        path.write_bytes(struct.pack("<Q", len(text)) + text if path == weights[0] else text)
        return f"{path.name}: nested without end"
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
    return damage_bytes(path, raw, 8, rng, kind)


def damage_bytes(path: Path, raw: bytearray, head: int, rng: random.Random, kind: str = "") -> str:
    """Cut, lengthen or change a file of these bytes, one time in two among the first ``head``; says what."""
    kind = kind or rng.choice(["flip", "flip", "number", "number", "cut", "grow"])
    until = rng.choice([min(head, len(raw)), len(raw)])
    if kind == "cut":
        size = rng.randrange(until)
        path.write_bytes(raw[:size])
        return f"{path.name}: cut to {size} bytes"
    if kind == "grow":
        path.write_bytes(raw + bytes(rng.randrange(1, 100)))
        return f"{path.name}: grown"
    if kind == "number":
        place, number, size = rng.randrange(until), rng.choice(NUMBERS), rng.choice([4, 8])
        raw[place : place + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
        path.write_bytes(raw)
        return f"{path.name}: {number} at byte {place}"
    places = [rng.randrange(until) for _ in range(rng.choice([1, 1, 4, 64]))]
    for place in places:
        raw[place] = rng.randrange(256)
    path.write_bytes(raw)
    return f"{path.name}: bytes {places[:4]} changed"


def damage_keys(path: Path, whole: Path, rng: random.Random) -> str:
    """Write a GGUF file again with one key or one tensor changed; says what."""
    with GgufFile(whole) as file:
        keys, tensors = (
            dict(file.metadata),
            [Written(each.name, each.kind, each.shape, [file.read(each.name)]) for each in file.tensors.values()],
        )
    if rng.random() < 0.7:
        key = rng.choice(list(keys))
        value = rng.choice([None, *KEYS])
        keys = {name: each for name, each in keys.items() if name != key} | ({} if value is None else {key: value})
        what = f"key {key} = {value!r}"
    else:
        at, name = rng.randrange(len(tensors)), rng.choice([tensors[0].name, "rope_freqs.weight", "blk.0.odd.weight"])
        if rng.random() < 0.5:
            name = rng.choice([tensors[at].name, "rope_factors_short.weight"])
            shape = rng.choice([tensors[at].shape[::-1], (*tensors[at].shape, 1), tensors[at].shape[-1:]])
            size = math.prod(shape[:-1]) * tensors[at].kind.row_bytes(shape[-1])
            tensors[at] = Written(name, tensors[at].kind, shape, [np.zeros(size, np.uint8)])
        else:
            tensors[at] = dataclasses.replace(tensors[at], name=name)
        what = f"tensor {at} is {tensors[at].name} {tensors[at].shape}"
    write_gguf(path, keys, tensors)
    return f"{path.name}: {what}"


def damage_packed(path: Path, whole: bytes, rng: random.Random) -> tuple[str, bool]:
    """Damage a file of packed weights; says what, and whether a checksum then gives it away."""
    raw, end = bytearray(whole), cache._END.size
    if rng.random() < 0.4:
        return damage_bytes(path, raw, len(raw), rng), True
    magic, form, nothing, start, length, _ = cache._END.unpack(raw[-end:])
    index = json.loads(raw[start : start + length])
    if rng.random() < 0.5:
        what = f"index {_replace_one(index, rng)}"
    else:
        section = rng.choice(index["sections"])
        place, number = section[1] + 8 * rng.randrange(16), rng.choice(NUMBERS)
        raw[place : place + 8] = number.to_bytes(8, "little")
        section[3] = checksum(bytes(raw[section[1] : section[1] + section[2]]))
        what = f"{section[0]}: {number} at byte {place - section[1]} of its header"
    body = json.dumps(index).encode()
    path.write_bytes(
        bytes(raw[:start]) + body + cache._END.pack(magic, form, nothing, start, len(body), checksum(body))
    )
    return f"{path.name}: {what}", False


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


def attempt(model: Path, packed: bool = False) -> tuple[str, list[int]]:
    """Load a model and write three tokens: "text" and they, or the error's class. Anything unexpected is raised."""
    settings = Load(folder=str(model), memory_budget=1 << 30, max_num_seqs=1, threads=1, weight_cache=packed)
    tokens: list[int] = []
    try:
        engine, _ = load(settings)
        request = Request("fuzz", [1, 2, 3], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
        for event in engine.run(request):
            if event.error:
                return "refused while computing", tokens
            tokens += event.tokens
    except PenjingError as error:
        if "\n" in str(error):
            raise AssertionError(f"an error of more than one line: {error}") from error
        return type(error).__name__, tokens
    return "text", tokens


def attempt_packed(model: Path, rng: random.Random, say: Callable[[str], None]) -> str:
    """Load a whole model whose file of packed weights is damaged: it computes all the same."""
    folder = cache.cache_folder()
    shutil.rmtree(folder, ignore_errors=True)
    right = attempt(model, packed=True)
    (file,) = folder.iterdir()
    what, seen = damage_packed(file, file.read_bytes(), rng)
    say(what)
    found = attempt(model, packed=True)
    if found[0] != "text" or (seen and found != right):
        raise AssertionError(f"{what}: {found}, and {right} with the file as it was")
    return "text in spite of the packed weights"


def run(seed: int, seconds: float, cases: int, *, say: bool = True) -> dict[str, int]:
    """How often each outcome came."""
    outcomes: dict[str, int] = {}
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        wholes = seeds_for(Path(scratch))
        os.environ["PENJING_CACHE"], cache.SMALLEST = f"{scratch}/cache", 0
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MOST_MEMORY, resource.RLIM_INFINITY))
        until, damaged = time.monotonic() + seconds, Path(scratch) / "damaged"
        for case in range(cases):
            if time.monotonic() > until:
                break
            whole = rng.choice(wholes)

            def named(what: str, start: str = f"case {case}: {whole.parent.name}/{whole.name}: ") -> None:
                if say:
                    print(start + what, flush=True)

            if rng.random() < 0.2:
                outcome = attempt_packed(whole, rng, named)
            else:
                outcome = attempt(damaged_copy(whole, damaged, rng, named))[0]
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def damaged_copy(whole: Path, place: Path, rng: random.Random, say: Callable[[str], None]) -> Path:
    """A damaged copy of a model at ``place``, or in it."""
    shutil.rmtree(place, ignore_errors=True)
    if whole.is_dir():
        shutil.copytree(whole, place)
        say(damage(place, rng))
        return place
    place.mkdir()
    raw = bytearray(whole.read_bytes())
    if rng.random() < 0.5:
        say(damage_keys(place / whole.name, whole, rng))
    else:
        say(damage_bytes(place / whole.name, raw, raw.find(b"output_norm") + 3000, rng))
    return place / whole.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1 << 30)
    arguments = parser.parse_args()
    print(run(arguments.seed, arguments.seconds, arguments.cases))


if __name__ == "__main__":
    main()
