"""The scheduler: ranks, chunks, blocks, and who goes back when there are none left."""

from __future__ import annotations

import pytest

from penjing.engine.blocks import BLOCK, blocks_for
from penjing.engine.scheduler import PLACES_PER_PRIORITY, Limits, Scheduler
from penjing.errors import BadInput, OutOfBudget


def scheduler(**changes: object) -> Scheduler:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 400, "blocks": 52, "mixed_prefill": 8}
    return Scheduler(Limits(**{**values, **changes}))


def prompt(count: int, first: int = 0) -> list[int]:
    """No two beginnings alike, unless asked for."""
    return [first, *range(1, count)]


def step(one: Scheduler, wanted: dict[str, int] | None = None) -> dict[str, int]:
    """Schedule, compute, and draw a token for those that are due."""
    work = one.schedule(wanted)
    for each in work:
        one.advance(each.id, each.start + each.count, [9] if each.samples else [])
    return {each.id: each.count for each in work}


def test_a_prompt_is_read_in_chunks_and_then_tokens_are_written_one_by_one() -> None:
    one = scheduler()
    one.add("a", prompt(90), 10)
    found = []
    for _ in range(4):
        (work,) = one.schedule()
        found.append((work.start, work.count, work.samples, work.reads, len(work.table)))
        one.advance("a", work.start + work.count, [9] if work.samples else [])
    assert found == [(0, 64, False, True, 2), (64, 26, True, True, 3), (90, 1, True, False, 3), (91, 1, True, False, 3)]
    assert one.tokens("a").tolist() == [*prompt(90), 9, 9, 9]


def test_a_long_prompt_does_not_hold_up_those_that_write() -> None:
    one = scheduler()
    one.add("writer", prompt(2), 50)
    step(one)
    one.add("reader", prompt(80, 1), 10)
    for _ in range(10):
        assert step(one) == {"writer": 1, "reader": 8}
    assert step(one) == {"writer": 1, "reader": 1}


def test_prompts_are_read_in_the_order_in_which_they_came() -> None:
    one = scheduler()
    for index, (name, size) in enumerate((("a", 40), ("b", 40), ("c", 5))):
        one.add(name, prompt(size, index), 5)
    assert step(one) == {"a": 40, "b": 24}
    assert step(one) == {"a": 1, "b": 8}


def test_priorities_go_first_but_nobody_waits_for_ever() -> None:
    one = scheduler(max_num_seqs=1, policy="priority")
    one.add("low", prompt(1), 1, priority=1)
    for index in range(PLACES_PER_PRIORITY + 5):
        one.add(str(index), prompt(1), 1, priority=0)
    order = []
    while one.waiting:
        (name,) = step(one)
        order.append(name)
        one.remove(name)
    assert order.index("low") == PLACES_PER_PRIORITY - 1
    assert [name for name in order if name != "low"] == [str(index) for index in range(PLACES_PER_PRIORITY + 5)]


def test_the_first_in_the_queue_is_never_passed_over() -> None:
    one = scheduler(blocks=14)
    one.add("a", prompt(10 * BLOCK), 80)
    step(one)
    one.add("large", prompt(9 * BLOCK, 1), 11)
    one.add("small", prompt(1, 2), 1)
    step(one)
    assert (one.running, one.waiting) == (1, 2)
    one.remove("a")
    step(one)
    assert (one.running, one.waiting) == (2, 0)


def test_memory_is_taken_as_it_is_needed() -> None:
    one = scheduler(blocks=13)
    one.add("a", prompt(4), 396)
    for _ in range(3 * BLOCK):
        step(one)
        assert one.blocks.held == blocks_for(len(one.tokens("a")) - 1)
    for index in range(1, 4):
        one.add(str(index), prompt(4, index), 396)  # their whole windows would be 39 blocks
    step(one)
    assert one.running == 4


def test_the_last_in_rank_makes_room_and_finds_what_it_had() -> None:
    one = scheduler(blocks=13, max_model_len=400)
    one.add("a", prompt(5 * BLOCK), 100)
    one.add("b", prompt(5 * BLOCK, 1), 100)
    while len(one.tokens("b")) < 5 * BLOCK + 1:
        step(one)
    assert one.running == 2
    while not one.preemptions:
        work = step(one)
        assert "a" in work
        assert one.blocks.held <= 13
    assert (one.running, one.waiting) == (1, 1)
    assert len(one.tokens("b")) > 6 * BLOCK
    hits = one.prefix_hits
    one.remove("a")
    (work,) = one.schedule()
    assert (work.id, work.start) == ("b", 5 * BLOCK)  # its last block is what the other needed
    assert (one.prefix_hits, one.cached("b")) == (hits, 0)  # its own are no merit of the prefix cache


