"""Recovery: what may move, towards what, and that it is kept only where it helped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrate_models import make, numbers, stopping_after, text, workplace
from penjing import models
from penjing.calibrate.latent import Latent
from penjing.checkpoint import open_checkpoint
from penjing.compress import compress
from penjing.errors import BadRecipe, PenjingError
from penjing.formats.affine import AffineTensor, Grid
from penjing.methods import rtn
from penjing.methods.statistics import Statistics
from penjing.models.reference import Reference
from penjing.presets import build
from penjing.recipe import Recover, from_json

ROWS: dict[str, Any] = {"samples": 48, "sequence_length": 32}
INT3: dict[str, Any] = {"method": "rtn", "bits": 3, "group_size": 16}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return workplace(tmp_path, 48 * 32)


def run(work: Path, out: str, **changes: Any) -> Any:
    settings = {**ROWS, "calibration": [work / "text.txt"], "shard_bytes": 1, "recover": True, **changes}
    return compress(work / "model", work / out, **settings)


def test_codes_stay_and_steps_and_norms_move(work: Path) -> None:
    result = run(work, "out", **INT3)
    plain = compress(work / "model", work / "plain", **INT3)
    assert plain.recovered == {}
    assert len(result.recovered) == 3
    assert all(its["after"] < its["before"] for its in result.recovered.values())
    one, two = numbers(work / "out"), numbers(work / "plain")
    moved = 0
    for name in two:
        if isinstance(two[name], AffineTensor):
            np.testing.assert_array_equal(one[name].codes, two[name].codes)
            moved += (one[name].scale != two[name].scale).any()
            np.testing.assert_allclose(one[name].scale, two[name].scale, rtol=0.2)
        elif "layernorm" in name:
            moved += (one[name] != two[name]).any()
        else:
            np.testing.assert_array_equal(one[name], two[name])
    assert moved > 20


def test_what_was_pruned_stays_zero(work: Path) -> None:
    result = run(work, "out", prune_method="l1", sparsity=0.5)
    compress(work / "model", work / "plain", prune_method="l1", sparsity=0.5)
    assert all(its["after"] < its["before"] for its in result.recovered.values())
    one, two = numbers(work / "out"), numbers(work / "plain")
    for name in two:
        np.testing.assert_array_equal(one[name] == 0, two[name] == 0, err_msg=name)
    assert any((one[name] != two[name]).any() for name in two if "proj" in name)


def hidden_states(folder: Path, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What comes into each block, and what leaves the last one."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad():
        found = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    return [*found[:-1], last[0]]


@pytest.mark.parametrize("gone", [(), (1,)], ids=["all layers", "one gone"])
def test_errors_are_those_against_the_original(gone: tuple[int, ...], work: Path) -> None:
    """Of the last block, on the rows that were not trained on, from transformers' own computation of both models."""
    settings = {"remove_layers": gone} if gone else {}
    result = run(work, "out", **settings, **({} if gone else INT3))
    words = [int(word[1:]) for word in text(48 * 32).split()]
    batches = torch.tensor(words).reshape(3, 16, 32)
    folder = work / "out"
    if not gone:  # as floats, which transformers computes with exactly
        from test_compress_calibrated import off_by

        off_by(make(work / "again", "llama"), folder)
        folder = work / "out-decoded"
    right, found = (torch.cat([hidden_states(each, b)[-1] for b in batches]) for each in (work / "model", folder))
    error = float((found - right).square().sum() / right.square().sum())
    last = list(result.recovered.values())[-1]
    assert last["after"] == pytest.approx(error, rel=1e-2)
    assert last["after"] < last["before"]


def test_recovery_of_a_shrunk_and_quantized_model_is_served(work: Path) -> None:
    result = run(work, "out", prune_neurons=0.5, multiple=8, remove_layers=1, method="gptq", bits=4, group_size=8)
    assert len(result.recovered) == 2
    saved = open_checkpoint(work / "out")
    logits = Reference(saved, models.read_config(saved)).logits(np.arange(3, 20))
    assert np.isfinite(logits).all()
    assert "recovered" in str(result)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_neox", "gemma2"])
