"""Budgets in a run: each layer's share is its own, the mean is as asked, and shares are those of the formulas."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrate_models import make, text
from penjing import budget
from penjing.calibrate import Calibration, read_tokens
from penjing.checkpoint import open_checkpoint
from penjing.compress import compress
from penjing.errors import BadRecipe, OutOfBudget, PenjingError
from penjing.recipe import BUDGETS

NOVELIST = Path(__file__).parents[1] / "examples" / "novelist"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    make(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(text())
    return tmp_path


def run(work: Path, out: str = "out", **settings: Any) -> Any:
    rows = {"calibration": [work / "text.txt"], "samples": 10, "sequence_length": 24}
    return compress(work / "model", work / out, **{"sparsity": 0.6, **rows, **settings})


def test_hidden_states_that_a_budget_is_measured_on_are_counted_on_the_disk(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(work)
    hidden = 10 * 24 * 32 * 4
    weights = sum(file.stat().st_size for file in (work / "model").glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=weights + 2 * hidden))
    run(work, "uniform", prune_method="l1")
    with pytest.raises(OutOfBudget, match=r"\d+ bytes are needed on the disk"):
        run(work, "outliers", prune_method="l1", budget="outliers")
    assert not list((work / "outliers").rglob("hidden-*"))


def shares(folder: Path) -> dict[str, float]:
    """The share of zeros of each module that was pruned."""
    saved = open_checkpoint(folder)
    modules = json.loads((folder / "penjing.json").read_text())["resolved"]["modules"]
    return {module: float((saved.read(f"{module}.weight") == 0).mean()) for module in modules}


class Seen:
    """What transformers computes of the original: linear layers, the norms of their inputs, and each block's call."""

    def __init__(self, work: Path) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(work / "model").float().eval()
        named = self.model.named_modules()
        self.linears = {name: m for name, m in named if isinstance(m, torch.nn.Linear) and "layers" in name}
        self.norms: dict[str, np.ndarray] = {}
        self.calls: list[Any] = []
        for name, module in self.linears.items():
            module.register_forward_pre_hook(self._note(name))
        for layer in self.model.model.layers:
            layer.register_forward_hook(
                lambda _, args, more, out: self.calls.append((args, more, out)), with_kwargs=True
            )
        tokens = read_tokens(Calibration((work / "text.txt",), 10, 24, 0), work / "model", 64, 97)
        with torch.no_grad():
            self.model(input_ids=torch.from_numpy(tokens), use_cache=False)

    def _note(self, name: str) -> Any:
        def hook(_: Any, inputs: Any) -> None:
            self.norms.setdefault(name, inputs[0].square().mean(dim=(0, 1)).sqrt().numpy())

        return hook

    def scores(self, layer: int) -> dict[str, np.ndarray]:
        """|w| · ‖x‖ of each weight of a layer."""
        return {
            name: np.abs(module.weight.detach().numpy()) * self.norms[name]
            for name, module in self.linears.items()
            if f"layers.{layer}." in name
        }

    def loss(self, layer: int, share: float) -> float:
        """What the layer's output is off by, once the least scores of each row of its weights are zeros."""
        block, (args, more, right) = self.model.model.layers[layer], self.calls[layer]
        before = {name: self.linears[name].weight.detach().clone() for name in self.scores(layer)}
        for name, scores in self.scores(layer).items():
            least = np.argsort(scores, axis=1, kind="stable")[:, : round(share * scores.shape[1])]
            np.put_along_axis(self.linears[name].weight.detach().numpy(), least, 0, axis=1)
        with torch.no_grad():
            off = float((block(*args, **more) - right).square().sum() / right.square().sum())
            for name, weight in before.items():
                self.linears[name].weight.copy_(weight)
        return off


def by_layer(work: Path, expected: np.ndarray, atol: float = 1e-6) -> None:
    """Each module has its layer's share, rounded to whole columns."""
    saved = open_checkpoint(work / "out")
    for module, share in shares(work / "out").items():
        columns = saved.infos[f"{module}.weight"].shape[1]
        wanted = expected[int(module.split(".")[2])]
        assert share == pytest.approx(wanted, abs=0.5 / columns + atol)


def test_outliers_by_the_formula_on_what_transformers_computes(work: Path) -> None:
    run(work, prune_method="wanda", budget="outliers")
    seen = Seen(work)
    scores = [np.concatenate([each.ravel() for each in seen.scores(layer).values()]) for layer in range(3)]
    ratios = np.array([(each > 5 * each.mean()).mean() for each in scores])
    scaled = (ratios - ratios.min()) / (ratios.max() - ratios.min()) * 0.16
    by_layer(work, 0.6 - (scaled - scaled.mean()))


def test_sensitivity_by_brute_force_on_what_transformers_computes(work: Path) -> None:
    """Losses of each layer pruned alone; then every allocation in steps of 0.1 %, between those that were measured."""
    run(work, prune_method="wanda", budget="sensitivity")
    seen, fine = Seen(work), np.arange(0, 991) / 1000
    tangents = []
    for layer in range(3):
        points = [(share, seen.loss(layer, share)) for share in budget.SHARES]
        pairs = list(itertools.combinations(points, 2))
        chords = [np.interp(fine, *zip(*pair, strict=True), left=np.inf, right=np.inf) for pair in pairs]
        tangents.append(np.min(chords, axis=0))  # the lower hull: no chord lies lower
    best = (np.inf, np.zeros(3))
    for first in range(991):
        second = np.arange(max(0, 1800 - first - 990), min(990, 1800 - first) + 1)
        total = tangents[0][first] + tangents[1][second] + tangents[2][1800 - first - second]
        at = int(total.argmin())
        if total[at] < best[0]:
            best = (total[at], np.array([first, second[at], 1800 - first - second[at]]) / 1000)
    by_layer(work, best[1], 0.002)


