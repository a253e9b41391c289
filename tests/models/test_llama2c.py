"""A really trained model, told by another program: llama2.c's 260-thousand-parameter story teller.

Oracles: the story that run.c prints, its tokenizer's algorithm, and its forward pass in float64 on the file's numbers.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from penjing import models
from penjing.evaluate import evaluate
from penjing.models.tokenizer import Tokenizer
from stepping import all_logits, greedy

sys.path.insert(0, str(Path(__file__).parents[1]))
from convert_llama2c import BOS, Story, convert, read_model, read_tokenizer

DATA = Path(__file__).parents[1] / "data" / "llama2c"
TINYSTORIES = Path(__file__).parents[3] / "shared" / "material" / "corpora" / "tinystories_sample.txt"
STORY = (DATA / "story.txt").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DATA / "stories260K.bin", DATA / "tok512.bin", tmp_path_factory.mktemp("stories"))


def encode(pieces: list[tuple[str, float]], text: str) -> list[int]:
    """run.c's encoding: characters (or bytes), then the pair of the best score is merged, until none is left."""
    ids = {piece: token for token, (piece, _) in enumerate(pieces)}
    tokens = [ids[" "]] if text else []
    for character in text:
        tokens += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        pairs = [ids.get(pieces[a][0] + pieces[b][0], -1) for a, b in itertools.pairwise(tokens)]
        best = max(range(len(pairs)), key=lambda at: pieces[pairs[at]][1] if pairs[at] >= 0 else -1e10, default=0)
        if not pairs or pairs[best] < 0:
            return [BOS, *tokens]
        tokens[best : best + 2] = [pairs[best]]


def losses(story: Story, tokens: list[int]) -> np.ndarray:
    """run.c's forward pass in float64 for all positions at once: −ln p of each next token."""
    w = {name: tensor.astype(np.float64) for name, tensor in story.tensors.items()}
    n, d = len(tokens), story.dim // story.heads
    angle = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    turn = np.exp(1j * angle)[:, None]

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)

    def rotate(x: np.ndarray) -> np.ndarray:
        pairs = x.reshape(n, -1, d // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(n, -1, d)

    x = w["token_embedding_table"][tokens]
    for layer in range(story.layers):
        h = norm(x, w["rms_att_weight"][layer])
        q, k = rotate(h @ w["wq"][layer].T), rotate(h @ w["wk"][layer].T)
        v = (h @ w["wv"][layer].T).reshape(n, -1, d)
        k, v = (np.repeat(each, story.heads // story.kv_heads, axis=1) for each in (k, v))
        scores = np.exp(np.einsum("ihd,jhd->hij", q, k) / np.sqrt(d)) * np.tri(n)
        x = x + np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), v).reshape(n, -1) @ w["wo"][layer].T
        h = norm(x, w["rms_ffn_weight"][layer])
        gate = h @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][layer].T)) @ w["w2"][layer].T
    logits = norm(x, w["rms_final_weight"]) @ w["token_embedding_table"].T
    return np.log(np.exp(logits[:-1]).sum(axis=1)) - logits[np.arange(n - 1), tokens[1:]]


def nll(model: models.Model, tokens: list[int]) -> np.ndarray:
    logits = all_logits(model, tokens).astype(np.float64)
    return np.log(np.exp(logits[:-1]).sum(axis=1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("text", [STORY, "", " two  spaces ", "naïve 🎄\ttab", "don't!"])
def test_tokens_are_those_of_llama2c(text: str, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode(text) == encode(read_tokenizer(DATA / "tok512.bin"), text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_greedy_story_is_told_word_for_word(folder: Path) -> None:
    model, tokenizer = models.load(folder), Tokenizer(folder)
    stream = tokenizer.detokenizer([BOS])
    told = "".join(stream.push(token) for token in greedy(model, [BOS], 256))
    assert told + stream.flush() == STORY


def test_losses_equal_those_of_llama2c_in_float64(folder: Path) -> None:
    tokens = Tokenizer(folder).encode(STORY)
    right = losses(read_model(DATA / "stories260K.bin"), tokens)
    np.testing.assert_allclose(nll(models.load(folder), tokens), right, atol=2e-5)
    assert evaluate(folder, [STORY]).loss == pytest.approx(right.mean(), abs=1e-5)
    # A trained model is sure of its own story; an untrained one has ln 512 = 6.2.
    assert right.mean() < 0.6


@pytest.mark.skipif(not TINYSTORIES.exists(), reason="the TinyStories sample is not part of the repository")
def test_perplexity_on_tinystories(folder: Path) -> None:
    stories = TINYSTORIES.read_text().split("<|endoftext|>")
    texts = ["\n".join(line for line in story.split("\n") if line.strip()) for story in stories]
    result = evaluate(folder, [text for text in texts if text], context_length=512)
    assert result.tokens == 1804
    assert result.perplexity == pytest.approx(3.55, abs=0.005)
