"""From a checkpoint to a draft to a conversation, by the commands that the documents name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from penjing.engine.messages import Load
from penjing.engine.process import load
from penjing.errors import BadInput

NOVELIST = Path(__file__).parents[2] / "examples" / "novelist"


def penjing(*arguments: object, said: str = "") -> str:
    program = [sys.executable, "-m", "penjing", *map(str, arguments)]
    return subprocess.run(program, input=said, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's matrices, rounded to nearest, which is quicker to make."""
    folder = tmp_path_factory.mktemp("self") / "draft"
    penjing("compress", NOVELIST, "-o", folder, "--recipe", "draft", "--method", "rtn", "--check", "none")
    return folder


def test_a_compressed_copy_drafts_and_the_text_stays_the_same(draft: Path) -> None:
    assert sum(file.stat().st_size for file in draft.glob("*.safetensors")) < 5 << 20  # of 21 MiB: nothing is left out
    talk = ("chat", NOVELIST, "--temperature", 0, "--max-tokens", 60, "--json")
    texts = [penjing(*talk, *more, said="It was a dark night") for more in ((), ("--draft", draft))]
    first, second = (json.loads(text) for text in texts)
    assert first == second


def test_both_caches_are_in_the_budget(draft: Path) -> None:
    settings = Load(folder=str(NOVELIST), max_num_seqs=2, memory_budget=240 << 20)
    _, alone = load(settings)
    engine, both = load(msgspec.structs.replace(settings, speculative=str(draft)))
    assert engine.speculation is not None
    assert both.block_bytes == 2 * alone.block_bytes
    assert both.weights_bytes > alone.weights_bytes
    assert both.weights_bytes + both.blocks * both.block_bytes < 240 << 20


def test_a_draft_of_another_tokenizer_is_refused(draft: Path, tmp_path: Path) -> None:
    other = shutil.copytree(draft, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BadInput, match=r"its tokenizer is not that of .*; a draft is a smaller copy") as caught:
        load(Load(folder=str(NOVELIST), speculative=str(other)))
    assert "\n" not in str(caught.value)
