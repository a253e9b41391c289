"""The sampler in numpy, rule by rule: the twin of native/decoder/sample.cpp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from penjing.engine.messages import SamplingParams
from penjing.models.step import Logprobs

GREEDY_BELOW = 1e-5


class Reference:
    """Chooses the tokens of one sequence."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], end_tokens: Iterable[int], vocab_size: int):
        self.params = params
        key = np.array([params.seed % 2**64, params.choice], np.uint64)
        self._draw = np.random.Generator(np.random.Philox(key=key))
        self._ends = sorted(end_tokens)
        self._written: list[int] = []
        self._prompt = list(prompt)

    def next(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        adjusted = self._adjust(logits.copy())
        if allowed is not None:
            adjusted[~allowed] = -np.inf
        token = int(adjusted.argmax())
        if self.params.temperature >= GREEDY_BELOW:
            ids, probabilities = distribution(adjusted, self.params)
            cumulative = np.cumsum(probabilities)
            index = np.searchsorted(cumulative, self._draw.random() * cumulative[-1], side="right")
            token = int(ids[min(int(index), len(ids) - 1)])
        self._written.append(token)
        return token

    def _adjust(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        params = self.params
        for token, bias in params.logit_bias.items():
            logits[token] += np.float32(bias)
        if params.repetition_penalty != 1:
            penalty = np.float32(params.repetition_penalty)
            for token in {*self._prompt, *self._written}:
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        counts = np.bincount(np.array(self._written, np.int64), minlength=len(logits))
        frequent = logits - counts * np.float64(np.float32(params.frequency_penalty))
        logits = frequent.astype(np.float32) - np.float32(params.presence_penalty) * (counts > 0)
        if len(self._written) < params.min_tokens:
            logits[self._ends] = -np.inf
        return logits


def distribution(logits: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, likeliest first where top_k or top_p cuts, and their probabilities (sum 1)."""
    exact = logits.astype(np.float64)
    weights = np.exp((exact - exact.max()) * (1 / params.temperature))  # relative to the likeliest, which has 1
    ids = np.flatnonzero(weights >= params.min_p)
    if 0 < params.top_k < len(ids):
        ids = _likeliest_first(ids, logits)[: params.top_k]
    if params.top_p < 1:
        ids = _likeliest_first(ids, logits)
        reached = np.cumsum(weights[ids])
        ids = ids[: int(np.searchsorted(reached, params.top_p * reached[-1])) + 1]
    return ids, weights[ids] / weights[ids].sum()


def _likeliest_first(ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.int64]:
    return ids[np.argsort(-logits[ids], kind="stable")]


def logprobs(logits: NDArray[np.float32], token: int, alternatives: int) -> Logprobs:
    """Log-softmax of the logits at the token, and the likeliest alternatives, best first."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    best = np.argsort(-exact, kind="stable")[:alternatives]
    return Logprobs(float(exact[token]), [(int(id), float(exact[id])) for id in best])
