"""Whatever comes and goes, in whatever order: every text is what it is alone, and every block comes back."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from toy import END, Toy

from penjing.engine.blocks import BLOCK, blocks_for
from penjing.engine.engine import Engine
from penjing.engine.messages import Event, Request, SamplingParams
from penjing.engine.scheduler import Limits
from penjing.engine.speculate import Draft, PromptLookup, Speculation

WINDOW = 6 * BLOCK


@dataclass(frozen=True)
class Asked:
    """A request, the step at which it comes, and the one, if any, at which it is taken back."""

    at: int
    prompt: list[int]
    params: SamplingParams
    priority: int
    salt: str
    aborted_at: int | None


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    """Prompts begin alike more often than not, also at the borders of blocks."""
    common = draw(st.sampled_from([0, 0, 5, BLOCK, 2 * BLOCK, 3 * BLOCK + 1]))
    own = draw(st.lists(st.integers(0, END - 1), min_size=0 if common else 1, max_size=40))
    prompt = [7 + index % 3 for index in range(common)] + own
    sampled = draw(st.booleans())
    params = SamplingParams(
        max_tokens=draw(st.integers(1, WINDOW - len(prompt)).map(lambda count: min(count, 70))),
        temperature=0.8 if sampled else 0,
        seed=draw(st.integers(0, 3)),
        frequency_penalty=draw(st.sampled_from([0, 0, 0.3])),
        ignore_eos=draw(st.booleans()),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
    )
    aborted = draw(st.none() | st.integers(0, 60)) if draw(st.booleans()) else None
    return Asked(
        draw(st.integers(0, 40)), prompt, params, draw(st.integers(0, 2)), draw(st.sampled_from("aab")), aborted
    )


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    speculative = draw(st.sampled_from([None, "prompt", "draft", "state"]))
    model = Toy(peak=draw(st.sampled_from([2.0, 10.0])), state=speculative == "state")
    limits = Limits(
        max_num_seqs=(places := draw(st.integers(1, 5))),
        max_num_batched_tokens=draw(st.sampled_from([places, 20, 64, 200])) + 5,
        max_model_len=WINDOW,
        blocks=blocks_for(WINDOW) + draw(st.integers(0, 14)),
        prefix_caching=speculative != "state" and draw(st.integers(0, 4)) > 0,
        policy="priority",
        mixed_prefill=draw(st.sampled_from([5, 8, 64])),
        scored_prefill=draw(st.sampled_from([5, 33])),
    )
    guesser = None
    if speculative == "prompt":
        guesser = PromptLookup()
    elif speculative == "draft":
        small = Toy(peak=10, wrong=draw(st.sampled_from([None, 3, 7])), weights_bytes=100)
        guesser = Draft(small, model, WINDOW, limits.max_num_batched_tokens, cost=0.1)
    return Engine(model, limits, speculation=Speculation(guesser, draw(st.integers(1, 6))) if guesser else None)


@settings(max_examples=200, deadline=None)
@given(engines(), st.lists(asked(), min_size=1, max_size=12))
def test_every_text_is_what_it_is_alone(engine: Engine, requests: list[Asked]) -> None:
    found: dict[int, list[Event]] = {index: [] for index in range(len(requests))}
    coming = dict(enumerate(requests))
    leaving = {index: each.aborted_at for index, each in coming.items() if each.aborted_at is not None}
    for step in range(20_000):
        for index in [index for index, each in coming.items() if each.at <= step]:
            each = coming.pop(index)
            engine.add(Request(str(index), each.prompt, each.params, each.priority, each.salt))
        for index in [index for index, at in leaving.items() if at <= step and index not in coming]:
            del leaving[index]
            engine.abort(str(index))
        if not coming and not engine.has_work:
            break
        for event in engine.step():
            assert event.error is None, event.error
            found[int(event.request_id)].append(event)
        check(engine)
    else:
        raise AssertionError("it never ends")
    assert engine.stats().blocks_used == 0
    for index, each in enumerate(requests):
        tokens = [token for event in found[index] for token in event.tokens]
        expected = Toy(peak=engine.model.peak).text(each.prompt, each.params)
        if found[index] and found[index][-1].finish_reason:
            assert tokens == expected
            scores = found[index][0].prompt_logprobs
            assert len(scores) == (len(each.prompt) - 1 if each.params.prompt_logprobs is not None else 0)
            assert found[index][0].cached_tokens < len(each.prompt)
        else:
            assert each.aborted_at is not None
            assert tokens == expected[: len(tokens)]


def check(engine: Engine) -> None:
    """The account of the blocks, from scratch."""
    scheduler, blocks = engine.scheduler, engine.scheduler.blocks
    tables = [each.table for each in scheduler._running]
    holders = [sum(table.count(block) for table in tables) for block in range(blocks.count)]
    assert holders == blocks._holders
    assert all(len(set(table)) == len(table) for table in tables)
    unheld = {block for block, count in enumerate(holders) if not count}
    assert set(blocks._free) | set(blocks._kept) == unheld
    assert len(blocks._free) + len(blocks._kept) == len(unheld)
    assert {block: name for name, block in blocks._named.items()} == blocks._names
    assert set(blocks._kept) <= set(blocks._names)
    salts: dict[int, set[str]] = {}
    for each in scheduler._running:
        assert len(each.table) * BLOCK >= each.computed
        for block in each.table:
            salts.setdefault(block, set()).add(each.salt)
    assert all(len(each) == 1 for each in salts.values())
    assert len(scheduler._running) <= engine.limits.max_num_seqs
    last = engine.model.steps[-1] if engine.model.steps else []
    assert sum(last) <= engine.limits.max_num_batched_tokens
    assert {each.slot for each in scheduler._running}.isdisjoint(scheduler._slots)
