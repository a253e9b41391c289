"""Guesses: what is guessed, how many, and that the text is the same whatever was guessed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import VOCABULARY, Toy

from penjing.engine.blocks import BLOCK
from penjing.engine.engine import Engine
from penjing.engine.messages import Request, SamplingParams
from penjing.engine.scheduler import Limits
from penjing.engine.speculate import (
    LONGEST_MATCH,
    MOST_ROWS,
    SHORTEST_MATCH,
    TRY_EVERY,
    Acceptance,
    Draft,
    PromptLookup,
    Speculation,
    look_up,
    measured_cost,
)
from penjing.errors import BadInput, Unsupported
from penjing.models.step import Chunk, Result

LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=320, blocks=40)


def draft(model: Toy, small: Toy, cost: float = 0.11) -> Draft:
    return Draft(small, model, LIMITS.max_model_len, LIMITS.max_num_batched_tokens, cost)


def write(engine: Engine, name: str, prompt: list[int], **params: object) -> list[int]:
    values = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, **params}
    events = list(engine.run(Request(name, prompt, SamplingParams(**values))))
    assert events[-1].error is None
    return [token for event in events for token in event.tokens]


def alone(prompt: list[int], peak: float = 10, **params: object) -> list[int]:
    values = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, **params}
    return Toy(peak=peak).text(prompt, SamplingParams(**values))


def by_hand(tokens: list[int], count: int) -> list[int]:
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                found = tokens[end:]
                return [found[index % len(found)] for index in range(count)]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_look_up_by_hand(tokens: list[int], count: int) -> None:
    assert look_up(np.array(tokens, np.int32), count) == by_hand(tokens, count)


def test_look_up_takes_the_longest_and_of_equals_the_latest() -> None:
    def found(*tokens: int) -> list[int]:
        return look_up(np.array(tokens, np.int32), 2)

    assert found(1, 2, 3, 9, 9, 2, 3, 8, 8, 1, 2, 3) == [9, 9]
    assert found(2, 3, 9, 9, 2, 3, 8, 8, 2, 3) == [8, 8]
    assert found(5, 5, 5) == [5, 5]
    assert found(1, 2, 1) == []
    assert found(1) == []


def test_a_perfect_draft_is_believed_and_saves_steps() -> None:
    model, small = Toy(), Toy()
    engine = Engine(model, LIMITS, speculation=Speculation(draft(model, small), 5))
    assert write(engine, "a", [3, 4]) == alone([3, 4])
    stats = engine.stats()
    assert stats.guessed == stats.accepted > 40
    assert len(model.steps) < 20
    assert max(max(step) for step in model.steps) == 6


def test_a_useless_draft_is_soon_asked_no_more() -> None:
    model, small = Toy(), Toy(wrong=1)
    engine = Engine(model, LIMITS, speculation=Speculation(draft(model, small), 5))
    assert write(engine, "a", [3, 4], max_tokens=200) == alone([3, 4], max_tokens=200)
    stats = engine.stats()
    assert stats.accepted == 0
    assert stats.guessed < 30
    assert len(model.steps) == 200


def test_the_prompt_is_looked_up() -> None:
    model = Toy()
    engine = Engine(model, LIMITS, speculation=Speculation(PromptLookup(), 5))
    text = alone([3], max_tokens=60)  # counts round and round
    assert write(engine, "a", [3, *text[:56]], max_tokens=100) == alone([3, *text[:56]], max_tokens=100)
    assert engine.stats().accepted > 70


@pytest.mark.parametrize("size", range(20, 27))
@pytest.mark.parametrize("wrong", [None, 5])
def test_what_was_guessed_right_is_shared_only_where_the_draft_has_it_too(size: int, wrong: int | None) -> None:
    """The text ends with a block and a right guess, which the draft made but did not read: that block is not whole."""
    model, small = Toy(), Toy(wrong=wrong)
    engine = Engine(model, LIMITS, speculation=Speculation(draft(model, small), 5))
    prompt = list(range(1, size))
    longer = prompt + write(engine, "a", prompt, max_tokens=4 * BLOCK + 1 - len(prompt))
    assert write(engine, "b", longer) == alone(longer)
    assert engine.stats().prefix_hits >= 3 * BLOCK


@pytest.mark.parametrize("guesser", ["prompt", "draft"])
@pytest.mark.parametrize("peak", [3.0, 10.0])
def test_sampled_texts_are_the_same_too(guesser: str, peak: float) -> None:
    for seed in range(5):
        model = Toy(peak=peak)
        chosen = PromptLookup() if guesser == "prompt" else draft(model, Toy(peak=10))
        engine = Engine(model, LIMITS, speculation=Speculation(chosen, 4))
        params = {"temperature": 0.9, "seed": seed, "presence_penalty": 0.1, "logprobs": 1, "max_tokens": 80}
        assert write(engine, "a", [1, 2, 3, 1, 2], **params) == alone([1, 2, 3, 1, 2], peak, **params)
        assert engine.stats().accepted > 0 or (guesser, peak) == ("prompt", 3)  # such a text repeats nothing


@pytest.mark.parametrize("wrong", [None, 2])
def test_what_is_drawn_with_a_draft_has_the_models_own_probabilities(wrong: int | None) -> None:
    """χ² of the second token, where the first is the likeliest, against the softmax of the logits; the draft is sure
    of the likeliest, or of another."""
    model = Toy(peak=4)
    engine = Engine(model, LIMITS, speculation=Speculation(draft(model, Toy(wrong=wrong), cost=0.01), 4))
    texts = [write(engine, "a", [3], temperature=1, seed=seed, max_tokens=4) for seed in range(3000)]
    counts = np.bincount([text[1] for text in texts if text[0] == 4], minlength=VOCABULARY)
    row = model.logits([3, 4]).astype(np.float64)
    expected = np.exp(row) / np.exp(row).sum() * counts.sum()
    likely = expected >= 5
    found, right = (np.append(each[likely], each[~likely].sum()) for each in (counts, expected))
    freedom = len(found) - 1
    assert counts.sum() > 500
    assert engine.stats().guessed > 1000
    assert ((found - right) ** 2 / right).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_logprobs_come_with_every_token() -> None:
    model = Toy()
    engine = Engine(model, LIMITS, speculation=Speculation(draft(model, Toy()), 5))
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, logprobs=2)
    events = list(engine.run(Request("a", [5], params)))
    assert [len(event.logprobs) for event in events] == [len(event.tokens) for event in events]
    assert all(each.top[0][1] == each.chosen for event in events for each in event.logprobs)


def test_nothing_is_written_beyond_the_end() -> None:
    model = Toy()
    engine = Engine(model, LIMITS, speculation=Speculation(draft(model, Toy()), 5))
    for start in range(40, 49):
        events = list(engine.run(Request("a", [start], SamplingParams(max_tokens=30, temperature=0))))
        assert [token for event in events for token in event.tokens] == list(range(start + 1, 50))
        assert events[-1].finish_reason == "stop"
    assert len(write(engine, "a", [3], max_tokens=7)) == 7


def test_a_draft_that_fails_costs_nobody_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    model, small = Toy(), Toy()
    engine = Engine(model, LIMITS, speculation=Speculation(draft(model, small), 5))
    small.broken = MemoryError("no more")
    assert write(engine, "a", [3, 4]) == alone([3, 4])
    assert "the draft failed" in caplog.text
    assert engine.stats().guessed == 0
    assert write(engine, "b", [3, 4]) == alone([3, 4])
    assert engine.stats().accepted > 0


@pytest.mark.parametrize(("cost", "seconds"), [(1.0, (10, 15, 9)), (0.2, (10, 10, 2)), (0.7, (10, 20, 5))])
def test_the_cost_is_measured(cost: float, seconds: tuple[int, int, int]) -> None:
    """On a clock that only the models' steps move: (a guess + a row of five more) over a step."""
    now = 0
    one, several, guess = seconds

    class Timed(Toy):
        def step(self, chunks: list[Chunk]) -> list[Result]:
            nonlocal now
            now += guess if self is small else several if len(chunks[0].tokens) == 6 else one
            return super().step(chunks)

    model, small = Timed(), Timed()
    assert measured_cost(small, model, 5, lambda: now) == pytest.approx(cost)


