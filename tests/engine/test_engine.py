"""The engine on a model that counts: batches, chunks, ends, aborts, failures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import END, VOCABULARY, Toy

from penjing.engine.engine import Engine
from penjing.engine.messages import Event, Request, SamplingParams
from penjing.engine.scheduler import Limits
from penjing.errors import BadInput, OutOfBudget


def engine(model: Toy | None = None, **changes: int) -> Engine:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 200, "blocks": 64}
    clock = itertools.count()
    limits = Limits(**{**values, "mixed_prefill": 8, "scored_prefill": 8, **changes})
    return Engine(model or Toy(), limits, clock=lambda: float(next(clock)))


def request(name: str, prompt: list[int], count: int, **values: object) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=count, temperature=0, **values))


def run(one: Engine, limit: int = 10_000) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {}
    for _ in range(limit):
        if not one.has_work:
            return events
        for event in one.step():
            events.setdefault(event.request_id, []).append(event)
    raise AssertionError("it never ends")


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=90), st.integers(1, 60)),
        min_size=1,
        max_size=10,
    )
)
def test_any_batch_gives_what_each_gives_alone(requests) -> None:
    one = engine()
    for index, (prompt, count) in enumerate(requests):
        one.add(request(str(index), prompt, count))
    found = run(one)
    for index, (prompt, count) in enumerate(requests):
        expected = Toy().text(prompt, count)
        assert tokens(found[str(index)]) == expected
        reason = "stop" if expected[-1] == END else "length"
        assert [event.finish_reason for event in found[str(index)]] == [None] * (len(expected) - 1) + [reason]
    assert one.stats().blocks_used == 0


def test_sequences_share_steps() -> None:
    model = Toy()
    one = engine(model)
    for index in range(4):
        one.add(request(str(index), [1, 2], 10))
    run(one)
    assert model.steps[0] == [2, 2, 2, 2]
    assert model.steps[1:] == [[1, 1, 1, 1]] * 9


def test_a_late_prompt_joins_without_stopping_the_others() -> None:
    model = Toy()
    one = engine(model)
    one.add(request("a", [1, 2], 30))
    one.step()
    one.add(request("b", [3] * 20, 2))
    written = [len(tokens([event for event in one.step() if event.request_id == "a"])) for _ in range(5)]
    assert written == [1] * 5
    assert model.steps[1:4] == [[1, 8], [1, 8], [1, 4]]


def test_ends() -> None:
    start = END - 3  # …, 47, 48, 49
    assert tokens(run_one(request("a", [start], 20))) == [47, 48, 49]
    assert tokens(run_one(request("a", [start], 6, ignore_eos=True))) == [47, 48, 49, 0, 1, 2]
    stopped = run_one(request("a", [start], 20, stop_token_ids=(48,)))
    assert (tokens(stopped), stopped[-1].finish_reason) == ([47, 48], "stop")
    assert tokens(run_one(request("a", [start], 20, ignore_eos=True, stop_token_ids=(0,)))) == [47, 48, 49, 0]
    longer = run_one(request("a", [start], 8, min_tokens=5))
    assert END not in tokens(longer)[:5]
    nothing = run_one(request("a", [start], 0))
    assert (tokens(nothing), nothing[-1].finish_reason) == ([], "length")


def run_one(asked: Request) -> list[Event]:
    return list(engine().run(asked))


def test_prompt_logprobs_across_chunks_and_beside_others() -> None:
    prompt = list(range(1, 31))
    model = Toy()
    one = engine(model)
    one.add(request("plain", [5, 6], 12))
    one.add(request("scored", prompt, 1, logprobs=2, prompt_logprobs=1))
    found = run(one)
    scores = found["scored"][0].prompt_logprobs
    assert len(scores) == 29
    for place, score in enumerate(scores):
        logits = model.logits(prompt[: place + 1]).astype(np.float64)
        assert score.chosen == pytest.approx(logits[prompt[place + 1]] - np.logaddexp.reduce(logits), abs=1e-5)
        assert score.top[0][0] == int(logits.argmax())
    assert found["scored"][0].logprobs[0].top[0][0] == tokens(found["scored"])[0]
    assert tokens(found["plain"]) == Toy().text([5, 6], 12)
    assert max(max(step) for step in model.steps) <= 8


def test_a_scored_prompt_that_is_read_twice_is_scored_once() -> None:
    one = engine(blocks=7, mixed_prefill=1)
    prompt = list(range(1, 31)) * 5
    one.add(request("writer", [5] * 10, 180, ignore_eos=True))
    one.add(request("scored", prompt, 1, prompt_logprobs=0))
    found = run(one)
    assert one.stats().preemptions > 0
    scores = found["scored"][0].prompt_logprobs
    rows = [Toy().logits(prompt[: place + 1]).astype(np.float64) for place in range(149)]
    expected = [row[token] - np.logaddexp.reduce(row) for row, token in zip(rows, prompt[1:], strict=True)]
    np.testing.assert_allclose([score.chosen for score in scores], expected, atol=1e-5)


def test_abort_in_the_queue_in_the_prompt_and_while_writing() -> None:
    one = engine(max_num_seqs=2)
    for name, prompt in (("writes", [1]), ("reads", [2] * 90), ("waits", [3]), ("stays", [4])):
        one.add(request(name, prompt, 20))
    one.step()
    assert (one.stats().running, one.stats().waiting) == (2, 2)
    for name in ("waits", "reads", "writes", "unknown"):
        one.abort(name)
    assert one.stats().blocks_used == 0
    found = run(one)
    assert list(found) == ["stays"]
    assert tokens(found["stays"]) == Toy().text([4], 20)


def test_closing_the_iterator_aborts() -> None:
    one = engine()
    events = one.run(request("a", [1], 50))
    next(events)
    events.close()
    assert not one.has_work
    assert one.stats().blocks_used == 0


def test_a_failing_model_fails_its_requests_and_nothing_else() -> None:
    model = Toy(broken=MemoryError("no more"))
    one = engine(model)
    one.add(request("a", [1], 5))
    found = run(one)
    assert found["a"][0].finish_reason == "error"
    assert "no more" in found["a"][0].error
    one.add(request("b", [1], 5))
    assert tokens(run(one)["b"]) == Toy().text([1], 5)


def test_damaged_logits_end_their_request_and_no_other() -> None:
    class Damaged(Toy):
        def row(self, first: int, length: int, history: bytes) -> np.ndarray:
            return np.full(VOCABULARY, np.nan, np.float32) if first == 3 else super().row(first, length, history)

    one = engine(Damaged())
    one.add(request("damaged", [3], 5))
    one.add(request("whole", [1], 5))
    found = run(one)
    assert "not finite" in found["damaged"][0].error
    assert tokens(found["whole"]) == Toy().text([1], 5)


def test_what_prompts_have_in_common_is_read_once() -> None:
    model = Toy()
    one = engine(model, max_num_batched_tokens=200)
    prompt = list(range(5, 45)) * 2
    one.add(request("a", prompt, 3))
    cold = run(one)["a"]
    one.add(request("b", prompt, 3))
    warm = run(one)["b"]
    assert tokens(warm) == tokens(cold) == Toy().text(prompt, 3)
    assert (cold[0].cached_tokens, warm[0].cached_tokens) == (0, 64)
    assert model.steps[0] == [80]
    assert [16] in model.steps
    assert (one.stats().prefix_queries, one.stats().prefix_hits) == (160, 64)


def test_a_sequence_that_lost_its_memory_writes_the_same_text() -> None:
    one = engine(blocks=7)
    for name, first in (("a", 3), ("b", 9), ("c", 20)):
        one.add(request(name, [first] * 40, 100, ignore_eos=True))
    found = run(one)
    assert one.stats().preemptions > 0
    for name, first in (("a", 3), ("b", 9), ("c", 20)):
        alone = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
        assert tokens(found[name]) == Toy().text([first] * 40, alone)


def test_one_event_for_a_prompt_without_an_answer() -> None:
    one = engine()
    one.add(request("a", [1] * 20, 0, prompt_logprobs=0))
    (event,) = run(one)["a"]
    assert (event.tokens, event.finish_reason, len(event.prompt_logprobs)) == ([], "length", 19)


def test_a_conversation_goes_on_from_its_cache() -> None:
    one = engine()
    first = list(range(1, 31))
    answer = tokens(list(one.run(request("a", first, 18, ignore_eos=True))))
    one.add(request("b", [*first, *answer, 9, 9], 4))
    events = run(one)["b"]
    assert events[0].cached_tokens == 32
    assert tokens(events) == Toy().text([*first, *answer, 9, 9], 4)


def test_what_was_cached_is_told_with_the_first_token() -> None:
    one = engine()
    text = list(range(1, 41))
    for name, salt, cached in (("a", "", 0), ("b", "", 32), ("c", "other", 0), ("d", "other", 32)):
        one.add(Request(name, text, SamplingParams(max_tokens=3, temperature=0), cache_salt=salt))
        events = run(one)[name]
        assert [event.cached_tokens for event in events] == [cached, 0, 0]
    assert (one.stats().prefix_queries, one.stats().prefix_hits) == (160, 64)


def test_priority_decides_who_comes_first() -> None:
    one = engine(max_num_seqs=1, policy="priority")
    for name, priority in (("a", 0), ("late", 5), ("b", 0), ("early", -1)):
        one.add(Request(name, [1], SamplingParams(max_tokens=2, temperature=0), priority=priority))
    assert list(run(one)) == ["early", "a", "b", "late"]


def test_a_model_with_state_gets_a_slot_for_each() -> None:
    model = Toy(state=True)
    one = engine(model, prefix_caching=False, blocks=6)
    for index in range(6):
        one.add(request(str(index), [index] * 50, 60, ignore_eos=True))
    found = run(one)
    assert one.stats().preemptions > 0
    for index in range(6):
        assert tokens(found[str(index)]) == Toy().text(
            [index] * 50, SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
        )


def test_refusals() -> None:
    one = engine(blocks=1)
    for wrong, message in [
        (request("a", [], 5), "empty"),
        (request("a", [VOCABULARY], 5), "token 50 is outside the vocabulary of 50"),
        (request("a", [1], 5, logit_bias={99: 1}), "token 99"),
        (request("a", [1], 5, stop_token_ids=(77,)), "token 77"),
        (request("a", [1] * 150, 51), "max_model_len is 200"),
    ]:
        with pytest.raises(BadInput, match=message):
            one.add(wrong)
    with pytest.raises(OutOfBudget, match="blocks"):
        one.add(request("a", [1] * 40, 2))
    one.add(request("a", [1], 2))
    with pytest.raises(BadInput, match="already there"):
        one.add(request("a", [1], 2))
    assert one.stats().waiting == 1


def test_timings_come_from_the_clock() -> None:
    one = engine(max_num_seqs=1)
    one.add(request("a", [1], 3))
    one.add(request("b", [1], 3))
    found = run(one)
    first, second = found["a"][-1].timings, found["b"][-1].timings
    assert min(*vars_of(first), *vars_of(second)) >= 0
    assert second.queue > first.queue
    assert first.decode > 0


def vars_of(timings) -> tuple[float, float, float]:
    return timings.queue, timings.prefill, timings.decode
