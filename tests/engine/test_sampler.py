"""The sampler against closed forms, brute force, and transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.engine.messages import SamplingParams
from penjing.engine.sampler import Sampler, distribution, logprobs
from penjing.errors import PenjingError

SIZE = 40


def row(seed: int, size: int = SIZE, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def dense(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    ids, probabilities = distribution(logits, params)
    full = np.zeros(len(logits))
    full[ids] = probabilities
    assert len(set(ids.tolist())) == len(ids)
    return full


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    exact = np.exp(logits.astype(np.float64) / temperature - (logits / temperature).max())
    return exact / exact.sum()


def brute_force(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The rules as they are written down, one token after another."""
    p = softmax(logits, params.temperature)
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))
    kept = [token for token in order if p[token] >= params.min_p * p[order[0]]]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    total = sum(p[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        nucleus.append(token)
        mass += p[token]
        if mass >= params.top_p * total:
            break
    full = np.zeros(len(p))
    full[nucleus] = p[nucleus]
    return full / full.sum()


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 2),
    top_k=st.integers(-1, 50),
    top_p=st.floats(0.01, 0.99),
    min_p=st.floats(0, 0.9),
)
def test_distribution_is_what_the_rules_say(seed, temperature, top_k, top_p, min_p) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_allclose(dense(row(seed), params), brute_force(row(seed), params), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "values", [{}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}, {"top_k": 30, "top_p": 0.9, "min_p": 0.01}]
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_distribution_is_that_of_transformers(values, temperature) -> None:
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation")
    processors = [generation.TemperatureLogitsWarper(temperature)]
    if "min_p" in values:
        processors.append(generation.MinPLogitsWarper(values["min_p"]))
    if "top_k" in values:
        processors.append(generation.TopKLogitsWarper(values["top_k"]))
    if "top_p" in values:
        processors.append(generation.TopPLogitsWarper(values["top_p"]))
    for seed in range(20):
        logits = row(seed, 500)
        scores = torch.tensor(logits)[None]
        for process in processors:
            scores = process(torch.zeros(1, 1, dtype=torch.long), scores)
        ours = dense(logits, SamplingParams(temperature=temperature, **values))
        np.testing.assert_allclose(ours, scores.softmax(-1)[0].numpy(), rtol=2e-4, atol=1e-7)


def test_repetition_penalty_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation")
    prompt = [3, 3, 7, 11]
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=1.8), prompt, (), SIZE)
    tokens = list(prompt)
    process = generation.RepetitionPenaltyLogitsProcessor(1.8)
    for seed in range(30):
        logits = row(seed)
        theirs = int(process(torch.tensor([tokens]), torch.tensor(logits)[None]).argmax())
        token, _ = sampler(logits)
        assert token == theirs
        tokens.append(token)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.75, frequency_penalty=0.5)
    sampler = Sampler(params, [0, 1, 2], (), 4)
    logits = np.array([2.0, 1.9, 0.0, 0.0], np.float32)
    # 0: 2.0 → 0.75 → 0.75 …; 1: 1.9 → 0.65 …; 2 and 3 stay at 0 until the others are below
    assert [sampler(logits)[0] for _ in range(4)] == [0, 1, 0, 1]
    assert sampler(logits)[0] == 0  # 2.0 − 0.75 − 2 · 0.5 = 0.25
    assert sampler(logits)[0] == 1  # 1.9 − 0.75 − 2 · 0.5 = 0.15
    assert sampler(logits)[0] == 2  # 0 is at −0.25, 1 at −0.35


def test_bias_and_the_least_length() -> None:
    logits = np.array([5.0, 4.0, 3.0], np.float32)
    assert Sampler(SamplingParams(temperature=0, logit_bias={2: 2.5}), [0], (), 3)(logits)[0] == 2
    assert Sampler(SamplingParams(temperature=0, logit_bias={0: -100}), [0], (), 3)(logits)[0] == 1
    sampler = Sampler(SamplingParams(temperature=0, min_tokens=2), [0], (0, 1), 3)
    assert [sampler(logits)[0] for _ in range(3)] == [2, 2, 0]
    drawn = Sampler(SamplingParams(min_tokens=50), [0], (0, 1), 3)
    assert {drawn(logits)[0] for _ in range(50)} == {2}


def test_greedy_takes_the_lowest_of_equals_and_so_does_top_k() -> None:
    logits = np.array([1, 3, 3, 3], np.float32)
    for params in (
        SamplingParams(temperature=0),
        SamplingParams(top_k=1),
        SamplingParams(top_p=0),
        SamplingParams(temperature=1e-9),
    ):
        assert Sampler(params, [0], (), 4)(logits)[0] == 1


def test_draws_follow_the_distribution() -> None:
    """χ² of 20 000 draws; 99.9 % of right samplers stay below the bound (22.5 at 6 degrees of freedom)."""
    logits = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.02], np.float32))
    for params, expected in [
        (SamplingParams(seed=1), softmax(logits)),
        (SamplingParams(seed=2, temperature=0.5), softmax(logits, 0.5)),
        (SamplingParams(seed=3, top_p=0.75), brute_force(logits, SamplingParams(top_p=0.75))),
    ]:
        sampler = Sampler(params, [0], (), 7)
        counts = np.bincount([sampler(logits)[0] for _ in range(20_000)], minlength=7)
        assert counts[expected == 0].sum() == 0
        likely = expected > 0
        wanted = 20_000 * expected[likely]
        assert ((counts[likely] - wanted) ** 2 / wanted).sum() < 22.5


def test_seed_and_choice_decide() -> None:
    def texts(**values: int) -> list[int]:
        sampler = Sampler(SamplingParams(**values), [0], (), SIZE)
        return [sampler(row(step, spread=1.0))[0] for step in range(20)]

    assert texts(seed=5) == texts(seed=5)
    assert len({tuple(texts(seed=seed, choice=choice)) for seed in (5, -6, 2**62) for choice in (0, 1)}) == 6


@given(seed=st.integers(0, 1000), count=st.integers(0, 60))
def test_logprobs_are_log_softmax_of_the_raw_logits(seed, count) -> None:
    logits = row(seed)
    found = logprobs(logits, 3, count)
    exact = np.log(softmax(logits))
    assert found.chosen == pytest.approx(exact[3])
    assert [value for _, value in found.top] == pytest.approx(sorted(exact, reverse=True)[:count])
    assert all(exact[id] == pytest.approx(value) for id, value in found.top)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(value) -> None:
    with pytest.raises(PenjingError, match="not finite"):
        Sampler(SamplingParams(), [0], (), 3)(np.array([1, value, 2], np.float32))