@pytest.mark.parametrize("cost", [1.0, 1.5])
def test_a_draft_that_cannot_pay_is_never_asked(cost: float) -> None:
    """However often it would be right: neither for a guess nor to read."""
    model, small = Toy(), Toy()
    engine = Engine(model, LIMITS, speculation=Speculation(draft(model, small, cost), 5))
    for each in range(70):
        assert write(engine, str(each), [3, 4], max_tokens=3) == alone([3, 4], max_tokens=3)
    assert not small.steps


@pytest.mark.parametrize(("wrong", "cost"), [(1, 0.3), (4, 0.5)])
def test_a_draft_that_does_not_pay_costs_next_to_nothing(wrong: int, cost: float) -> None:
    """Steps of the draft, at its cost, against steps of the model over many texts: under 3 % in all."""
    model, small = Toy(), Toy(wrong=wrong)
    engine = Engine(model, LIMITS, speculation=Speculation(draft(model, small, cost), 5))
    for each in range(64):
        write(engine, str(each), [3, 4, each % 40], max_tokens=60)
    lost = cost * len(small.steps) - engine.stats().accepted
    assert lost < 0.03 * 64 * 60


def test_a_draft_that_comes_to_pay_is_found_out() -> None:
    """Too dear for the first hope, but always right: one text in so many is tried, and from then on all are."""
    model, small = Toy(), Toy()
    engine = Engine(model, LIMITS, speculation=Speculation(draft(model, small, 0.7), 5))
    for each in range(TRY_EVERY - 1):
        write(engine, str(each), [3, 4], max_tokens=10)
    assert not small.steps
    for each in range(20):
        write(engine, f"later {each}", [3, 4], max_tokens=60)
    assert engine.stats().accepted > 20 * 25


