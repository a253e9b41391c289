"""Damaged models meet every command, as a process of its own: one line that names the tensor, exit status 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import penjing
from penjing.checkpoint.safetensors import read_safetensors, write_safetensors
from tiny_llama import make_model

EVALUATION = Path(__file__).parents[1] / "examples" / "novelist" / "evaluation.txt"
UP, SECOND = "model.layers.1.mlp.up_proj", "model-00002-of-00002.safetensors"
Spoil = Callable[[Path], None]


def _changed(name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Spoil:
    """Another tensor in place of one, or none."""

    def spoil(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            tensors, _ = read_safetensors(file)
            if name in tensors:
                made = change(tensors.pop(name))
                write_safetensors(file, tensors if made is None else tensors | {name: made})
                if made is None and (index := folder / "model.safetensors.index.json").exists():
                    places = json.loads(index.read_text())
                    del places["weight_map"][name]
                    index.write_text(json.dumps(places))

    return spoil


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[array.size // 2] = value
        return array

    return put


def _config(**values: object) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return spoil


def _cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])


PLAIN: dict[str, tuple[Spoil, str]] = {
    "missing": (_changed(f"{UP}.weight", lambda _: None), f"tensor {UP}.weight is missing"),
    "shape": (_changed(f"{UP}.weight", lambda a: a[:-1]), f"tensor {UP}.weight has shape (95, 64), config.json calls"),
    "dtype": (_changed(f"{UP}.weight", lambda a: a.astype(np.int32)), f"tensor {UP}.weight has dtype int32; float32"),
    "norm's dtype": (_changed("model.norm.weight", lambda a: a.astype(np.int8)), "tensor model.norm.weight has dtype"),
    "truncated": (_cut, "truncated: tensor"),
    "NaN": (_changed(f"{UP}.weight", _with(np.nan)), f"tensor {UP}.weight has a NaN or an infinity"),
    "infinite norm": (_changed("model.norm.weight", _with(np.inf)), "tensor model.norm.weight has a NaN or an inf"),
    "infinite embedding": (
        _changed("model.embed_tokens.weight", _with(-np.inf)),
        "tensor model.embed_tokens.weight has a NaN or an infinity",
    ),
    "hidden size": (
        _config(hidden_size=128, head_dim=16),
        "tensor model.embed_tokens.weight has shape (50, 64), config.json calls for (50, 128)",
    ),
    "heads": (_config(num_attention_heads=5), "num_key_value_heads = 2, expected a divisor of num_attention_heads"),
    "head size": (_config(num_attention_heads=6), "num_attention_heads = 6, expected a divisor of hidden_size = 64"),
    "vocabulary": (
        _config(vocab_size=51),
        "tensor model.embed_tokens.weight has shape (50, 64), config.json calls for (51, 64)",
    ),
    "too many layers": (_config(num_hidden_layers=4), "tensor model.layers.3."),
    "too few layers": (_config(num_hidden_layers=2), "beyond the layers that config.json calls for"),
}
COMPRESSED: dict[str, tuple[Spoil, str]] = {
    "no codes": (_changed(f"{UP}.weight_packed", lambda _: None), f"tensor {UP}.weight_packed is missing"),
    "no steps": (_changed(f"{UP}.weight_scale", lambda _: None), f"tensor {UP}.weight_scale is missing"),
    "codes' shape": (_changed(f"{UP}.weight_packed", lambda a: a[:, 1:]), f"tensor {UP}.weight_packed has shape"),
    "codes' dtype": (_changed(f"{UP}.weight_packed", lambda a: a.view(np.uint32)), f"{UP}.weight_packed has dtype"),
    "steps' shape": (_changed(f"{UP}.weight_scale", lambda a: a[1:]), f"tensor {UP}.weight_scale has shape (95, 2)"),
    "another shape": (_changed(f"{UP}.weight_shape", lambda a: a + 1), f"tensor {UP}.weight has shape (97, 65)"),
    "NaN step": (_changed(f"{UP}.weight_scale", _with(np.nan)), f"tensor {UP}.weight_scale has a NaN"),
}
COMMANDS: dict[str, list[str]] = {
    "serve": ["--port", "0"],
    "chat": [],
    "bench": ["--runs", "1"],
    "evaluate": ["--data", str(EVALUATION), "--context-length", "8", "--max-tokens", "20"],
    "compress": ["-o", "OUT", "--bits", "4", "--group-size", "32"],
}


def refused(command: str, folder: Path, message: str) -> None:
    arguments = [str(folder.parent / "never") if word == "OUT" else word for word in COMMANDS[command]]
    program = [sys.executable, "-m", "penjing", command, str(folder), *arguments]
    ended = subprocess.run(program, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    said = [line for line in ended.stderr.splitlines() if not line.startswith("memory: ")]
    assert ended.returncode == 2, ended.stderr
    assert len(said) == 1, ended.stderr
    assert message in said[0]
    assert not (folder.parent / "never" / "config.json").exists()


# Serving meets every case; the other commands read models the same way, and meet them all when there is time.
OTHERS = [command for command in COMMANDS if command != "serve"]
CASES = [
    pytest.param(case, command, marks=() if command in ("serve", OTHERS[number % 4]) else pytest.mark.slow)
    for number, case in enumerate(PLAIN)
    for command in COMMANDS
]


@pytest.mark.parametrize(("case", "command"), CASES)
def test_a_damaged_model_is_refused_in_one_line(case: str, command: str, tmp_path: Path) -> None:
    spoil, message = PLAIN[case]
    spoil(make_model(tmp_path / "model"))
    with_tokenizer(tmp_path / "model")
    refused(command, tmp_path / "model", message)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("whole")
    with_tokenizer(make_model(scratch / "plain"))
    penjing.compress(scratch / "plain", scratch / "small", "int4", group_size=32)
    return scratch / "small"


@pytest.mark.parametrize("case", COMPRESSED)
def test_a_damaged_artifact_is_refused_in_one_line(case: str, small: Path, tmp_path: Path) -> None:
    spoil, message = COMPRESSED[case]
    shutil.copytree(small, tmp_path / "model")
    spoil(tmp_path / "model")
    refused("serve", tmp_path / "model", message)


def with_tokenizer(folder: Path) -> None:
    """Fifty words, so that text for `evaluate` can be read."""
    words = {f"w{number}": number for number in range(50)}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
