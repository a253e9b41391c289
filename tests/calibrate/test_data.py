"""Calibration text from every kind of file, against the tokens worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrate_models import make
from penjing.calibrate import Calibration, read_tokens
from penjing.errors import BadInput

TEMPLATE = "{% for message in messages %}w1 {{ message['content'] }} w2 {% endfor %}"
CHAT = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}]
TURNS = [{"from": "human", "value": "w7 w8"}, {"from": "gpt", "value": "w9"}]
RENDERED = [1, 7, 8, 2, 1, 9, 2]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    make(tmp_path / "model", "llama")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return tmp_path


def tokens_of(work: Path, *files: str, samples: int = 1, length: int = 7, seed: int = 0) -> list[list[int]]:
    calibration = Calibration(tuple(work / name for name in files), samples, length, seed)
    rows: list[list[int]] = read_tokens(calibration, work / "model", 64, 97).tolist()
    return rows


def write_parquet(file: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), file)


def test_chats_go_through_the_models_template(work: Path) -> None:
    (work / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (work / "list.json").write_text(json.dumps([{"conversations": TURNS}]))
    write_parquet(work / "chat.parquet", {"messages": [CHAT], "other": [3]})
    for name in ("chat.jsonl", "list.json", "chat.parquet"):
        assert tokens_of(work, name) == [RENDERED], name


def test_texts_of_any_kind_of_file_are_the_same(work: Path) -> None:
    words = "w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16"
    (work / "text.txt").write_text(words, encoding="utf-8-sig")
    (work / "text.jsonl").write_text(json.dumps({"text": words}))
    write_parquet(work / "text.parquet", {"text": [words]})
    for name in ("text.txt", "text.jsonl", "text.parquet"):
        assert tokens_of(work, name, samples=2) == [list(range(3, 10)), list(range(10, 17))], name


def test_several_files_are_mixed_by_seed(work: Path) -> None:
    for name, word in (("a", "w5"), ("b", "w6")):
        (work / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{word} " * 7}) for _ in range(40)))
    first, again, other = (tokens_of(work, "a.jsonl", "b.jsonl", samples=20, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    share = np.mean([row[0] == 5 for row in first])
    assert 0.2 < share < 0.8  # of texts in equal numbers, however they lie in the files


WRONG: dict[str, tuple[str, bytes, str]] = {
    "a line that is no JSON": ("x.jsonl", b'{"text": "w3"}\n{"text"', "line 2: not JSON"),
    "a line without text": ("x.jsonl", b'{"text": "w3"}\n{"body": 1}', "line 2: needs 'text', or 'messages'"),
    "no list": ("x.json", b'[{"text": "w3"}', "not JSON"),
    "no parquet": ("x.parquet", b"PAR1", "not parquet"),
    "no token of the model": ("x.txt", b"w3 " * 7, "beyond the model's vocabulary of 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_its_place(case: str, work: Path) -> None:
    name, raw, message = WRONG[case]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (work / name).write_bytes(raw)
    with pytest.raises(BadInput, match=message) as caught:
        read_tokens(Calibration((work / name,), 1, 7), work / "model", 64, 3)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_chats_without_a_template_are_refused_by_name(work: Path) -> None:
    (work / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        (work / "model" / file).unlink(missing_ok=True)
    with pytest.raises(BadInput, match=r"chat\.jsonl: chats need the model's chat template"):
        tokens_of(work, "chat.jsonl")
