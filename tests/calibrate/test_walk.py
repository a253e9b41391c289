"""Runs that stand still before a product and go on: what they give, in which order, and what ends them."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from penjing.calibrate.products import Seen
from penjing.calibrate.walk import Walk
from penjing.errors import PenjingError


class Layers:
    """Three layers one after the other, whose factors may change while a run stands before them."""

    def __init__(self) -> None:
        self.factors = {"a": 2.0, "b": 3.0, "c": 5.0}

    def run(self, seen: Seen, x: Tensor) -> Tensor:
        for name in "abc":
            seen((name, f"{name}.other"), x)
            x = x * self.factors[name]
        return x


def walks(layers: Layers, stops: str, count: int = 3) -> list[Walk]:
    inputs = [torch.full((2,), float(number + 1)) for number in range(count)]
    return [Walk(lambda seen, x=x: layers.run(seen, x), set(stops)) for x in inputs]


def running() -> int:
    return sum(thread.name == "penjing-walk" for thread in threading.enumerate())


def test_runs_go_on_together_with_what_changed_meanwhile() -> None:
    layers = Layers()
    some = walks(layers, "ac")
    assert [float(walk.to("a")[0]) for walk in some] == [1, 2, 3]
    layers.factors["a"] = 7.0
    assert [float(walk.to("c")[0]) for walk in some] == [21, 42, 63]
    layers.factors["c"] = 1.0
    assert [walk.end().tolist() for walk in some] == [[21, 21], [42, 42], [63, 63]]
    assert running() == 0


def test_a_run_is_left_in_the_middle_or_before_it_began() -> None:
    layers = Layers()
    some = walks(layers, "b")
    some[0].to("b")
    some[1].to("b")
    for walk in some:
        walk.leave()
        walk.leave()
    assert running() == 0


def test_what_goes_wrong_is_raised_where_it_is_waited_for() -> None:
    layers = Layers()
    (walk,) = walks(layers, "a", 1)
    walk.to("a")
    del layers.factors["b"]
    with pytest.raises(KeyError, match="b"):
        walk.end()
    assert running() == 0


@pytest.mark.parametrize(("stops", "where"), [("bc", "other text came to b"), ("a", "other text came to a")])
def test_text_that_takes_another_way_is_named(stops: str, where: str) -> None:
    (walk,) = walks(Layers(), stops, 1)
    with pytest.raises(PenjingError, match=where):
        walk.to("c")
    walk.leave()


def test_text_that_never_comes_there_is_named() -> None:
    (walk,) = walks(Layers(), "d", 1)
    with pytest.raises(PenjingError, match="other text came to nothing before it"):
        walk.to("d")
    walk.leave()
    assert running() == 0