def test_who_goes_back_computes_nothing_in_that_step() -> None:
    """A prompt of higher rank runs out of memory after the writer of lower rank has had its turn."""
    one = scheduler(blocks=8, max_model_len=8 * BLOCK, mixed_prefill=1, policy="priority")
    one.add("writer", prompt(4), 200)
    step(one)
    one.add("reader", prompt(6 * BLOCK, 1), 1, priority=-1)
    while not one.preemptions:
        work = step(one)
        assert one.blocks.held <= 8
    assert list(work) == ["reader"]
    assert (one.running, one.waiting) == (1, 1)


def test_guesses_take_memory_from_nobody() -> None:
    one = scheduler(blocks=13, max_num_batched_tokens=100)
    one.add("a", prompt(5 * BLOCK), 100)
    one.add("b", prompt(6 * BLOCK, 1), 100)
    while len(one.writing()) < 2:
        step(one)
    step(one)
    assert one.blocks.available == 0
    work = {each.id: each for each in one.schedule({"a": 40, "b": 40})}
    assert one.preemptions == 0
    assert set(work) == {"a", "b"}
    for name, each in work.items():
        assert each.guesses == len(each.table) * BLOCK - len(one.tokens(name)) < 40
    assert [each.guesses for each in one.schedule({"a": 1, "b": 0})] == [1, 0]


def test_requests_share_what_they_begin_with() -> None:
    one = scheduler()
    one.add("a", prompt(70), 5)
    while one.waiting or not one.writing():
        step(one)
    one.add("b", prompt(70), 5)
    one.add("c", prompt(70)[:64], 5)
    one.add("other", prompt(70), 5, salt="mine")
    work = {each.id: each for each in one.schedule()}
    assert (work["b"].start, one.cached("b")) == (64, 64)
    assert (work["b"].table[:2] == work["a"].table[:2]).all()
    assert (work["b"].table[2:] != work["a"].table[2:]).all()
    for each in work.values():
        one.advance(each.id, each.start + each.count, [9] if each.samples else [])
    while {"c", "other"} - set(one.writing()):
        step(one)
    assert one.cached("c") == 32  # of two full blocks the last token must be computed to see what follows
    assert one.cached("other") == 0
    assert (one.prefix_queries, one.prefix_hits) == (70 + 70 + 64 + 70, 64 + 32)


def test_scored_prompts_are_computed_whole() -> None:
    one = scheduler()
    for name in "ab":
        one.add(name, prompt(70), 1, scored=True)
        while name not in one.writing():
            assert max(step(one).values()) <= 64
    assert one.cached("b") == 0
    assert one.prefix_queries == 0


def test_the_same_prompt_is_read_once_even_at_the_same_time() -> None:
    one = scheduler(max_num_batched_tokens=128)
    for name in "abcd":
        one.add(name, prompt(100), 5)
    assert step(one) == {"a": 100}
    assert step(one) == {"a": 1, "b": 4, "c": 4}
    assert one.cached("b") == 96


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    one = scheduler(prefix_caching=False, max_num_batched_tokens=256)
    for name in "ab":
        one.add(name, prompt(70), 5)
    assert step(one) == {"a": 70, "b": 70}
    one.remove("a")
    one.remove("b")
    one.add("c", prompt(70), 5)
    assert step(one) == {"c": 70}
    assert (one.prefix_queries, one.cached("c")) == (0, 0)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    one = scheduler(blocks=2)
    with pytest.raises(OutOfBudget, match=r"65 positions take 3 blocks of cache \(32 positions each\).*has 2 for all"):
        one.add("a", prompt(60), 6)
    one.add("b", prompt(60), 5)
    with pytest.raises(BadInput, match="1 prompt tokens and max_tokens=400 are 401 tokens; max_model_len is 400"):
        one.add("c", prompt(1), 400)
    with pytest.raises(BadInput, match="priority=3: this engine serves in order of arrival"):
        one.add("d", prompt(1), 1, priority=3)
    assert one.waiting == 1


def test_removing_frees_the_place_wherever_it_is() -> None:
    one = scheduler(max_num_seqs=1)
    one.add("a", prompt(10), 5)
    one.add("b", prompt(10), 5)
    step(one)
    assert one.remove("b")
    assert one.waiting == 0
    assert one.remove("a")
    assert not one.remove("a")
    assert (one.running, one.blocks.held) == (0, 0)


def test_impossible_limits() -> None:
    with pytest.raises(BadInput, match="max_num_seqs=0"):
        scheduler(max_num_seqs=0)
    with pytest.raises(BadInput, match="blocks=0"):
        scheduler(blocks=0)
    with pytest.raises(BadInput, match="one token a step"):
        scheduler(max_num_seqs=65)
