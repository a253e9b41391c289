"""The native sampler against its numpy twin, and both against closed forms, brute force and transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_sampler import Reference, distribution, logprobs

from penjing import kernels
from penjing.engine.messages import SamplingParams
from penjing.engine.sampler import sampler_for
from penjing.errors import PenjingError
from penjing.kernels import Sampler, log_probabilities

SIZE = 40


def row(seed: int, size: int = SIZE, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def following(sampler: Sampler, logits: np.ndarray) -> int:
    return sampler.next(logits.copy())[0]


def mask_of(allowed: np.ndarray) -> np.ndarray:
    """Booleans (vocabulary,) as a grammar's words."""
    bits = np.zeros(-(-len(allowed) // 32) * 32, np.uint8)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.uint32)


def dense(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    ids, probabilities = distribution(logits, params)
    full = np.zeros(len(logits))
    full[ids] = probabilities
    assert len(set(ids.tolist())) == len(ids)
    return full


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    exact = logits.astype(np.float64) / temperature
    exact = np.exp(exact - exact.max())
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


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-9, 1e-5, 0.01, 0.7, 1.0, 2.0]),
        "top_k": st.sampled_from([-1, 0, 1, 2, 50, 64, 65, 1000]),
        "top_p": st.sampled_from([0.0, 1e-9, 0.3, 0.5, 0.95, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.4, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.3, -0.1]),
        "min_tokens": st.integers(0, 4),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "choice": st.integers(0, 2**31 - 1),
    }
)


def texts(values: dict, size: int, levels: int | None, spread: float, share: float) -> tuple[list[int], list[int]]:
    """A text by both samplers. levels: so many different logits, hence ties; share: of tokens that are allowed."""
    rng = np.random.default_rng(abs(values["seed"]))
    bias = {int(token): 1.5 for token in rng.integers(0, size, 2)} if size > 2 else {}
    params = SamplingParams(logit_bias=bias, **values)
    prompt, ends = rng.integers(0, size, 5).tolist(), [0] if size > 1 else []
    native, reference = sampler_for(params, prompt, ends, size), Reference(params, prompt, ends, size)
    ours, theirs = [], []
    for _ in range(8):
        logits = rng.normal(0, spread, size).astype(np.float32)
        if levels:
            logits = (rng.integers(0, levels, size) - levels // 2).astype(np.float32)
        allowed = None
        if share < 1:
            allowed = rng.random(size) < share
            allowed[-1] = True
            native.allow(mask_of(allowed))
        ours.append(following(native, logits))
        theirs.append(reference.next(logits, allowed))
    return ours, theirs


@settings(max_examples=400, deadline=None)
@given(
    values=SETTINGS,
    size=st.sampled_from([1, 2, 31, 63, 64, 65, 129, 1000, 5003]),
    levels=st.sampled_from([None, 1, 2, 9]),
    spread=st.sampled_from([1e-30, 0.1, 3.0, 1e4]),  # 1e-30: all weigh 1; near 1 but not 1, rounding decides a nucleus
    share=st.sampled_from([1.0, 0.5, 0.01]),
)
def test_native_and_numpy_choose_the_same_tokens(values, size, levels, spread, share) -> None:
    ours, theirs = texts(values, size, levels, spread, share)
    assert ours == theirs


def test_the_wide_searches_choose_the_same_tokens() -> None:
    """Vocabularies where the likeliest blocks do not hold all that is needed, and selections too long to sort."""
    flat = {"temperature": 2.0, "seed": 3}
    for values in ({"top_p": 0.97}, {"top_k": 9000}, {"top_k": 9000, "top_p": 0.6}, {"min_p": 1e-5, "top_p": 0.9}, {}):
        ours, theirs = texts({**flat, **values}, 33_001, None, 0.5, 1.0)
        assert ours == theirs


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 2),
    top_k=st.integers(-1, 50),
    top_p=st.floats(0.01, 0.99),
    min_p=st.floats(0, 0.9),
)
def test_distribution_is_what_the_rules_say(seed, temperature, top_k, top_p, min_p) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_allclose(dense(row(seed), params), brute_force(row(seed), params), rtol=1e-9, atol=1e-12)


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


