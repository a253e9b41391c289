"""What a step does besides logits, the same bits in any step, and what is refused; logits are tested by family."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variants import VARIANTS

import penjing
from penjing import kernels, models
from penjing.checkpoint import open_checkpoint, write_safetensors
from penjing.errors import BadInput
from penjing.models.step import Chunk, Result
from stepping import table

RNG = np.random.default_rng(7)


def tokens(count: int) -> np.ndarray:
    return RNG.integers(0, 97, count).astype(np.int32)


def ready(folder: Path, kv_type: str = "float32", **settings: Any) -> models.Model:
    model = models.load(folder, **settings)
    model.reserve(32, kv_type, slots=8)
    return model


# One of each kind of mixer and of what works on tokens alone.
KINDS = ["qwen3", "gemma2", "deepseek_v3", "gpt_oss", "qwen3_next", "gemma4"]


@pytest.mark.parametrize("variant", KINDS)
def test_chunks_give_the_same_as_the_whole(variant: str, tiny: Any) -> None:
    """To rounding: products of floats sum in another order for other numbers of rows."""
    family, changes = VARIANTS[variant]
    _, folder = tiny(family, **changes)
    model = ready(folder, length=64)
    ids = tokens(60)
    whole = model.logits([Chunk(ids, 0, table(60))])[0]
    scattered = np.array([9, 4, 17], np.int32)[: len(table(60))]
    parts, start = [], 0
    for size in (1, 31, 1, 20, 7):
        chunk = Chunk(ids[start : start + size], start, scattered, slot=3)
        other = Chunk(tokens(5), 0, table(5, 20), slot=1)
        parts.append(model.logits([other, chunk])[1])
        start += size
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-4, rtol=1e-4)


WHOLE = {
    "version": 1,
    "ignore": ["re:.*embed", "re:.*norm"],
    "rules": [{"targets": "*", "quantize": {"method": "rtn", "bits": 8, "group_size": 4}}],
}


@pytest.fixture
def integers(tiny: Any, tmp_path: Path) -> Callable[[str], Path]:
    """make(variant) → folder of a model whose products are all of integers."""

    def make(variant: str) -> Path:
        family, changes = VARIANTS[variant]
        _, folder = tiny(family, tie_word_embeddings=False, **changes)
        recipe = tmp_path / "recipe.json"
        recipe.write_text(json.dumps(WHOLE))
        penjing.compress(folder, tmp_path / "small", recipe=recipe)
        return tmp_path / "small"

    return make


@pytest.mark.parametrize("kv_type", ["float32", "float16", "int8"])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "qwen3_next", "qwen3_moe"])
def test_a_sequence_gives_the_same_bits_in_any_step(variant: str, kv_type: str, integers: Any) -> None:
    """Alone and whole, or in pieces beside others, and for any number of threads."""
    model = ready(integers(variant), kv_type, length=64)
    ids = tokens(60)
    whole = model.logits([Chunk(ids, 0, table(60))])[0]
    scattered = np.array([9, 4], np.int32)
    before = kernels.threads()
    for threads, sizes in ((1, (33, 1, 1, 25)), (3, (1, 31, 1, 20, 7))):
        kernels.set_threads(threads)
        parts, start = [], 0
        for size in sizes:
            chunk = Chunk(ids[start : start + size], start, scattered, slot=3)
            others = [Chunk(tokens(5), 0, table(5, 20), slot=1), Chunk(tokens(40), 0, table(40, 22), slot=2)]
            parts.append(model.logits([others[0], chunk, others[1]])[1])
            start += size
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    kernels.set_threads(before)


def greedy(model: models.Model) -> kernels.Sampler:
    return kernels.Sampler([], [], model.config.vocab_size, temperature=0.0)


def test_drawing_follows_the_logits(tiny: Any) -> None:
    _, folder = tiny("llama")
    model = ready(folder)
    ids, other = tokens(20), tokens(9)
    logits = model.logits([Chunk(ids, 0, table(20))])[0]
    filled, drawn = model.step(
        [Chunk(other, 0, table(9, 4)), Chunk(ids, 0, table(20), sampler=greedy(model), logprobs=3)]
    )
    assert filled == Result()
    assert drawn.tokens == [int(logits[-1].argmax())]
    assert drawn.error is None
    exact = logits[-1].astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max()).sum()) + exact.max()
    (found,) = drawn.logprobs
    assert found.chosen == pytest.approx(exact.max(), abs=1e-4)
    assert [token for token, _ in found.top] == np.argsort(-exact)[:3].tolist()


@pytest.mark.parametrize("follower", [-1, 5])
def test_scores_of_a_prompt(follower: int, tiny: Any) -> None:
    """More rows than are looked at together, in two chunks, one with a draw."""
    _, folder = tiny("llama", max_position_embeddings=200)
    model = ready(folder)
    ids = tokens(150)
    logits = model.logits([Chunk(ids, 0, table(150))])[0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    (first,) = model.step([Chunk(ids[:80], 0, table(150), score=(2, int(ids[80])))])
    (second,) = model.step([Chunk(ids[80:], 80, table(150), sampler=greedy(model), score=(2, follower))])
    followers = [*ids[1:].tolist(), *([follower] if follower >= 0 else [])]
    scores = first.scores + second.scores
    assert (len(first.scores), len(scores)) == (80, len(followers))
    right = exact[np.arange(len(followers)), followers]
    np.testing.assert_allclose([score.chosen for score in scores], right, atol=2e-4)
    assert [token for token, _ in scores[7].top] == np.argsort(-exact[7])[:2].tolist()
    assert second.tokens == [int(exact[-1].argmax())]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_guesses_change_nothing_but_the_number_of_steps(temperature: float, tiny: Any) -> None:
    _, folder = tiny("llama")
    model = ready(folder)

    def write(guess: Callable[[list[int]], list[int]]) -> tuple[list[int], int]:
        sampler = kernels.Sampler([], [], 97, temperature=temperature, seed=4)
        ids, steps = PROMPT.tolist(), 0
        (result,) = model.step([Chunk(PROMPT, 0, table(64), sampler=sampler)])
        ids += result.tokens
        while len(ids) < 40:
            guesses = guess(ids)
            chunk = np.array([ids[-1], *guesses], np.int32)
            (result,) = model.step(
                [Chunk(chunk, len(ids) - 1, table(64), sampler=sampler, guesses=len(guesses), logprobs=0)]
            )
            assert len(result.logprobs) == len(result.tokens) <= len(guesses) + 1
            ids += result.tokens
            steps += 1
        return ids[:40], steps

    plain, slow = write(lambda ids: [])
    right, quick = write(lambda ids: plain[len(ids) : len(ids) + 3])  # always right
    half, _ = write(lambda ids: [*plain[len(ids) : len(ids) + 1], 3, 3])
    wrong, same = write(lambda ids: [(plain[len(ids)] + 1) % 97] if len(ids) < 40 else [])
    assert plain == right == half == wrong
    assert quick < slow == same


PROMPT = tokens(9)


def test_a_sequence_that_is_not_finite_fails_alone(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_nonfinite", lambda array: False)  # which would refuse it at load
    _, folder = tiny("llama")
    weights = folder / "model.safetensors"
    tensors = {name: open_checkpoint(folder).tensor(name).copy() for name in open_checkpoint(folder).names}
    tensors["model.embed_tokens.weight"][7] = np.nan
    write_safetensors(weights, tensors)
    model = ready(folder)
    bad, good = np.array([3, 7], np.int32), np.array([3, 4], np.int32)
    broken, fine = model.step(
        [Chunk(each, 0, table(2, at), sampler=greedy(model)) for at, each in enumerate((bad, good))]
    )
    assert broken.error is not None
    assert "not finite" in broken.error
    assert (broken.tokens, fine.error, len(fine.tokens)) == ([], None, 1)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ({"tokens": np.array([97], np.int32)}, "token 97 is outside the vocabulary of 97"),
        ({"tokens": np.array([-1], np.int32)}, "token -1 is outside"),
        ({"tokens": np.array([], np.int32)}, "one or more are needed"),
        ({"tokens": np.array([1], np.int64)}, "tokens: give a contiguous int32 array"),
        ({"start": 64}, "positions for 64"),
        ({"start": -1}, "positions for 64"),
        ({"start": 2**62}, "positions for 64"),
        ({"start": 32}, "need 2 cache blocks; the table has 1"),
        ({"table": np.array([32], np.int32)}, "cache block 32 is not one of the 32"),
        ({"table": np.array([-1], np.int32)}, "cache block -1"),
        ({"guesses": 1}, "1 guesses among 1 tokens"),
        ({"guesses": -1}, "-1 guesses"),
        ({"score": (0, 97)}, "token 97 is outside"),
        ({"sampler": 96}, "vocabulary of 96 tokens; the model has 97"),
    ],
)
def test_chunks_that_cannot_be(chunk: dict[str, Any], message: str, tiny: Any) -> None:
    _, folder = tiny("llama")
    model = ready(folder)
    right: dict[str, Any] = {"tokens": np.array([1], np.int32), "start": 0, "table": table(1)}
    model.step([Chunk(**right)])
    if "sampler" in chunk:
        chunk = {"sampler": kernels.Sampler([], [], chunk["sampler"])}
    with pytest.raises(BadInput, match=message) as caught:
        model.step([Chunk(**right), Chunk(**right | chunk)])
    assert "\n" not in str(caught.value)


def test_states_are_checked_and_cleared(tiny: Any) -> None:
    family, changes = VARIANTS["qwen3_next"]
    _, folder = tiny(family, **changes)
    model = models.load(folder)
    assert model.has_state
    with pytest.raises(BadInput, match="one slot for models with a state"):
        model.reserve(4, "float32")
    model.reserve(4, "float32", slots=2)
    ids = tokens(12)
    first = model.logits([Chunk(ids, 0, table(12), slot=1)])[0]
    np.testing.assert_array_equal(model.logits([Chunk(ids, 0, table(12), slot=1)])[0], first)
    for slots in ((2,), (-1,), (0, 0)):
        with pytest.raises(BadInput, match="is not one of the 2 slots, or given twice"):
            model.step([Chunk(ids, 0, table(12, at), slot=slot) for at, slot in enumerate(slots)])
    with pytest.raises(BadInput, match="takes no guesses"):
        model.step([Chunk(ids, 0, table(12), sampler=greedy(model), guesses=1)])


def test_a_step_before_there_is_a_cache_and_caches_that_cannot_be(tiny: Any) -> None:
    _, folder = tiny("llama")
    model = models.load(folder)
    with pytest.raises(BadInput, match="reserve it first"):
        model.step([Chunk(tokens(1), 0, table(1))])
    with pytest.raises(BadInput, match="at least one block"):
        model.reserve(0, "float32")
    with pytest.raises(BadInput, match="kv_type: float8 is not known"):
        model.reserve(1, "float8")
    model.reserve(1, "float32")
    with pytest.raises(BadInput, match="at least one chunk"):
        model.step([])
    assert not model.has_state
    assert model.block_bytes("float32") >= 32 * model.config.kv_bytes_per_token
    assert model.block_bytes("int8") < model.block_bytes("float16") < model.block_bytes("float32")


def test_activations_are_counted(tiny: Any) -> None:
    """A step of many tokens makes the process larger by what was counted, and no more."""
    code = """
import sys, numpy as np
from penjing import models
from penjing.hardware import peak_memory_bytes
from penjing.models.step import Chunk
model = models.load(sys.argv[1], threads=1)
model.reserve(20, "float16")
ids, table = np.ones(600, np.int32), np.arange(20, dtype=np.int32)
model.step([Chunk(ids[:2], 0, table)])
before = peak_memory_bytes()
model.step([Chunk(ids, 0, table)])
print(peak_memory_bytes() - before, model.activation_bytes(600), 20 * model.block_bytes("float16"))
"""
    sizes = {"hidden_size": 512, "intermediate_size": 8192, "max_position_embeddings": 1024, "num_hidden_layers": 1}
    _, folder = tiny("llama", **sizes)
    ran = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    grown, counted, cache = map(int, ran.stdout.split())
    assert counted > 30 << 20
    # Beside what is counted, the products' own copies of their activations, and the cache that was first written.
    assert grown <= 1.1 * counted + cache + (8 << 20)
    assert grown >= 0.7 * counted
