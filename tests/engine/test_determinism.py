"""A seeded request writes the same tokens in any company, however its prompt is cut, and when it was put back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import penjing
from penjing import models
from penjing.engine.engine import Engine
from penjing.engine.messages import Event, Request, SamplingParams
from penjing.engine.scheduler import Limits
from penjing.engine.speculate import Draft, PromptLookup, Speculation

NOVELIST = Path(__file__).parents[2] / "examples" / "novelist"
PROMPT = [int(token) for token in np.random.default_rng(1).integers(0, 4096, 150)]
PARAMS = SamplingParams(max_tokens=48, temperature=0.9, top_p=0.95, seed=5, ignore_eos=True, logprobs=2)
ROOMY = Limits(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=256, blocks=80)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    folder = tmp_path_factory.mktemp("small") / "int4"
    penjing.compress(NOVELIST, folder, check="none", bits=4, group_size=64, ignore=["re:.*norm"])
    return models.load(folder)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    models.use_threads(2)
    yield
    models.use_threads(2)


def engine(model: models.Model, limits: Limits = ROOMY, kv_type: str = "float16", **more: object) -> Engine:
    model.reserve(limits.blocks, kv_type, limits.max_num_seqs)
    return Engine(model, limits, **more)


def run(engine: Engine, others: int = 0, common: int = 0) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of the request, with others around it that come first and begin alike."""
    for number in range(others):
        random = np.random.default_rng(number)
        own = [int(token) for token in random.integers(0, 4096, 40 + 17 * number)]
        params = SamplingParams(
            max_tokens=30 + 9 * number, temperature=0.5 * (number % 3), seed=number, ignore_eos=True
        )
        engine.add(Request(f"other {number}", PROMPT[:common] + own, params))
    engine.add(Request("it", PROMPT, PARAMS))
    found: list[Event] = []
    while engine.has_work:
        found += [event for event in engine.step() if event.request_id == "it"]
    assert found[-1].error is None
    tokens = [token for event in found for token in event.tokens]
    return tokens, [each.chosen for event in found for each in event.logprobs]


@pytest.fixture(scope="module")
def alone(model: models.Model) -> tuple[list[int], list[float]]:
    models.use_threads(2)
    found = run(engine(model))
    assert len(set(found[0])) > 20
    return found


def test_among_seven_others(model: models.Model, alone: object) -> None:
    assert run(engine(model), others=7) == alone


@pytest.mark.parametrize("threads", [1, 2])
def test_with_other_threads(threads: int, model: models.Model, alone: object) -> None:
    models.use_threads(threads)
    assert run(engine(model)) == alone
    assert run(engine(model), others=3) == alone


@pytest.mark.parametrize("piece", [1, 7, 33, 64, 150])
def test_with_its_prompt_in_pieces(piece: int, model: models.Model, alone: object) -> None:
    small = replace(ROOMY, max_num_seqs=1, max_num_batched_tokens=piece)
    assert run(engine(model, small)) == alone


def test_with_its_prompt_found_in_the_cache(model: models.Model, alone: object) -> None:
    found = engine(model)
    assert run(found) == alone
    hits = found.stats().prefix_hits
    assert run(found) == alone
    assert found.stats().prefix_hits - hits == 128
    assert run(found, others=3, common=100) == alone


@pytest.mark.parametrize(("others", "blocks"), [(3, 14), (5, 23), (7, 12)])
def test_after_it_was_put_back(others: int, blocks: int, model: models.Model, alone: object) -> None:
    """It came last, so it is the first that gives its memory to others."""
    found = engine(model, replace(ROOMY, blocks=blocks))
    assert run(found, others=others) == alone
    assert found.stats().preemptions > 0


@pytest.mark.parametrize("guesser", ["prompt", "draft"])
def test_with_guesses(guesser: str, model: models.Model, alone: object) -> None:
    """The draft is the model before it was compressed: often right, and wrong often enough."""
    chosen = PromptLookup()
    if guesser == "draft":
        small = models.load(NOVELIST)
        small.reserve(ROOMY.blocks, "float16", 8)
        chosen = Draft(small, model, 256, 512, cost=0.1)
    found = engine(model, speculation=Speculation(chosen, 4))
    assert run(found, others=2) == alone
    assert found.stats().accepted > 0
    assert found.stats().guessed > found.stats().accepted


@pytest.mark.parametrize("kv_type", ["int8", "int4"])
def test_integer_caches_too_where_nothing_is_cut_otherwise(kv_type: str, model: models.Model) -> None:
    first = run(engine(model, kv_type=kv_type))
    assert run(engine(model, kv_type=kv_type), others=7) == first
