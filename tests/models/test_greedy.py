"""The likeliest token by the head's screen: the same tokens as by all logits, and who is not screened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penjing import kernels, models
from penjing.models.model import Model
from penjing.models.step import Chunk, Result
from stepping import table

VOCABULARY = 3000
LARGE = {"vocab_size": VOCABULARY, "hidden_size": 64, "max_position_embeddings": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LARGE,
    "qwen3": LARGE | {"head_dim": 8, "tie_word_embeddings": True},
    "granite": LARGE | {"logits_scaling": 3.0},
}


def ready(folder: Path, **settings: Any) -> Model:
    model = models.load(folder, **settings)
    model.reserve(64, "float32", 8)
    return model


@pytest.fixture(params=FAMILIES)
def both(request: pytest.FixtureRequest, tiny: Any) -> tuple[Model, Model]:
    """A model with a screen, and without."""
    _, folder = tiny(request.param, **FAMILIES[request.param])
    return ready(folder, screen=True), ready(folder)


def sampler(**rules: Any) -> kernels.Sampler:
    return kernels.Sampler([], [7], VOCABULARY, **{"temperature": 0.0} | rules)


def write(model: Model, streams: int, count: int, guess: Callable[[list[int]], list[int]] | None = None) -> Any:
    """Tokens of ``streams`` greedy texts that go on together."""
    rng = np.random.default_rng(streams)
    texts = [rng.integers(0, VOCABULARY, 5 + 3 * stream).tolist() for stream in range(streams)]
    samplers = [sampler() for _ in texts]
    starts = [0] * streams
    while min(map(len, texts)) < count:
        chunks = []
        for stream, text in enumerate(texts):
            guesses = guess(text) if guess and starts[stream] else []
            ids = np.array([*text[starts[stream] :], *guesses], np.int32)
            places = table(200, 7 * stream)
            chunks.append(
                Chunk(ids, starts[stream], places, sampler=samplers[stream], guesses=len(guesses), slot=stream)
            )
        for stream, result in enumerate(model.step(chunks)):
            assert result.error is None
            starts[stream] = len(texts[stream]) + len(result.tokens) - 1
            texts[stream] += result.tokens
    return [text[:count] for text in texts]


def test_the_same_texts_alone_and_together(both: tuple[Model, Model]) -> None:
    screened, plain = both
    assert screened.screen is not None
    assert plain.screen is None
    for streams in (1, 2, 8, 9):  # more than eight are not screened
        assert write(screened, streams, 60) == write(plain, streams, 60)


def test_the_same_text_with_guesses(both: tuple[Model, Model]) -> None:
    screened, plain = both
    (right,) = write(plain, 1, 60)
    for guess in (
        lambda text: right[len(text) : len(text) + 3],
        lambda text: [*right[len(text) : len(text) + 1], 5, 5],
        lambda text: [5],
    ):
        assert write(screened, 1, 60, guess) == [right]


def one(model: Model, ids: Any, **more: Any) -> Result:
    (result,) = model.step([Chunk(np.array(ids, np.int32), 0, table(len(ids)), **more)])
    assert result.error is None
    return result


def likeliest(model: Model, ids: Any) -> list[int]:
    return np.argsort(-model.logits([Chunk(np.array(ids, np.int32), 0, table(len(ids)))])[0][-1]).tolist()


def test_the_screen_is_what_finds_it(tiny: Any) -> None:
    """With the screen of another matrix the token is another one, unless more than the likeliest is asked."""
    _, folder = tiny("llama", **LARGE)
    model = ready(folder)
    turned = kernels.screen_of(kernels.matrix_from(-model.head.decode()))
    model.screen = turned
    wrong = models.load(folder)
    wrong._decoder = model._decoder.__class__(
        wrong.config, wrong.embedding.native, (wrong.head.native, None), wrong.final_norm, turned.native
    )
    for block, weights in zip(wrong.config.blocks, wrong.weights, strict=True):
        wrong._decoder.add_block(block, *weights.native())
    wrong.reserve(64, "float32", 8)
    ids = [3, 1, 4]
    best, second = likeliest(model, ids)[:2]
    assert one(model, ids, sampler=sampler()).tokens == [best]
    assert one(wrong, ids, sampler=sampler()).tokens != [best]
    for more in (
        {"sampler": sampler(), "logprobs": 0},
        {"sampler": sampler(), "score": (0, -1)},
        {"sampler": sampler(repetition_penalty=1.1)},
        {"sampler": sampler(presence_penalty=0.1)},
        {"sampler": sampler(temperature=0.01)},
        {"sampler": sampler(min_tokens=2)},
    ):
        assert one(wrong, ids, **more).tokens == [best], more
    assert one(wrong, ids, sampler=sampler(logit_bias=[(second, 100.0)])).tokens == [second]
    masked = sampler()
    masked.allow(np.full(-(-VOCABULARY // 32), 2**32 - 1, np.uint32))
    assert one(wrong, ids, sampler=masked).tokens == [best]


def test_penalties_go_on_from_what_was_screened(tiny: Any) -> None:
    """min_tokens counts tokens that the screen found, and what is asked may change from one to the next."""
    _, folder = tiny("llama", **LARGE)
    screened, plain = ready(folder, screen=True), ready(folder)
    found = []
    for model in (screened, plain):
        drawn, text = sampler(min_tokens=3), [3, 1, 4]
        for step in range(6):
            text += one(model, text, sampler=drawn, **({"logprobs": 2} if step % 2 else {})).tokens
        found.append(text)
    assert found[0] == found[1]


def test_heads_without_a_screen(tiny: Any) -> None:
    _, folder = tiny("gemma2", **LARGE, head_dim=16)
    assert models.load(folder, screen=True).screen is None  # a soft cap makes different products equal


def test_it_is_counted(both: tuple[Model, Model]) -> None:
    screened, plain = both
    assert screened.screen is not None
    assert screened.weights_bytes == plain.weights_bytes + screened.screen.nbytes
    assert screened.read_bytes == plain.read_bytes + screened.screen.nbytes - plain.head.nbytes
