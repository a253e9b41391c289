"""Rules with methods that need data: what they need, what options they take, and what they lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from realistic import layer

from penjing import methods
from penjing.errors import BadInput, BadRecipe
from penjing.formats import affine
from penjing.formats.affine import AffineTensor, Grid
from penjing.methods import apply, awq, gptq, joint, sparsegpt
from penjing.methods.statistics import KINDS, Statistics
from penjing.recipe import Prune, Quantize, Rule, Transform


def rule(
    quantize: dict[str, Any] | None = None, prune: dict[str, Any] | None = None, transform: dict[str, Any] | None = None
) -> Rule:
    return Rule(
        ("*",),
        None if quantize is None else Quantize(**quantize),
        None if prune is None else Prune(**prune),
        None if transform is None else Transform(**transform),
    )


@pytest.mark.parametrize("name", [*methods.QUANTIZERS, *methods.PRUNERS, *methods.TRANSFORMS, *methods.JOINT])
def test_every_method_keeps_the_contract(name: str) -> None:
    find = next(
        find
        for table, find in (
            (methods.QUANTIZERS, methods.quantizer),
            (methods.PRUNERS | methods.JOINT, methods.pruner),
            (methods.TRANSFORMS, methods.transform),
        )
        if name in table
    )
    module = find(name)
    assert set(module.NEEDS) <= set(KINDS)
    assert module.Config.__dataclass_params__.frozen
    assert callable(module.solve)
    assert name in methods.TRANSFORMS or callable(module.by_rows)


def test_needs_are_those_of_all_methods_of_a_rule() -> None:
    assert apply.needs(rule({"method": "rtn"}, {"method": "l1"})) == ()
    assert apply.needs(rule({"method": "hqq"}, {"method": "wanda"})) == ("input_norm",)
    assert apply.needs(rule({"method": "gptq"}, {"method": "wanda"}, {"method": "awq"})) == (
        "absmean",
        "hessian",
        "input_norm",
    )
    assert apply.needs(rule({"method": "joint"}, {"method": "joint"})) == ("hessian",)


def test_methods_get_what_the_rule_and_its_options_say() -> None:
    weight, _, statistics = layer(6, 32, 0)
    one = rule({"method": "gptq", "bits": 3, "group_size": 16, "options": {"damping": 0.1, "sweeps": 1}})
    solved = apply.solve(one, weight, statistics, scale_dtype="bfloat16", seed=0)
    assert isinstance(solved, AffineTensor)
    config = gptq.Config(solved.grid, damping=0.1, sweeps=1)
    assert (solved.grid.bits, solved.grid.scale_dtype) == (3, "bfloat16")
    np.testing.assert_array_equal(solved.codes, gptq.solve(weight, statistics, config).codes)

    both = rule({"method": "joint", "group_size": 16, "observer": "mse"}, {"method": "joint", "options": {"stages": 2}})
    solved = apply.solve(both, weight, statistics, scale_dtype="float32", seed=0)
    assert isinstance(solved, AffineTensor)
    expected = joint.solve(weight, statistics, joint.Config(solved.grid, 0.5, observer="mse", stages=2))
    np.testing.assert_array_equal(solved.codes, expected.codes)
    assert not apply.by_rows(both)

    wished = apply.transform_config(rule({"group_size": 16}, None, {"options": {"tries": 3}}), "float16")
    assert wished == awq.Config(wished.grid, tries=3)
    assert wished.grid.scale_dtype == "float16"


WRONG = {
    "misspelt option": (
        rule({"method": "gptq", "options": {"dampin": 1}}),
        "gptq has no option 'dampin'; did you mean",
    ),
    "option of another method": (rule({"method": "hqq", "options": {"damping": 0.1}}), "hqq has no option 'damping'"),
    "no options at all": (rule({"method": "imatrix", "options": {"x": 1}}), "imatrix has no option 'x'; it has none"),
    "a field as an option": (rule({"method": "gptq", "options": {"observer": "mse"}}), "no option 'observer'"),
    "option of the wrong kind": (rule({"method": "gptq", "options": {"damping": "much"}}), "damping='much': give a"),
    "observer of none": (rule({"method": "hqq", "observer": "mse"}), "hqq finds its steps in its own way"),
    "misspelt observer": (rule({"method": "gptq", "observer": "mes"}), "did you mean 'mse'"),
    "misspelt observer of rtn": (rule({"method": "rtn", "observer": "mes"}), "did you mean 'mse'"),
    "half a joint": (rule({"method": "joint"}), "joint prunes and quantizes in one: name it in both"),
    "the other half": (rule({"method": "rtn"}, {"method": "joint"}), "name it in both"),
    "misspelt pruner": (rule(None, {"method": "wandaa"}), "did you mean 'wanda'"),
    "misspelt transform": (rule({}, None, {"method": "smooth"}), "did you mean 'smoothquant'"),
    "option of a pruner": (rule(None, {"method": "sparsegpt", "options": {"stages": 3}}), "sparsegpt has no option"),
    "what obs cannot do": (rule(None, {"method": "obs", "scope": "tensor"}), "scope=tensor: obs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_are_refused_in_one_line(case: str) -> None:
    wrong, message = WRONG[case]
    with pytest.raises(BadRecipe, match=message) as caught:
        apply.check(wrong)
    assert "\n" not in str(caught.value)


def test_a_solution_is_judged_by_what_rounding_would_have_lost() -> None:
    weight, _, statistics = layer(20, 64, 1)
    good = rule({"method": "gptq", "group_size": 32})
    solved = apply.solve(good, weight, statistics, scale_dtype="float32", seed=0)
    verdict = apply.judge(weight, solved, statistics, good)
    assert verdict["loss"] < 0.5 * verdict["plain_loss"]
    assert verdict["damping"] == 0.01
    pruned = rule(None, {"method": "sparsegpt"})
    verdict = apply.judge(weight, sparsegpt.solve(weight, statistics, sparsegpt.Config(0.5)), statistics, pruned)
    assert verdict["loss"] < 0.5 * verdict["plain_loss"]
    worse = apply.judge(weight, np.zeros_like(weight), statistics, pruned)
    assert worse["loss"] == pytest.approx(1)
    assert worse["plain_loss"] < 1
    with pytest.raises(BadInput, match="needs calibration"):
        apply.judge(weight, weight, Statistics(), pruned)


def test_norms_of_the_input_judge_as_the_diagonal_of_the_hessian() -> None:
    weight, _, statistics = layer(20, 64, 1)
    norms = Statistics({"input_norm": np.sqrt(np.diagonal(statistics["hessian"])).astype(np.float32)})
    pruned = rule(None, {"method": "wanda"})
    solved = apply.solve(pruned, weight, norms, scale_dtype="float32", seed=0)
    verdict = apply.judge(weight, solved, norms, pruned)
    lost, whole = (np.square(each * norms["input_norm"]).sum() for each in (weight - solved, weight))
    assert verdict["loss"] == pytest.approx(lost / whole, rel=1e-4)
    assert verdict["loss"] <= verdict["plain_loss"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_beyond_the_range_of_their_steps_are_counted(symmetric: bool) -> None:
    """Steps for ±1 on weights of which a known share is larger than that."""
    grid = Grid(4, 8, symmetric)
    weight = np.random.default_rng(0).uniform(-1, 1, (40, 16)).astype(np.float32)
    ends = np.ones((40, 2), np.float32)
    scale, zero = affine.fit(-ends, ends, grid)
    weight[::4, ::8] = 1.5
    solved = AffineTensor(affine.encode(weight, scale, zero, grid), scale, zero, grid)
    assert apply.clipped(weight, solved, 40) == pytest.approx(10 * 2 / weight.size)
    assert apply.clipped(weight, solved, 1) == pytest.approx(2 / 16)  # the first row alone
    assert apply.clipped(weight, weight) == 0
    whole = apply.solve(rule({"method": "rtn", "group_size": 8}), weight, Statistics(), scale_dtype="float32", seed=0)
    assert apply.clipped(weight, whole) == 0
    assert not apply.clips(rule({"method": "rtn"}))
    assert apply.clips(rule({"method": "rtn", "observer": "mse"}))
