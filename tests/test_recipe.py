"""Recipes: every way to write one gives the same, and what is wrong is named with what would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from penjing.errors import BadRecipe
from penjing.presets import PRESETS, build, load_recipe, preset
from penjing.recipe import IGNORE, Prune, Quantize, Recipe, Rule, Shrink, Transform, from_json

MODULES = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.0.mlp.gate",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
]


def test_first_matching_rule_decides_and_ignored_modules_are_left() -> None:
    recipe = Recipe(
        (Rule(("*.down_proj",), Quantize(bits=8)), Rule(("re:.*layers\\.1\\.", "*.q_proj"), Quantize(bits=4)))
    )
    bits = {module: rule.quantize.bits for module, rule in recipe.resolve(MODULES).items() if rule.quantize}
    assert bits == {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.1.self_attn.q_proj": 4,
        "model.layers.1.mlp.down_proj": 8,
    }


def test_the_defaults_leave_head_embeddings_and_routers() -> None:
    assert set(MODULES) - set(preset("int4").resolve(MODULES)) == {
        "model.embed_tokens",
        "model.layers.0.mlp.gate",
        "lm_head",
    }


def test_a_rule_without_work_protects_its_modules() -> None:
    recipe = from_json({"version": 1, "rules": [{"targets": "*.layers.0.*"}, {"targets": "*", "quantize": {}}]})
    assert set(recipe.resolve(MODULES)) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}


quantize_settings = st.builds(
    Quantize,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 16, 32, 128]),
    symmetric=st.booleans(),
    observer=st.sampled_from([None, "minmax", "mse"]),
    options=st.dictionaries(st.text("abc", min_size=1), st.integers() | st.booleans(), max_size=2),
)
prune_settings = st.builds(
    Prune,
    method=st.sampled_from(["l1", "l2", "random"]),
    sparsity=st.floats(0.01, 0.99),
    scope=st.sampled_from(["row", "tensor"]),
) | st.builds(Prune, pattern=st.sampled_from(["2:4", "1:8"]))
rules = st.builds(
    Rule,
    targets=st.lists(st.text("abc.*?", min_size=1), min_size=1, max_size=2).map(tuple),
    quantize=quantize_settings,
    prune=st.none() | prune_settings,
    transform=st.none() | st.builds(Transform, method=st.sampled_from(["awq", "smoothquant"])),
)
recipes = st.builds(
    Recipe,
    rules=st.lists(rules, min_size=1, max_size=3).map(tuple),
    ignore=st.lists(st.text("abc", min_size=1), max_size=2).map(tuple),
    seed=st.integers(0, 9),
    shrink=st.none()
    | st.builds(
        Shrink,
        layers=st.integers(1, 9) | st.lists(st.integers(0, 9), min_size=1, unique=True).map(tuple),
        neurons=st.sampled_from([0, 0.25]),
        method=st.sampled_from(["obs", "l2"]),
    ),
)


@given(recipes)
def test_recipes_survive_json_and_yaml(recipe: Recipe) -> None:
    plain = recipe.to_json()
    assert from_json(json.loads(json.dumps(plain))) == recipe
    assert from_json(yaml.safe_load(yaml.safe_dump(plain))) == recipe


def test_a_file_a_preset_and_flags_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "version: 1\nrules:\n  - targets: '*'\n    quantize: {bits: 4, group_size: 64}\n    prune: {sparsity: 0.5}\n"
    )
    from_file = load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.json").write_text(json.dumps(from_file.to_json()))
    assert load_recipe(tmp_path / "r.json") == from_file
    assert build(None, bits=4, group_size=64, sparsity=0.5) == from_file
    assert build("int4-sparse50", group_size=64) == from_file
    assert build("W4A16", group_size=64, prune_method="l1", sparsity=0.5, seed=None) == from_file
    assert from_file.ignore == IGNORE


def test_presets() -> None:
    for name in PRESETS:
        assert preset(name.upper()) == preset(name)
    assert preset("W8A8").rules[0].quantize == Quantize(bits=8, group_size=-1, activations="int8")
    assert preset("w4a16_asym").rules[0].quantize == Quantize(symmetric=False)
    assert preset("int8-sparse30").rules[0].prune == Prune(sparsity=0.3)
    assert preset("sparse50").rules[0].quantize is None
    goals = {name: preset(name).rules[0].quantize for name in ("fast", "balanced", "best", "smallest", "gpu")}
    assert all(goals.values())
    assert goals["gpu"] is not None
    assert goals["gpu"].symmetric  # what kernels of GPUs read


def rule(**parts: object) -> dict[str, object]:
    return {"version": 1, "rules": [parts]}


WRONG = {
    "unknown key of the recipe": ({"version": 1, "rule": []}, "unknown key 'rule'; did you mean 'rules'?"),
    "unknown key of a rule": (rule(quantise={}), "unknown key 'quantise'; did you mean 'quantize'?"),
    "unknown setting": (rule(quantize={"group-size": 4}), "unknown key 'group-size'; did you mean 'group_size'?"),
    "no version": ({"rules": []}, "version is missing"),
    "another version": ({"version": 2, "rules": [{"quantize": {}}]}, "version=2"),
    "no rules": ({"version": 1}, "rules is missing"),
    "nothing to do": ({"version": 1, "rules": [{"targets": "*"}]}, "does nothing"),
    "a list": ([], "give an object with some of rules, ignore"),
    "rule is text": ({"version": 1, "rules": ["int4"]}, r"rules\[0\]: give an object with some of targets"),
    "bits 1": (rule(quantize={"bits": 1}), r"rules\[0\].quantize: bits=1"),
    "bits 9": (rule(quantize={"bits": 9}), "give 2 to 8"),
    "bits as text": (rule(quantize={"bits": "4"}), "bits='4'"),
    "symmetric as text": (rule(quantize={"symmetric": "maybe"}), "symmetric='maybe': give true or false"),
    "sparsity beside a pattern": (rule(prune={"sparsity": 0.3, "pattern": "2:4"}), "pattern=2:4 removes 0.5"),
    "sparsity 0": (rule(prune={"sparsity": 0}), "between 0 and 1"),
    "sparsity 1": (rule(prune={"sparsity": 1.0}), "between 0 and 1"),
    "sparsity NaN": (rule(prune={"sparsity": float("nan")}), "between 0 and 1"),
    "pattern": (rule(prune={"pattern": "4:2"}), "N:M with 0 < N < M"),
    "channels": (rule(prune={"pattern": "channel"}), "whole neurons go by shrink"),
    "shrink": ({"version": 1, "shrink": {"neuron": 0.5}}, "did you mean 'neurons'"),
    "nothing shrinks": ({"version": 1, "shrink": {}}, "nothing goes; give layers"),
    "layers twice": ({"version": 1, "shrink": {"layers": [1, 1]}}, "give how many layers go, or a list"),
    "scope": (rule(prune={"scope": "rows"}), "did you mean 'row'"),
    "activations of 4 bits": (rule(quantize={"activations": "int8"}), "needs weights of 8 bits"),
    "options": (rule(quantize={"options": ["damping"]}), "give an object, such as"),
    "transform alone": (rule(transform={}, prune={}), "the rule has no quantize"),
    "unknown setting of a transform": (rule(quantize={}, transform={"metod": "awq"}), "did you mean 'method'"),
    "targets": (rule(targets=[3], quantize={}), "give a name or a list of names"),
    "seed": ({"version": 1, "rules": [{"quantize": {}}], "seed": "x"}, "whole number"),
    "seed below zero": ({"version": 1, "rules": [{"quantize": {}}], "seed": -1}, "seed=-1: give a whole number, 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_recipes_are_refused_in_one_line(case: str) -> None:
    value, message = WRONG[case]
    with pytest.raises(BadRecipe, match=message) as caught:
        from_json(value)
    assert "\n" not in str(caught.value)


def test_wrong_names_come_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="did you mean 'int4'"):
        load_recipe("int44")
    with pytest.raises(BadRecipe, match="did you mean 'group_size'"):
        build("int4", groupsize=3)
    with pytest.raises(BadRecipe, match="No such file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("rules: [")
    with pytest.raises(BadRecipe, match="not YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    with pytest.raises(BadRecipe, match="not YAML"):
        load_recipe(tmp_path / "deep.yaml")
    with pytest.raises(BadRecipe, match="nothing to do"):
        build()
    with pytest.raises(BadRecipe, match="not a regular expression"):
        Recipe((Rule(("re:(",), Quantize()),)).resolve(MODULES)


TWICE = {
    "r.yaml": "version: 1\nrules:\n  - targets: '*'\n    quantize: {bits: 8, group_size: 64, bits: 4}\n",
    "r.json": '{"version": 1, "rules": [{"quantize": {"bits": 8,\n "group_size": 64, "bits": 4}}]}',
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_is_there_twice_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TWICE[name])
    with pytest.raises(BadRecipe, match=rf"{name}, line \d: key 'bits' is there twice; leave one of them out"):
        load_recipe(tmp_path / name)


def test_targets_that_match_nothing() -> None:
    with pytest.raises(
        BadRecipe, match=r"target 'model.layers.0.mlp.downproj' matches no module.*did you mean 'model.layers.0"
    ):
        Recipe((Rule(("model.layers.0.mlp.downproj",), Quantize()),)).resolve(MODULES)
    with pytest.raises(BadRecipe, match="matches only modules that are ignored"):
        Recipe((Rule(("lm_head",), Quantize()),)).resolve(MODULES)
    with pytest.raises(BadRecipe, match="ignore 'lm_heat' matches no module"):
        Recipe((Rule(("*",), Quantize()),), ignore=("lm_heat",)).resolve(MODULES)
    only_head = Recipe((Rule(("lm_head",), Quantize()),), ignore=())
    assert set(only_head.resolve(MODULES)) == {"lm_head"}