@pytest.mark.parametrize("kind", ["outliers", "sensitivity", "global"])
@pytest.mark.parametrize(
    "settings",
    [{"prune_method": "wanda"}, {"prune_method": "joint", "method": "joint", "bits": 4, "group_size": 16}],
    ids=["wanda", "joint"],
)
def test_the_mean_is_as_asked_and_shares_differ(kind: str, settings: dict[str, Any], work: Path) -> None:
    result = run(work, budget=kind, **settings)
    assert result.sparsity == pytest.approx(0.6, abs=0.03)  # rows are short: a column more or less is 3 %
    said = json.loads((work / "out" / "penjing.json").read_text())["resolved"]
    assert len({rule["prune"]["sparsity"] for rule in said["rules"]}) > 2


def test_global_magnitude_needs_no_data(work: Path) -> None:
    run(work, prune_method="l1", budget="global", calibration=())
    source = open_checkpoint(work / "model")
    found = shares(work / "out")
    weights = {module: np.abs(source.read(f"{module}.weight")) for module in found}
    threshold = np.quantile(np.concatenate([each.ravel() for each in weights.values()]), 0.6)
    for module, share in found.items():
        assert share == pytest.approx((weights[module] < threshold).mean(), abs=0.04)


def test_rules_without_a_budget_keep_their_share(work: Path) -> None:
    parts = [{"prune": {"sparsity": 0.25}}, {"prune": {"method": "wanda", "sparsity": 0.5, "budget": "outliers"}}]
    rules = [{"targets": "*.down_proj"} | parts[0], {"targets": "*"} | parts[1]]
    run(work, recipe={"version": 1, "rules": rules}, sparsity=None)
    found = shares(work / "out")
    assert {share for module, share in found.items() if "down_proj" in module} == {0.25}
    rest = {module: share for module, share in found.items() if "down_proj" not in module}
    assert len(set(rest.values())) > 1
    assert np.mean(list(rest.values())) == pytest.approx(0.5, abs=0.05)


def test_a_model_that_shrinks_and_writes_its_own_text(work: Path) -> None:
    settings = {"prune_method": "wanda", "budget": "sensitivity", "calibration": ()}
    result = run(work, remove_layers=1, prune_neurons=0.5, multiple=8, **settings)
    assert result.blocks == 2
    assert result.sparsity == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("moment", range(6))
def test_an_interrupted_run_ends_with_the_same_bytes(moment: int, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the note of each of three blocks, and after so many reports of the work that comes after them."""
    settings = {"prune_method": "sparsegpt", "budget": "sensitivity", "shard_bytes": 1}
    whole, left = run(work, "whole", **settings), moment % 3 + 1

    def count(*given: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        if moment < 3:
            write(*given)

    write = budget.write_json
    if moment < 3:
        monkeypatch.setattr(budget, "write_json", count)
    with pytest.raises(PenjingError, match="the same command goes on from there"):
        run(work, progress=count if moment >= 3 else None, **settings)
    monkeypatch.undo()
    again = run(work, **settings)
    assert again.digest == whole.digest
    assert again.resumed_at_block is not None


def program(out: Path, kind: str) -> list[str]:
    flags = ["--prune-method", "wanda", "--sparsity", "0.5", "--budget", kind, "--shard-size", "1", "--json"]
    rows = ["--calibration", str(NOVELIST / "evaluation.txt"), "--samples", "8", "--sequence-length", "64"]
    return [sys.executable, "-m", "penjing", "compress", str(NOVELIST), "-o", str(out), *flags, *rows]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", BUDGETS)
def test_a_real_command(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(program(tmp_path / "out", kind), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["sparsity"] == pytest.approx(0.5, abs=0.002)
    assert (f"budget {kind}: " in done.stderr) == (kind != "uniform")
    if kind == "sensitivity":
        digest = json.loads(done.stdout)["digest"]
        assert killed_while_it_measures(tmp_path / "killed", kind)
        rest = subprocess.run(program(tmp_path / "killed", kind), capture_output=True, check=True)
        assert json.loads(rest.stdout)["digest"] == digest


def killed_while_it_measures(out: Path, kind: str) -> bool:
    child = subprocess.Popen(program(out, kind), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while child.poll() is None and not (out / ".journal" / "budget" / "budget-00002.json").exists():
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL


def test_another_budget_in_the_same_folder_is_refused(work: Path) -> None:
    settings = {"prune_method": "wanda", "shard_bytes": 1}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(PenjingError):
        run(work, budget="outliers", progress=stop, **settings)
    with pytest.raises(PenjingError, match="an unfinished run with another recipe"):
        run(work, budget="global", **settings)


def test_what_is_wrong_is_named(work: Path) -> None:
    with pytest.raises(BadRecipe, match=r"budget='outlier'.*outliers"):
        run(work, prune_method="wanda", budget="outlier")
    with pytest.raises(BadRecipe, match="a pattern 2:4 leaves no choice"):
        run(work, prune_method="wanda", budget="global", pattern="2:4", sparsity=0.5)
