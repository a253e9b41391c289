"""What calibration collects, against hooks on transformers' whole model, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrate_models import FAMILIES, SHAPE, make, text
from penjing.calibrate import Calibration, Calibrator, open_calibrator
from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.safetensors import SafetensorsFile
from penjing.models.stacked import unstack
from penjing.presets import build


def calibrator(folder: Path, work: Path, method: str = "gptq", **calibration: Any) -> Calibrator:
    (work / "text.txt").write_text(text())
    checkpoint = open_checkpoint(folder)
    unstack(checkpoint)
    matrices = [n for n, i in checkpoint.infos.items() if n.endswith(".weight") and len(i.shape) == 2]
    rules = build(None, method=method, bits=4, group_size=-1).resolve([n.removesuffix(".weight") for n in matrices])
    settings = Calibration((work / "text.txt",), **{"samples": 9, "length": 24, **calibration})
    return open_calibrator(checkpoint, settings, rules, work, "cpu")


def seen_by_hooks(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Mean xᵀx of what each linear layer of the whole model is given, in float64."""
    sums: dict[str, Any] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(module: Any, args: Any, name: str = name) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).double()
                total, count = sums.get(name, (0, 0))
                sums[name] = (total + x.T @ x, count + len(x))

            hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens))
    for hook in hooks:
        hook.remove()
    return {name: (total / count).numpy() for name, (total, count) in sums.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", family)
    made = calibrator(tmp_path / "model", tmp_path)
    made.batch = 4  # of 9 rows: the last batch is another size
    expected = seen_by_hooks(model, made.tokens)
    compared = 0
    for block in made.order:
        with made.open(block, lambda share: None) as opened:
            for each, statistics in opened.inputs():
                for module in each.modules:
                    if module in expected:
                        right = expected[module]
                        np.testing.assert_allclose(statistics["hessian"], right, atol=1e-4 * np.abs(right).max())
                        compared += 1
            opened.advance()
    linears = sum(
        isinstance(m, torch.nn.Linear) for n, m in model.named_modules() if ".layer" in n and n[-4:] != "gate"
    )
    assert compared == linears
    assert len(made.order) == SHAPE["num_hidden_layers"]


def last_block(model: Any, path: str, tokens: np.ndarray) -> Any:
    """What leaves a block of the whole model."""
    left: list[Any] = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda module, args, out: left.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens))
    hook.remove()
    return left[0].double().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_stored_in_bfloat16_are_computed_in_it_as_well_as_by_transformers(family: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", family, torch.bfloat16)
    made = calibrator(tmp_path / "model", tmp_path)
    made.dtype = torch.bfloat16  # whatever this processor is fast at
    made.collect({})
    for block in made.order:
        with made.open(block, lambda share: None) as opened:
            assert opened.live.states == torch.bfloat16
            assert {t.dtype for t in opened.live.module.parameters()} == {torch.bfloat16}
            opened.advance()
    with SafetensorsFile(made.file(len(made.order))) as file:
        found = file.read("hidden", slice(0, len(made.tokens))).astype(np.float64)
    path = made.graph.modules[made.order[-1]]
    exact = last_block(model, path, made.tokens)
    theirs = last_block(model.to(torch.bfloat16), path, made.tokens)
    whole = np.square(exact).mean()
    assert 0 < np.square(found - exact).mean() < 2 * np.square(theirs - exact).mean() < 0.02 * whole


def test_what_is_measured_or_stored_wider_is_computed_in_float32(tmp_path: Path) -> None:
    make(tmp_path / "short", "llama", torch.bfloat16)
    short = calibrator(tmp_path / "short", tmp_path)
    short.dtype, short.exact = torch.bfloat16, True
    make(tmp_path / "half", "llama", torch.float16)
    half = calibrator(tmp_path / "half", tmp_path)
    half.dtype = torch.bfloat16
    for made in (short, half):
        with made.open(made.order[0], lambda share: None) as opened:
            assert opened.live.states == torch.float32
            assert opened.run(opened.batches()[0]).dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_see_the_tokens_that_the_router_gives_them(family: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", family)
    made = calibrator(tmp_path / "model", tmp_path)
    sums: dict[int, Any] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        hidden, index = args[0], args[1]
        for expert in range(module.num_experts):
            x = hidden[(index == expert).any(dim=-1)].double()
            total, count = sums.get(expert, (0, 0))
            sums[expert] = (total + x.T @ x, count + len(x))

    experts = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    hook = experts.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(made.tokens))
    hook.remove()
    checked = 0
    with made.open(made.order[0], lambda share: None) as opened:
        for each, statistics in opened.inputs():
            if each.expert is not None and each.columns == SHAPE["hidden_size"]:
                total, count = sums[each.expert[1]]
                assert count >= 8  # so that none of them was given all tokens instead
                right = (total / count).numpy()
                np.testing.assert_allclose(statistics["hessian"], right, atol=1e-4 * np.abs(right).max())
                assert len(each.modules) == 2  # gate and up
                checked += 1
        assert opened.starved == []
    assert checked == len(sums)


def test_experts_that_no_token_chose_are_given_all(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "qwen3_moe")
    with torch.no_grad():  # every token goes to the first two
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:2] = 0
    model.save_pretrained(tmp_path / "model")
    made = calibrator(tmp_path / "model", tmp_path)
    inputs: list[torch.Tensor] = []
    experts = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    hook = experts.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(made.tokens))
    hook.remove()
    x = torch.cat(inputs)
    right = (x.T @ x / len(x)).numpy()
    counted = set()
    with made.open(made.order[0], lambda share: None) as opened:
        for each, statistics in opened.inputs():
            if each.expert is not None and each.columns == SHAPE["hidden_size"]:
                np.testing.assert_allclose(statistics["hessian"], right, atol=1e-4 * np.abs(right).max())
                counted.add(each.expert[1])
        starved = {module.split(".experts.")[1].split(".")[0] for module in opened.starved}
    assert counted == set(range(6))
    assert len(starved) == 4


@pytest.mark.parametrize("budget", [1, 6000, 1 << 30])
def test_the_budget_of_statistics_changes_nothing_but_the_number_of_runs(budget: int, tmp_path: Path) -> None:
    make(tmp_path / "model", "qwen3_moe")
    made = calibrator(tmp_path / "model", tmp_path)
    found = []
    for size in (1 << 30, budget):
        made.budget = size
        with made.open(made.order[0], lambda share: None) as opened:
            found.append({tuple(each.modules): statistics["hessian"] for each, statistics in opened.inputs()})
    assert found[0].keys() == found[1].keys()
    for modules, hessian in found[0].items():
        np.testing.assert_array_equal(hessian, found[1][modules])
