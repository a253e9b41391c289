"""A family without a description as a real process: the same service, and a line that says it is slower."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from conftest import NOVELIST, command, environment, running
from penjing.compress import compress
from tiny_graphs import make_graph

pytest.importorskip("torch")
pytest.importorskip("transformers")
SLOWER = "model_type 'opt' has no description: computed by transformers' graph with Penjing's kernels, slower"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph")
    make_graph(path / "opt", "opt", vocab_size=4096, max_position_embeddings=128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / "opt" / name).write_bytes((NOVELIST / name).read_bytes())
    compress(path / "opt", path / "small", bits=4, group_size=16)
    return path / "small"


def program(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), input=text, capture_output=True, text=True, env=environment(), timeout=120
    )


def test_serve_streams_seeds_and_cancels(folder: Path) -> None:
    with running("--max-num-seqs", 2, "--threads", 1, model=folder) as server, server.client() as client:
        assert sum(SLOWER in line for line in server.lines) == 1
        asked = {"model": "small", "prompt": "The old man", "max_tokens": 12, "seed": 3}
        whole = client.completions.create(**asked)
        pieces = [each.choices[0].text for each in client.completions.create(**asked, stream=True)]
        assert "".join(pieces) == whole.choices[0].text
        assert whole.usage.completion_tokens == 12
        with client.completions.create(**{**asked, "max_tokens": 100}, stream=True) as cancelled:
            next(iter(cancelled))
        server.wait_idle()
        chat = client.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "Hello"}], max_tokens=3
        )
        assert chat.usage.completion_tokens == 3


def test_chat_and_bench(folder: Path) -> None:
    said = program("chat", folder, "--temperature", 0, "--max-tokens", 5, text="It was\n")
    assert (said.returncode, SLOWER in said.stderr) == (0, True)
    assert said.stdout.strip()
    found = program("bench", folder, "--runs", 1, "--decode-tokens", 32, "--json")
    assert found.returncode == 0, found.stderr
    speeds = json.loads(found.stdout)
    assert min(speeds["prefill_tokens_per_second"], *speeds["decode_tokens_per_second"].values()) > 0
    assert speeds["kv_cache_dtype"] == "float32"
