"""Distillation: what may move, towards what, that it is kept only where it helped, and whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrate_models import make, numbers, text, workplace
from penjing import distilled
from penjing.calibrate.distil import Pupil
from penjing.calibrate.graph import Graph
from penjing.calibrate.recover import Free
from penjing.checkpoint import open_checkpoint
from penjing.compress import compress
from penjing.errors import BadRecipe, PenjingError
from penjing.formats.affine import AffineTensor, Grid
from penjing.methods import rtn
from penjing.methods.statistics import Statistics
from penjing.recipe import from_json
from test_compress_calibrated import off_by

ROWS: dict[str, Any] = {"samples": 48, "sequence_length": 32}
RTN = {"method": "rtn", "bits": 3, "group_size": 16}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return workplace(tmp_path, 48 * 32)


def run(work: Path, out: str, **changes: Any) -> Any:
    recipe = {"version": 1, "rules": [{"quantize": RTN}], "recover": {"epochs": 0, "distill": 3, "tokens": 64}}
    settings = {**ROWS, "calibration": [work / "text.txt"], "shard_bytes": 1, "recipe": recipe, **changes}
    return compress(work / "model", work / out, **settings)


def scores(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=rows, use_cache=False).logits, -1)


def test_codes_stay_steps_and_norms_move_and_errors_are_kl_on_text_held_back(work: Path) -> None:
    result = run(work, "out")
    compress(work / "model", work / "plain", **RTN)
    one, two = numbers(work / "out"), numbers(work / "plain")
    for name, before in two.items():
        if isinstance(before, AffineTensor):
            np.testing.assert_array_equal(one[name].codes, before.codes)
            assert (one[name].scale != before.scale).any(), name
        elif "layers" in name:
            assert (one[name] != before).any(), name
        else:
            np.testing.assert_array_equal(one[name], before, err_msg=name)
    rows = torch.tensor([int(word[1:]) for word in text(48 * 32).split()]).reshape(24, 2, 32)[7::8].flatten(0, 1)
    right = scores(work / "model", rows)
    for when, folder in (("before", "plain"), ("after", "out")):
        off_by(make(work / f"again-{when}", "llama"), work / folder)
        found = scores(work / f"{folder}-decoded", rows)
        kl = float((right.exp() * (right - found)).sum(-1).mean())
        assert result.distilled[when] == pytest.approx(kl, rel=1e-2)
    assert result.distilled["after"] < 0.97 * result.distilled["before"]
    assert "distilled" in str(result)


@pytest.mark.parametrize("killed", ["while it learns", "before the note", "between two files"])
def test_a_run_that_is_killed_ends_with_the_same_bytes(
    killed: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(work, "whole")
    with monkeypatch.context() as patch:
        if killed == "between two files":
            moved: list[Any] = []
            replace = os.replace

            def once(source: Any, target: Any) -> None:
                if distilled._FOLDER in Path(source).parts and Path(target).parent == work / "out":
                    if moved:
                        raise KeyboardInterrupt
                    moved.append(target)
                replace(source, target)

            patch.setattr(distilled.os, "replace", once)
        elif killed == "before the note":
            patch.setattr(distilled, "write_json", _interrupt)
        left = 40 if killed == "while it learns" else 10**9

        def progress(done: float, total: float) -> None:
            nonlocal left
            left -= done == total
            if not left:
                raise KeyboardInterrupt

        with pytest.raises(PenjingError, match="the same command goes on from there"):
            run(work, "out", progress=progress)
    again = run(work, "out")
    assert again.digest == whole.digest
    assert again.distilled == whole.distilled
    assert not (work / "out" / ".journal").exists()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_where_memory_has_no_room_it_is_left_out_and_said(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from penjing import calibrate

    monkeypatch.setattr(calibrate, "distil_bytes", lambda *_: 1 << 50)
    said: list[str] = []
    result = run(work, "out", announce=said.append)
    assert result.distilled is None
    assert [line for line in said if "distill is left out, because it and its original do not fit in memory" in line]
    assert json.loads((work / "out" / "penjing.json").read_text())["identity"]["distilled"] is False
    compress(work / "model", work / "plain", **RTN, shard_bytes=1)
    assert result.digest == json.loads((work / "plain" / "penjing.json").read_text())["digest"]


@pytest.mark.parametrize(
    "stored", [{"bits": 8, "group_size": -1}, {"bits": 4, "group_size": 16}], ids=["int8", "packed"]
)
def test_steps_move_however_they_are_stored(stored: dict[str, int], work: Path) -> None:
    compress(work / "model", work / "plain", method="rtn", **stored)
    saved = open_checkpoint(work / "plain")
    pupil = Pupil(Graph(open_checkpoint(work / "model"), torch.device("cpu")), saved)
    values, moving = numbers(work / "plain"), pupil.free
    assert {name for name, each in values.items() if isinstance(each, AffineTensor)} <= moving.keys()
    assert {name for name in values if "layernorm" in name} <= moving.keys()
    for name, value in pupil.parameters().items():
        np.testing.assert_allclose(value.detach(), np.asarray(saved.tensor(name), np.float32), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_neox", "gemma2"])
def test_other_families_learn(family: str, tmp_path: Path) -> None:
    make(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(text(48 * 32))
    result = run(tmp_path, "out")
    assert result.distilled["after"] < result.distilled["before"]


def test_after_layers_went_and_blocks_recovered(work: Path) -> None:
    recipe = {
        "version": 1,
        "rules": [{"quantize": {**RTN, "bits": 2, "symmetric": False}, "prune": {"method": "l1", "sparsity": 0.25}}],
        "shrink": {"layers": [1]},
        "recover": {"epochs": 1, "codes": True, "rate": 0.01, "distill": 2, "tokens": 64},
    }
    result = run(work, "out", recipe=recipe, sparse_storage="bitmask")
    assert len(result.recovered) == 2
    assert result.distilled["after"] < result.distilled["before"]
    assert result.sparsity >= 0.25


def test_the_derivative_by_a_step_is_that_of_finite_differences() -> None:
    random = np.random.default_rng(5)
    weight = random.normal(size=(4, 8)).astype(np.float32)
    solved = rtn.solve(weight, Statistics(), rtn.Config(Grid(3, 4, False)))
    free = Free(weight, solved, torch.device("cpu"))
    slope = torch.from_numpy(random.normal(size=weight.shape).astype(np.float32))
    (free.value() * slope).sum().backward()
    assert solved.zero_point is not None
    for row, group in ((0, 0), (3, 1)):
        losses = []
        for change in (-0.01, 0.01):
            scale = solved.scale.astype(np.float64).copy()
            scale[row, group] *= 1 + change
            exact = (solved.codes.reshape(4, 2, 4) - solved.zero_point[..., None].astype(float)) * scale[..., None]
            losses.append((exact.reshape(4, 8) * slope.numpy()).sum())
        assert float(free.leaf.grad[row, group]) == pytest.approx((losses[1] - losses[0]) / 0.02, rel=1e-3)


def test_wrong_settings_are_one_line() -> None:
    for value, message in (
        ({"epochs": 0}, "epochs=0: nothing is trained"),
        ({"distill": -1}, "distill=-1"),
        ({"tokens": 0}, "tokens=0"),
    ):
        with pytest.raises(BadRecipe, match=message):
            from_json({"version": 1, "rules": [{"quantize": {}}], "recover": value})
