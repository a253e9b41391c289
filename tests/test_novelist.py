"""The script that trains the demo model: its preparation of texts, and a trial run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

NOVELIST = Path(__file__).parents[1] / "examples" / "novelist"

EDITION = (
    "\ufeffThe Project Gutenberg EBook of Example\r\n\r\n*** START OF THIS PROJECT GUTENBERG EBOOK EXAMPLE ***\r\n\r\n"
    "“Well,” said he,\r\n‘it is—_so_.’\r\n\r\n\r\nSecond   paragraph.\r\n\r\n"
    "*** END OF THIS PROJECT GUTENBERG EBOOK EXAMPLE ***\r\nlicence\r\n"
)


@pytest.fixture(scope="module")
def train() -> ModuleType:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("novelist_train", NOVELIST / "train.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_edition_becomes_plain_paragraphs(train: ModuleType) -> None:
    assert train.prepare(EDITION) == "\"Well,\" said he, 'it is--so.'\n\nSecond paragraph."


def test_the_evaluation_text_is_prepared_already(train: ModuleType) -> None:
    text = train.read(NOVELIST / "evaluation.txt")
    assert train.prepare(text) == text.strip()


def test_older_editions_are_latin_1(train: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "old.txt"
    file.write_bytes("café".encode("latin-1"))
    assert train.read(file) == "café"


def test_the_rate_warms_up_stays_and_falls_to_two_percent(train: ModuleType) -> None:
    assert train.rate(0, 1000) == pytest.approx(0.01)
    assert train.rate(99, 1000) == train.rate(500, 1000) == 1
    assert train.rate(750, 1000) == pytest.approx(0.51)
    assert train.rate(1000, 1000) == pytest.approx(0.02)


@pytest.mark.slow
def test_a_trial_run_learns_and_can_be_inspected(tmp_path: Path) -> None:
    text = NOVELIST / "evaluation.txt"
    small = [
        "--steps",
        "60",
        "--width",
        "64",
        "--layers",
        "1",
        "--vocabulary",
        "512",
        "--batch",
        "8",
        "--sequence",
        "64",
    ]
    program = [sys.executable, NOVELIST / "train.py", text, "--evaluation", text, "--output", tmp_path, *small]
    answer = subprocess.run(program, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout.split()[-1]) < 5.5  # ln 512 = 6.24 before the first step
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 512
    command = [sys.executable, "-m", "penjing", "inspect", tmp_path, "--json"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(answer.stdout)["family"] == "llama", answer.stderr