@pytest.mark.parametrize(
    "values",
    [{}, {"temperature": 0.5}, {"top_p": 0.75}, {"top_k": 3}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}],
)
def test_draws_follow_the_distribution(values) -> None:
    """χ² of 20 000 draws; 99.9 % of right samplers stay below the bound (22.5 at 6 degrees of freedom)."""
    logits = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.02], np.float32))
    params = SamplingParams(seed=1, **values)
    expected = brute_force(logits, params)
    sampler = sampler_for(params, [0], (), 7)
    counts = np.bincount([following(sampler, logits) for _ in range(20_000)], minlength=7)
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    wanted = 20_000 * expected[likely]
    assert ((counts[likely] - wanted) ** 2 / wanted).sum() < 22.5


def test_repetition_penalty_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation")
    prompt = [3, 3, 7, 11]
    sampler = sampler_for(SamplingParams(temperature=0, repetition_penalty=1.8), prompt, (), SIZE)
    tokens = list(prompt)
    process = generation.RepetitionPenaltyLogitsProcessor(1.8)
    for seed in range(30):
        logits = row(seed)
        theirs = int(process(torch.tensor([tokens]), torch.tensor(logits)[None]).argmax())
        assert following(sampler, logits) == theirs
        tokens.append(theirs)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.75, frequency_penalty=0.5)
    sampler = sampler_for(params, [0, 1, 2], (), 4)
    logits = np.array([2.0, 1.9, 0.0, 0.0], np.float32)
    # 0: 2.0 → 0.75 → 0.75 …; 1: 1.9 → 0.65 …; 2 and 3 stay at 0 until the others are below
    assert [following(sampler, logits) for _ in range(4)] == [0, 1, 0, 1]
    assert following(sampler, logits) == 0  # 2.0 − 0.75 − 2 · 0.5 = 0.25
    assert following(sampler, logits) == 1  # 1.9 − 0.75 − 2 · 0.5 = 0.15
    assert following(sampler, logits) == 2  # 0 is at −0.25, 1 at −0.35


def test_bias_and_the_least_length() -> None:
    logits = np.array([5.0, 4.0, 3.0], np.float32)
    assert following(sampler_for(SamplingParams(temperature=0, logit_bias={2: 2.5}), [0], (), 3), logits) == 2
    assert following(sampler_for(SamplingParams(temperature=0, logit_bias={0: -100}), [0], (), 3), logits) == 1
    sampler = sampler_for(SamplingParams(temperature=0, min_tokens=2), [0], (0, 1), 3)
    assert [following(sampler, logits) for _ in range(3)] == [2, 2, 0]
    drawn = sampler_for(SamplingParams(min_tokens=50), [0], (0, 1), 3)
    assert {following(drawn, logits) for _ in range(50)} == {2}


def test_greedy_takes_the_lowest_of_equals_and_so_does_top_k() -> None:
    logits = np.full(200, 1, np.float32)
    logits[[70, 90, 199]] = 3
    for params in (
        SamplingParams(temperature=0),
        SamplingParams(top_k=1),
        SamplingParams(top_p=0),
        SamplingParams(temperature=1e-9),
    ):
        assert following(sampler_for(params, [0], (), 200), logits) == 70