def test_as_many_guesses_as_pay() -> None:
    hopeful = Acceptance()
    assert hopeful.best(5, 0.1) > 0
    for _ in range(10):
        hopeful.note(5, 5)
    assert hopeful.best(5, 0.1) == 5
    assert hopeful.best(0, 0.1) == 0
    assert hopeful.best(5, 1.0) == 0  # a guess that costs a step gains nothing, even if it is always right
    for _ in range(20):
        hopeful.note(1, 0)
    assert hopeful.best(5, 0.1) == 0
    for _ in range(10):
        hopeful.note(2, 1)
    assert 0 < hopeful.best(5, 0.1) < 5


def test_few_guesses_where_many_write() -> None:
    speculation = Speculation(PromptLookup(), 5)
    for writers in (1, 2, 4, 8, 15, 16, 30):
        wanted = speculation.wanted({str(index): 100 for index in range(writers)})
        assert writers + sum(wanted.values()) <= max(MOST_ROWS, writers)
    assert speculation.wanted({"a": 1}) == {"a": 0}


def test_refusals() -> None:
    with pytest.raises(BadInput, match="num_speculative_tokens=0"):
        Speculation(PromptLookup(), 0)
    with pytest.raises(Unsupported, match="recurrent state"):
        draft(Toy(), Toy(state=True))
    other = Toy()
    other.config.vocab_size = 60
    with pytest.raises(BadInput, match=f"vocabulary of 60 tokens, the model one of {VOCABULARY}"):
        draft(Toy(), other)
    other.config.vocab_size, other.config.max_position = VOCABULARY, 100
    with pytest.raises(BadInput, match="positions for 100 tokens; 320 are needed"):
        draft(Toy(), other)
