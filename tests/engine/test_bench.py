"""`penjing bench`: its fields, and figures that fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from penjing import kernels, models
from penjing.cli import main
from penjing.engine.bench import bench, bytes_read_per_token
from penjing.errors import BadInput
from tiny_llama import llama_tensors, make_model

NOVELIST = Path(__file__).parents[2] / "examples" / "novelist"


def test_json() -> None:
    program = [sys.executable, "-m", "penjing", "bench", NOVELIST, "--runs", "1", "--decode-tokens", "8", "--json"]
    program += ["--contexts", "40,300", "--kv-cache-dtype", "int8"]
    answer = subprocess.run(program, capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)
    decode = found["decode_tokens_per_second"]
    assert decode.keys() == {"1", "8"}
    assert found["decode_at_context"].keys() == {"40", "300"}
    assert found["kv_cache_dtype"] == "int8"
    assert found["prefill_tokens"] == 512
    speeds = (found["prefill_tokens_per_second"], *decode.values(), *found["decode_at_context"].values())
    assert min(*speeds, found["load_seconds"]) > 0
    model = models.load(NOVELIST, screen=True)
    assert found["weights_bytes"] == model.weights_bytes
    read = model.weights_bytes - model.head.nbytes + (16 + 4) * model.block_bytes("int8") / 32  # the screen instead
    expected = read * decode["1"] / (found["bandwidth_gbps"] * 1e9)
    assert found["bandwidth_fraction"] == pytest.approx(expected, abs=2e-4)
    assert found["peak_rss_bytes"] > found["weights_bytes"]


def test_an_embedding_of_its_own_is_not_read() -> None:
    model = models.load(NOVELIST)
    tied = bytes_read_per_token(model, "float16", 10)
    model.head = kernels.matrix_from(model.embedding.decode())
    head = model.head.nbytes
    assert bytes_read_per_token(model, "float16", 10) == tied + head - model.embedding.nbytes


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="do not fit into its window of 1024"):
        bench(NOVELIST, decode_tokens=1020)
    with pytest.raises(BadInput, match="1000 \\+ 64 tokens do not fit"):
        bench(NOVELIST, contexts=[10, 1000])
    with pytest.raises(SystemExit):
        main(["bench", str(NOVELIST), "--contexts", "ten"])
    assert "--contexts='ten': give numbers of tokens" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"contexts=\[0\]"):
        bench(NOVELIST, contexts=[0])
    with pytest.raises(BadInput, match="runs=0"):
        bench(NOVELIST, runs=0)


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "penjing", "bench", str(folder), "--runs", "1", *options]
    return subprocess.run(program, capture_output=True, text=True, timeout=60)


def test_streams_that_fail_have_no_speed(tmp_path: Path) -> None:
    """Numbers that are finite, and overflow as they are multiplied: 0.0 tokens a second is no answer."""
    tensors = {name: array.astype(np.float32) for name, array in llama_tensors().items()}
    tensors["lm_head.weight"] *= np.float32(1e38)
    folder = make_model(tmp_path / "model", tensors, max_position_embeddings=256)
    ended = run(folder, "--json")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "decode-0: the model's logits are not finite" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_more_streams_than_the_budget_holds_are_refused_with_the_numbers() -> None:
    ended = run(NOVELIST, "--memory-budget", "200MB", "--decode-tokens", "100", "--kv-cache-dtype", "float32")
    assert ended.returncode == 1
    assert "8 streams of 116 tokens take 32 blocks of cache" in ended.stderr
    assert ended.stderr.count("\n") == 1