@pytest.mark.parametrize("dtype", [np.uint32, np.int32])
def test_a_mask_holds_for_one_token_and_rows_for_as_many(dtype) -> None:
    logits = np.arange(70, dtype=np.float32)
    sampler = sampler_for(SamplingParams(temperature=0), [0], (), 70)
    only = [mask_of(np.arange(70) == token).view(dtype) for token in (31, 64, 5)]
    sampler.allow(only[0])
    assert [following(sampler, logits) for _ in range(2)] == [31, 69]
    sampler.allow(np.stack(only))
    assert [following(sampler, logits) for _ in range(4)] == [31, 64, 5, 69]
    sampler.allow(np.stack(only))
    assert following(sampler, logits) == 31
    sampler.allow(only[2])  # in place of the rows that are left
    assert [following(sampler, logits) for _ in range(2)] == [5, 69]
    sampler.allow(np.full(1, 2**32 - 1, np.uint32))  # tokens beyond the words are not allowed
    assert following(sampler, logits) == 31
    sampler.allow(np.full(9, 2**32 - 1, np.uint32))  # words beyond the tokens do not matter
    assert following(sampler, logits) == 69


@pytest.mark.parametrize("values", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.5}])
def test_nothing_is_allowed(values) -> None:
    sampler = sampler_for(SamplingParams(min_tokens=1, **values), [0], (2,), 40)
    sampler.allow(mask_of(np.arange(40) == 2))
    with pytest.raises(PenjingError, match="no token may come next"):
        following(sampler, row(0))
    sampler.allow(mask_of(np.arange(40) == 7))
    assert following(sampler, row(0)) == 7


def test_penalties_that_overflow() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1e-6)
    with pytest.raises(PenjingError, match="with their penalties are not finite"):
        following(sampler_for(params, [1], (), 3), np.array([1, 3e38, 2], np.float32))


def test_seed_and_choice_decide() -> None:
    def text(**values: int) -> list[int]:
        sampler = sampler_for(SamplingParams(**values), [0], (), SIZE)
        return [following(sampler, row(step, spread=1.0)) for step in range(20)]

    assert text(seed=5) == text(seed=5)
    assert len({tuple(text(seed=seed, choice=choice)) for seed in (5, -6, 2**62) for choice in (0, 1)}) == 6


@given(seed=st.integers(0, 2**64 - 1), choice=st.integers(0, 2**31 - 1))
@example(seed=2**64 - 1, choice=0)
def test_uniforms_are_those_of_philox(seed, choice) -> None:
    """Of 4096 equally likely tokens in the order of ids, the uniform's first twelve bits are drawn."""
    sampler = Sampler([], [], 4096, seed=seed, choice=choice)
    key = np.array([seed, choice], np.uint64)
    uniforms = np.random.Generator(np.random.Philox(key=key)).random(11)
    found = [following(sampler, np.zeros(4096, np.float32)) for _ in range(11)]
    assert found == (uniforms * 4096).astype(int).tolist()


@given(seed=st.integers(0, 1000), guesses=st.integers(0, 5), right=st.floats(0, 1))
def test_guesses_change_nothing(seed, guesses, right) -> None:
    """A step with guesses calls the sampler at each position while the draw is the guess; the text stays the same."""
    params = SamplingParams(seed=seed, temperature=0.8, top_p=0.9, frequency_penalty=0.5, repetition_penalty=1.2)
    rng = np.random.default_rng(seed)

    def logits(tokens: list[int]) -> np.ndarray:
        return row(hash(tuple(tokens)) % 2**32)

    def plain() -> list[int]:
        sampler, tokens = sampler_for(params, [1, 2], (), SIZE), [1, 2]
        while len(tokens) < 20:
            tokens.append(following(sampler, logits(tokens)))
        return tokens

    sampler, tokens, truth = sampler_for(params, [1, 2], (), SIZE), [1, 2], plain()
    while len(tokens) < 20:
        wrong = rng.random(guesses) > right
        coming = truth[len(tokens) : len(tokens) + guesses]
        guessed = [(token + 1) % SIZE if bad else token for token, bad in zip(coming, wrong, strict=False)]
        positions = [logits(tokens + guessed[:i]) for i in range(len(guessed) + 1)]  # one step of the model
        for i, each in enumerate(positions):
            tokens.append(following(sampler, each))
            if i == len(guessed) or tokens[-1] != guessed[i]:
                break
    assert tokens[:20] == truth


