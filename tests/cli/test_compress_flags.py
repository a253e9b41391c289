"""`penjing compress`: its help names what there is, and its flags reach what a recipe can say."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import typer

import penjing
from penjing.cli import app, main
from penjing.errors import BadRecipe
from penjing.methods import JOINT, PRUNERS, QUANTIZERS, TRANSFORMS
from penjing.methods.observers import OBSERVERS
from penjing.methods.rounding import IMPORTANCE
from penjing.presets import PRESETS, SETTINGS, build
from penjing.recipe import Recipe, from_json
from tiny_llama import NOVELIST

FLAGS: dict[str, Any] = {
    parameter.name: parameter
    for parameter in typer.main.get_command(app).commands["compress"].params  # type: ignore[attr-defined]
}


@pytest.mark.parametrize(
    ("flag", "names"),
    {
        "method": QUANTIZERS,
        "prune_method": PRUNERS,
        "transform": TRANSFORMS,
        "joint": JOINT,
        "observer": [*OBSERVERS, IMPORTANCE],
        "recipe": PRESETS[:5],
    }.items(),
)
def test_help_names_all_that_there_is(flag: str, names: Any) -> None:
    assert not [name for name in names if name not in FLAGS[flag].help]


def test_every_setting_of_a_recipe_has_a_flag() -> None:
    named = {"options": "option", "prune_options": "prune_option", "transform_options": "transform_option"}
    assert not [setting for setting in SETTINGS if named.get(setting, setting) not in FLAGS]


def recipe_of(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Recipe:
    """What the flags mean to `compress`."""
    given: dict[str, Any] = {}

    def run(model: str, output: Path, recipe: Any, **settings: Any) -> str:
        wanted = {name: settings[name] for name in SETTINGS}
        given["recipe"] = build(recipe, with_data=bool(settings["calibration"]), **wanted)
        return ""

    monkeypatch.setattr(importlib.import_module("penjing.compress"), "compress", run)
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(NOVELIST), "-o", "out", *flags])
    assert ended.value.code == 0
    made: Recipe = given["recipe"]
    return made


SAME: dict[str, tuple[list[str], dict[str, Any]]] = {
    "options": (
        ["--method", "gptq", "--option", "damping=2e-2", "--option", "act_order=false"],
        {"quantize": {"method": "gptq", "options": {"damping": 0.02, "act_order": False}}},
    ),
    "a transform": (
        ["--transform", "awq", "--transform-option", "tries=8", "--bits", "3"],
        {"transform": {"method": "awq", "options": {"tries": 8}}, "quantize": {"bits": 3}},
    ),
    "joint": (
        ["--joint", "--sparsity", "0.6", "--prune-option", "stages=4"],
        {
            "prune": {"method": "joint", "sparsity": 0.6, "options": {"stages": 4}},
            "quantize": {"method": "joint"},
        },
    ),
    "text alone": (["--calibration", "text"], {"quantize": {"method": "gptq", "symmetric": False}}),
    "text and bits": (
        ["--calibration", "text", "--bits", "3"],
        {"quantize": {"method": "gptq", "bits": 3, "symmetric": False}},
    ),
    "text and a sparsity": (
        ["--calibration", "text", "--sparsity", "0.4"],
        {"prune": {"method": "gradual", "sparsity": 0.4}},
    ),
    "text and a pattern": (
        ["--calibration", "text", "--pattern", "2:4"],
        {"prune": {"method": "sparsegpt", "pattern": "2:4"}},
    ),
    "text, bits and a sparsity": (
        ["--calibration", "text", "--bits", "4", "--sparsity", "0.5"],
        {"prune": {"method": "joint"}, "quantize": {"method": "joint", "symmetric": False}},
    ),
    "text for a method that was named": (["--calibration", "text", "--method", "rtn"], {"quantize": {"method": "rtn"}}),
    "a preset and a sparsity": (
        ["--recipe", "gpu", "--sparsity", "0.5"],
        {"prune": {"method": "joint"}, "quantize": {"method": "joint"}},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_flags_say_what_a_file_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, rule = SAME[case]
    moved = case.startswith("text") and ("prune" in rule or rule["quantize"].get("bits") == 3)
    training = {"epochs": 4, "rate": 0.02, "codes": True, "tokens": 512, "distill": 1}
    said = {"version": 1, "rules": [rule], "recover": training if moved else None}
    assert recipe_of(monkeypatch, *flags) == from_json(said)


@pytest.mark.parametrize("word", ["damping", "=3"])
def test_an_option_needs_a_name_and_a_value(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(NOVELIST), "-o", "out", "--option", word])
    assert ended.value.code == 2
    assert f"--option {word}: give NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("other", [["--method", "imatrix"], ["--prune-method", "obs"]])
def test_joint_is_one_method_for_both(other: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["compress", str(NOVELIST), "-o", str(tmp_path / "out"), "--joint", *other])
    assert capsys.readouterr().err == "penjing: --joint is one method for both; leave --method and --prune-method out\n"
    assert not (tmp_path / "out").exists()


def test_options_go_with_their_method() -> None:
    made = build({"version": 1, "rules": [{"quantize": {"method": "gptq", "options": {"sweeps": 8}}}]}, bits=3)
    assert made.rules[0].quantize is not None
    assert made.rules[0].quantize.options == {"sweeps": 8}
    more = build(made, options={"damping": 0.1}).rules[0].quantize
    assert more is not None
    assert more.options == {"sweeps": 8, "damping": 0.1}
    other = build(made, method="rtn").rules[0].quantize
    assert other is not None
    assert other.options == {}


def test_a_transform_is_no_method_of_quantizing() -> None:
    from penjing.methods import quantizer

    with pytest.raises(BadRecipe, match="'awq' is unknown; it is a transform: say --transform awq"):
        quantizer("awq")


def test_the_version_is_printed_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"penjing {penjing.__version__}\n"
