"""The scheduler alone: order, pieces of prompts, blocks, and who gives way; test_properties.py has all at once."""

from __future__ import annotations

from typing import Any

import pytest

from penjing.engine.blocks import BLOCK
from penjing.engine.scheduler import Limits, Scheduler
from penjing.errors import BadInput, OutOfBudget


def scheduler(**changes: Any) -> Scheduler:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 200, "blocks": 16, "mixed_prefill": 8}
    return Scheduler(Limits(**{**values, **changes}))


def step(one: Scheduler, token: int = 1) -> dict[str, int]:
    """Compute a step: what each sequence had in it."""
    work = one.schedule()
    for each in work:
        one.advance(each.id, each.start + each.count, [token] if each.samples else [])
    return {each.id: each.count for each in work}


def test_a_prompt_is_read_in_chunks_and_then_tokens_are_written_one_by_one() -> None:
    one = scheduler()
    one.add("a", range(90), 10)
    found = []
    for _ in range(4):
        [work] = one.schedule()
        found.append((work.start, work.count, work.samples, len(work.table)))
        one.advance("a", work.start + work.count, [7] if work.samples else [])
    assert found == [(0, 64, False, 2), (64, 26, True, 3), (90, 1, True, 3), (91, 1, True, 3)]


def test_a_long_prompt_does_not_hold_up_those_that_write() -> None:
    one = scheduler()
    one.add("writer", [1, 2], 50)
    step(one)
    one.add("reader", range(80), 10)
    for _ in range(10):
        assert step(one) == {"writer": 1, "reader": 8}
    assert step(one) == {"writer": 1, "reader": 1}


def test_priority_goes_first_only_where_it_is_asked_for() -> None:
    one = scheduler(policy="priority", max_num_seqs=1)
    for name, priority in (("first", 0), ("late", 1), ("urgent", -1)):
        one.add(name, [1, 2, 3], 1, priority=priority)
    order = []
    for _ in range(3):
        [name] = step(one)
        order.append(name)
        one.remove(name)
    assert order == ["urgent", "first", "late"]
    with pytest.raises(BadInput, match="priority=1"):
        scheduler().add("a", [1], 1, priority=1)


def test_common_beginnings_are_shared_by_name_and_salt() -> None:
    one = scheduler()
    prompt = list(range(2 * BLOCK + 5))
    one.add("a", prompt, 2)
    assert step(one) == {"a": 64}
    assert step(one) == {"a": 5}
    one.add("b", prompt, 2)
    one.add("apart", prompt, 2, salt="other")
    work = {each.id: each for each in one.schedule()}
    assert (work["b"].start, one.cached("b")) == (2 * BLOCK, 2 * BLOCK)
    assert list(work["b"].table[:2]) == list(work["a"].table[:2])
    assert work["apart"].start == 0
    assert not set(work["apart"].table) & set(work["a"].table)


def test_the_last_in_rank_gives_way_and_comes_back() -> None:
    one = scheduler(blocks=3, max_model_len=96)
    one.add("first", [1] * 30, 60)
    one.add("second", [2] * 30, 60)
    while not one.preemptions:  # until the first needs its third block
        step(one)
    assert (one.running, one.waiting) == (1, 1)
    one.remove("first")
    assert "second" in step(one)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    one = scheduler(blocks=1)
    with pytest.raises(OutOfBudget, match=r"60 positions take 2 blocks of cache \(32 positions each\)"):
        one.add("a", [1] * 50, 11)
    with pytest.raises(BadInput, match="201 tokens; max_model_len is 200"):
        one.add("c", [1], 200)
    assert one.waiting == 0


def test_removing_frees_everything_wherever_it_is() -> None:
    one = scheduler(max_num_seqs=1)
    one.add("a", [1] * 40, 5)
    one.add("b", [1] * 40, 5)
    step(one)
    assert one.remove("b")
    assert one.remove("a")
    assert not one.remove("a")
    assert (one.running, one.waiting, one.blocks.held) == (0, 0, 0)


def test_impossible_limits() -> None:
    with pytest.raises(BadInput, match="max_num_seqs=0"):
        scheduler(max_num_seqs=0)
    with pytest.raises(BadInput, match="one token a step"):
        scheduler(max_num_seqs=65)