def test_other_families_recover(family: str, tmp_path: Path) -> None:
    make(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(text(48 * 32))
    result = run(tmp_path, "out", **INT3)
    assert all(its["after"] <= its["before"] for its in result.recovered.values())
    assert sum(its["after"] for its in result.recovered.values()) < sum(
        its["before"] for its in result.recovered.values()
    )


@pytest.mark.parametrize("reports", [2, 3, 4])
def test_an_interrupted_run_ends_with_the_same_bytes(reports: int, work: Path) -> None:
    settings = {**INT3, "remove_layers": (1,)}
    whole = run(work, "whole", **settings)
    with pytest.raises(PenjingError, match="the same command goes on from there"):
        run(work, "out", progress=stopping_after(reports), **settings)
    assert run(work, "out", **settings).digest == whole.digest
    said = json.loads((work / "out" / "penjing.json").read_text())
    assert said["recovered"] == whole.recovered


def test_wrong_settings_are_one_line() -> None:
    for value, message in (
        ({"epochs": 0}, "epochs=0"),
        ({"rate": 2}, "rate=2"),
        ({"epoch": 1}, "did you mean 'epochs'"),
    ):
        with pytest.raises(BadRecipe, match=message):
            from_json({"version": 1, "rules": [{"quantize": {}}], "recover": value})
    assert from_json({"version": 1, "rules": [{"quantize": {}}], "recover": {}}).recover == Recover()


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_straight_through(symmetric: bool) -> None:
    """Against torch's own derivative of the same function with the rounding's error held fixed."""
    random, grid = np.random.default_rng(3), Grid(2, 4, symmetric)
    weight = random.normal(size=(6, 8)).astype(np.float32)
    solved = rtn.solve(weight, Statistics(), rtn.Config(grid))
    latent = Latent(weight, solved, False, torch.device("cpu"))
    with torch.no_grad():
        latent.leaf += torch.from_numpy(random.normal(size=weight.shape).astype(np.float32))
    slope = torch.from_numpy(random.normal(size=weight.shape).astype(np.float32))
    (latent.value() * slope).sum().backward()
    scale = torch.from_numpy(solved.scale)[..., None]
    zero = torch.zeros_like(scale) if solved.zero_point is None else torch.from_numpy(solved.zero_point)[..., None]
    free = latent.leaf.detach().clone().requires_grad_()
    exact = (torch.from_numpy(solved.decode()) + float(solved.scale.mean()) * free).view(6, 2, 4) / scale
    rounded = exact + (exact.round() - exact).detach()
    right = torch.clamp(rounded, grid.qmin - zero, grid.qmax - zero) * scale
    torch.testing.assert_close(latent.value().detach(), right.detach().view(6, 8))
    (right.view(6, 8) * slope).sum().backward()
    torch.testing.assert_close(latent.leaf.grad, free.grad)
    torch.testing.assert_close(torch.from_numpy(latent.result().decode()), right.detach().view(6, 8))


def test_codes_move_and_steps_stay(work: Path) -> None:
    rtn2 = {"method": "rtn", "bits": 2, "group_size": 16, "symmetric": False}
    moving = {"version": 1, "rules": [{"quantize": rtn2}], "recover": {"epochs": 30, "rate": 0.03, "codes": True}}
    result = run(work, "out", recipe=moving, recover=None)
    run(work, "plain", recipe={**moving, "recover": None}, recover=None)
    assert min(its["after"] / its["before"] for its in result.recovered.values()) < 0.95
    one, two = numbers(work / "out"), numbers(work / "plain")
    quantized = [name for name in two if isinstance(two[name], AffineTensor)]
    assert any((one[name].codes != two[name].codes).any() for name in quantized)
    for name in quantized:
        np.testing.assert_array_equal(one[name].scale, two[name].scale)
    for name in set(two) - set(quantized):
        np.testing.assert_array_equal(one[name], two[name])


def test_which_recipes_move_codes() -> None:
    moves = Recover(4, 0.02, codes=True, tokens=512, distill=1)
    assert build("balanced").recover is None
    assert build("balanced", bits=3).recover == build("balanced", sparsity=0.5).recover == moves
    assert build(with_data=True, bits=2).recover == moves
    assert build(method="gptq", bits=2).recover is None
    assert build("smallest").recover == moves
