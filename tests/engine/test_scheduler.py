"""The scheduler: order, budget, and that prompts do not hold up those that are writing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.engine.scheduler import Limits, Scheduler
from penjing.errors import BadInput, OutOfBudget

BYTES = 10


def scheduler(**changes: int) -> Scheduler:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 100, "kv_bytes": 4 * 100 * BYTES}
    return Scheduler(Limits(**{**values, "kv_bytes_per_token": BYTES, "mixed_prefill": 8, **changes}))


def step(one: Scheduler) -> dict[str, int]:
    one.admit()
    work = one.schedule()
    one.advance(work)
    return {each.id: each.count for each in work}


def test_a_prompt_is_read_in_chunks_and_then_tokens_are_written_one_by_one() -> None:
    one = scheduler()
    one.add("a", 90, 10)
    one.admit()
    first = one.schedule()
    assert [(work.start, work.count, work.samples) for work in first] == [(0, 64, False)]
    one.advance(first)
    second = one.schedule()
    assert [(work.start, work.count, work.samples) for work in second] == [(64, 26, True)]
    one.advance(second)
    assert [(work.start, work.count, work.samples) for work in one.schedule()] == [(90, 1, True)]


def test_a_long_prompt_does_not_hold_up_those_that_write() -> None:
    one = scheduler()
    one.add("writer", 2, 50)
    step(one)
    one.add("reader", 80, 10)
    for _ in range(10):
        assert step(one) == {"writer": 1, "reader": 8}
    assert step(one) == {"writer": 1, "reader": 1}


def test_prompts_are_read_in_the_order_in_which_they_came() -> None:
    one = scheduler()
    for name, prompt in (("a", 40), ("b", 40), ("c", 5)):
        one.add(name, prompt, 5)
    assert step(one) == {"a": 40, "b": 24}
    assert step(one) == {"a": 1, "b": 8}


def test_the_first_in_the_queue_is_never_passed_over() -> None:
    one = scheduler(kv_bytes=100 * BYTES)
    one.add("a", 50, 11)  # 60 positions
    one.add("large", 80, 11)
    one.add("small", 1, 1)
    assert [name for name, _ in one.admit()] == ["a"]
    assert (one.running, one.waiting, one.kv_bytes_used) == (1, 2, 600)
    one.remove("a")
    assert one.admit() == [("large", 90), ("small", 1)]


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    one = scheduler(kv_bytes=50 * BYTES)
    with pytest.raises(OutOfBudget, match=r"60 positions of 10 bytes are 600 bytes.*500"):
        one.add("a", 50, 11)
    one.add("b", 50, 1)
    with pytest.raises(BadInput, match="101 tokens; max_model_len is 100"):
        one.add("c", 1, 100)
    assert one.waiting == 1


def test_removing_frees_the_place_wherever_it_is() -> None:
    one = scheduler(max_num_seqs=1)
    one.add("a", 10, 5)
    one.add("b", 10, 5)
    one.admit()
    assert one.remove("b")
    assert one.waiting == 0
    assert one.remove("a")
    assert not one.remove("a")
    assert (one.running, one.kv_bytes_used) == (0, 0)


def test_impossible_limits() -> None:
    with pytest.raises(BadInput, match="max_num_seqs=0"):
        scheduler(max_num_seqs=0)
    with pytest.raises(BadInput, match="one token a step"):
        scheduler(max_num_seqs=65)


@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=30),
    places=st.integers(1, 6),
    memory=st.integers(100, 400),
    room=st.integers(6, 70),
)
def test_everything_ends_in_order_and_within_the_budget(requests, places, memory, room) -> None:
    """Against a plain account of what each sequence has done."""
    one = scheduler(max_num_seqs=places, kv_bytes=memory * BYTES, max_num_batched_tokens=room)
    wanted = {str(index): request for index, request in enumerate(requests)}
    for name, (prompt, tokens) in wanted.items():
        one.add(name, prompt, tokens)
    done = dict.fromkeys(wanted, 0)
    capacity: dict[str, int] = {}
    started = []
    for _ in range(10_000):
        for name, size in one.admit():
            started.append(name)
            capacity[name] = size
        assert sum(capacity.values()) * BYTES == one.kv_bytes_used <= memory * BYTES
        work = one.schedule()
        if not work:
            break
        assert sum(each.count for each in work) <= room
        assert len({each.id for each in work}) == len(work)
        writing = {name for name in capacity if done[name] >= wanted[name][0]}
        assert writing <= {each.id for each in work}
        one.advance(work)
        for each in work:
            prompt, tokens = wanted[each.id]
            assert each.start == done[each.id]
            done[each.id] += each.count
            assert done[each.id] <= capacity[each.id]
            assert each.samples == (done[each.id] >= prompt)
            if done[each.id] == prompt + tokens - 1:
                one.remove(each.id)
                del capacity[each.id]
    assert done == {name: prompt + tokens - 1 for name, (prompt, tokens) in wanted.items()}
    assert started == list(wanted)
    assert (one.running, one.waiting, one.kv_bytes_used) == (0, 0, 0)
