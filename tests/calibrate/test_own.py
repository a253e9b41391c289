"""What a model writes itself to be calibrated on, where no text is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrate_models import make
from penjing.calibrate import own
from penjing.calibrate.own import Own
from penjing.cli import main
from penjing.compress import compress
from penjing.errors import BadInput, PenjingError

ROWS: dict[str, Any] = {"samples": 10, "sequence_length": 24}


def quiet(done: float, total: float) -> None:
    pass


def test_tokens_are_drawn_from_the_models_own_probabilities(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "llama")
    with torch.no_grad():
        right = model(torch.tensor([[1]])).logits[0, -1].softmax(-1).numpy()  # after the first token
    rows = Own(tmp_path / "model", 4000, 2, seed=0).tokens(tmp_path, None, quiet)
    assert rows.shape == (4000, 2)
    assert (rows[:, 0] == 1).all()
    share = np.bincount(rows[:, 1], minlength=len(right)) / len(rows)
    expected = np.sqrt(2 / np.pi * right * (1 - right) / len(rows)).sum() / 2  # mean total variation of so many draws
    assert np.abs(share - right).sum() / 2 < 1.5 * expected


def test_a_seed_decides_and_what_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "model", "llama")
    found = {}
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        (tmp_path / name).mkdir()
        found[name] = Own(tmp_path / "model", 5, 20, seed).tokens(tmp_path / name, None, quiet)
    np.testing.assert_array_equal(found["one"], found["two"])
    assert (found["one"] != found["three"]).any()
    assert len(np.unique(found["one"], axis=0)) == 5
    monkeypatch.setattr(own.subprocess, "Popen", None)
    again = Own(tmp_path / "model", 5, 20, 3).tokens(tmp_path / "one", None, quiet)
    np.testing.assert_array_equal(again, found["one"])


def test_it_is_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "model", "llama")
    words = ["compress", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--method", "gptq", "--group-size", "16"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--samples", "6", "--sequence-length", "20"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert "NO CALIBRATION TEXT: the model writes 6 × 20 tokens itself; --calibration FILE" in said.err
    assert "6 × 20 tokens THAT THE MODEL WROTE ITSELF" in said.out
    report = json.loads((tmp_path / "out" / "penjing.json").read_text())["calibration"]
    assert report["own_samples"] is True
    assert len(report["layers"]) == 21


def test_an_interrupted_run_goes_on_with_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "model", "llama")

    def run(out: str, **more: Any) -> Any:
        return compress(tmp_path / "model", tmp_path / out, "gpu", group_size=16, shard_bytes=1, **ROWS, **more)

    whole = run("whole")
    assert run("whole").already_done

    def stop(done: float, total: float) -> None:
        if (tmp_path / "out" / "model-00002-of-00005.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(PenjingError, match="the same command goes on"):
        run("out", progress=stop)
    with monkeypatch.context() as patch:
        patch.setattr(own.subprocess, "Popen", None)
        assert run("out").digest == whole.digest


def test_what_cannot_write_asks_for_text(tmp_path: Path) -> None:
    make(tmp_path / "encoder", "bert")
    with pytest.raises(BadInput, match=r"BertForMaskedLM writes no text .*: give --calibration FILE") as caught:
        compress(tmp_path / "encoder", tmp_path / "out", "gpu", group_size=16, **ROWS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    make(tmp_path / "model", "llama")
    with pytest.raises(PenjingError, match=r"cannot write text of its own .*weights.*; give --calibration FILE"):
        Own(tmp_path / "model", 5, 20, 0).tokens(tmp_path, 1, quiet)