@settings(deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(0, 250), size=st.sampled_from([1, 40, 200, 3001]))
def test_logprobs_are_log_softmax_of_the_raw_logits(seed, count, size) -> None:
    logits = row(seed, size)
    token = seed % size
    chosen, top = log_probabilities(logits, token, count)
    expected = logprobs(logits, token, count)
    assert chosen == pytest.approx(expected.chosen, abs=1e-12)
    assert [id for id, _ in top] == [id for id, _ in expected.top]
    assert [value for _, value in top] == pytest.approx([value for _, value in expected.top], abs=1e-12)
    params = SamplingParams(temperature=0, logit_bias={token: 100}, repetition_penalty=1.5, seed=seed)
    drawn, found = sampler_for(params, [0], (), size).next(logits.copy(), count)
    assert drawn == token
    assert found == (chosen, top)  # bias and penalties do not show


@pytest.mark.parametrize("size", [3, 64, 200])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("values", [{}, {"temperature": 0}, {"top_k": 2, "frequency_penalty": 1.0}])
def test_logits_that_are_not_finite(value, values, size) -> None:
    for at in (0, size // 2, size - 1):
        logits = row(0, size)
        logits[at] = value
        with pytest.raises(PenjingError, match="not finite; its weights are damaged"):
            sampler_for(SamplingParams(**values), [0], (), size).next(logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [9], "repetition_penalty": 2.0}, "token 9 is outside the vocabulary of 9"),
        ({"end_tokens": [-1]}, "token -1 is outside the vocabulary of 9"),
        ({"logit_bias": [(9, 1.0)]}, "token 9 is outside"),
        ({"logit_bias": [(1, np.inf)]}, "logit_bias: give finite"),
        ({"vocabulary": 0, "prompt": [], "end_tokens": []}, "vocabulary: give 1 to"),
        ({"temperature": np.nan}, "temperature: give 0 or more"),
        ({"top_p": 1.5}, "top_p: give 0 to 1"),
        ({"min_p": -1.0}, "min_p: give 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: give more than 0"),
        ({"presence_penalty": np.inf}, "presence_penalty: give a finite"),
        ({"frequency_penalty": np.nan}, "frequency_penalty: give a finite"),
    ],
)
def test_rules_that_cannot_be(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**{"prompt": [1], "end_tokens": [2], "vocabulary": 9, **change})


def test_arrays_that_do_not_fit() -> None:
    sampler = Sampler([], [], 9)
    with pytest.raises(ValueError, match=r"logits: give a contiguous float32 array \(9\)"):
        sampler.next(np.zeros(8, np.float32))
    with pytest.raises(ValueError, match=r"masks: give a contiguous uint32 array \(any\)"):
        sampler.allow(np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="token 9 is outside"):
        log_probabilities(np.zeros(9, np.float32), 9, 1)


def every_kind_of_text() -> list[object]:
    found: list[object] = []
    for values in ({}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.01}, {"temperature": 0.0}):
        sampler = sampler_for(SamplingParams(seed=7, repetition_penalty=1.1, **values), [1, 2, 3], (), 7001)
        for step in range(20):
            token, logprob = sampler.next(row(step, 7001), 3)
            found.append([token, logprob])
    return found


@pytest.mark.parametrize("isa", ["scalar", "neon", "avx2", "avx-vnni", "avx512-vnni"])
def test_every_instruction_set_draws_the_same_bit_for_bit(isa) -> None:
    say = "import json, test_sampler; print(json.dumps(test_sampler.every_kind_of_text()))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PENJING_ISA": isa, "PYTHONPATH": path}
    answer = subprocess.run([sys.executable, "-c", say], env=environment, capture_output=True, text=True)
    if f"PENJING_ISA={isa}: " in answer.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == json.loads(json.dumps(every_kind_of_text())), kernels.isa()
