"""From logits to the next token: bias and penalties, temperature, min-p, top-k, top-p (in this order), one draw.

A sequence draws from its own counter-based generator (Philox; Salmon et al., SC 2011), so its result depends on its
logits and its seed, not on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import PenjingError
from .messages import Logprobs, SamplingParams

Row: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = NDArray[np.int64]

GREEDY_BELOW = 1e-5  # temperatures that would overflow the division are greedy
MASK64 = 2**64 - 1


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], end_tokens: Iterable[int], vocab_size: int):
        self.params = params
        key = np.array([params.seed & MASK64, params.choice], np.uint64)
        self._draw = np.random.Generator(np.random.Philox(key=key))
        self._ends = np.array(sorted(end_tokens), np.int64)
        self._bias_ids = np.array(list(params.logit_bias), np.int64)
        self._bias = np.array(list(params.logit_bias.values()), np.float32)
        self._produced = 0
        self._seen: NDArray[np.bool_] | None = None
        self._counts: NDArray[np.int32] | None = None
        if params.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[np.asarray(prompt, np.int64)] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = np.zeros(vocab_size, np.int32)

    def __call__(self, logits: Row) -> tuple[int, Logprobs | None]:
        """The next token, from the model's logits (vocabulary,). Raises PenjingError if they are not finite."""
        if not np.isfinite(logits).all():
            raise PenjingError("the model's logits are not finite; its weights are damaged or out of range")
        adjusted = self._adjust(logits)
        token = int(adjusted.argmax())
        if self.params.temperature >= GREEDY_BELOW:
            ids, probabilities = distribution(adjusted, self.params)
            token = draw(ids, probabilities, self._draw.random())
        self._note(token)
        wanted = self.params.logprobs
        return token, None if wanted is None else logprobs(logits, token, wanted)

    def _adjust(self, logits: Row) -> Row:
        params = self.params
        forbid_end = self._produced < params.min_tokens and len(self._ends) > 0
        if not (len(self._bias_ids) or forbid_end or self._seen is not None or self._counts is not None):
            return logits
        adjusted = logits.copy()
        adjusted[self._bias_ids] += self._bias
        if self._seen is not None:
            penalize_repetition(adjusted, self._seen, params.repetition_penalty)
        if self._counts is not None:
            adjusted -= np.float32(params.frequency_penalty) * self._counts
            adjusted -= np.float32(params.presence_penalty) * (self._counts > 0)
        if forbid_end:
            adjusted[self._ends] = -np.inf
        return adjusted

    def _note(self, token: int) -> None:
        self._produced += 1
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1


def penalize_repetition(logits: Row, seen: NDArray[np.bool_], penalty: float) -> None:
    """In place: positive logits of seen tokens are divided by the penalty, negative ones multiplied."""
    before = logits[seen]
    logits[seen] = np.where(before > 0, before / np.float32(penalty), before * np.float32(penalty))


def distribution(logits: Row, params: SamplingParams) -> tuple[Ids, NDArray[np.float64]]:
    """The tokens that may be drawn, likeliest first where a rule cuts, and their probabilities (sum 1).

    min_p keeps tokens at least that fraction as likely as the likeliest; top_k the k likeliest of those; top_p the
    smallest set of the likeliest whose probabilities, among what is left, sum to top_p or more. Among equals the lower
    id counts as likelier. At least one token is left.
    """
    scaled = (logits - logits.max()) / np.float32(params.temperature)
    weights = np.exp(scaled, dtype=np.float64)  # relative to the likeliest, which has 1
    ids: Ids = np.arange(len(weights))
    if params.min_p > 0:
        ids = np.flatnonzero(weights >= params.min_p)
    if 0 < params.top_k < len(ids):
        kept = weights[ids]
        threshold = np.partition(kept, len(kept) - params.top_k)[len(kept) - params.top_k]
        ids = _likeliest_first(ids[kept >= threshold], weights)[: params.top_k]
    if params.top_p < 1:
        ids = _nucleus(ids, weights, params.top_p)
    kept = weights[ids]
    return ids, kept / kept.sum()


def _likeliest_first(ids: Ids, weights: NDArray[np.float64]) -> Ids:
    return ids[np.argsort(-weights[ids], kind="stable")]


def _nucleus(ids: Ids, weights: NDArray[np.float64], top_p: float) -> Ids:
    """Holtzman et al., arXiv 1904.09751."""
    total = weights[ids].sum()
    # All tokens below this bound together weigh less than 1 − top_p: the set never needs them, and sorting is short.
    bound = 0.999 * total * (1 - top_p) / len(ids)
    ordered = _likeliest_first(ids[weights[ids] >= bound], weights)
    reached = np.cumsum(weights[ordered])
    return ordered[: int(np.searchsorted(reached, top_p * total)) + 1]


def draw(ids: Ids, probabilities: NDArray[np.float64], uniform: float) -> int:
    """The token at which the cumulative probability passes ``uniform`` in [0, 1)."""
    cumulative = np.cumsum(probabilities)
    index = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return int(ids[min(int(index), len(ids) - 1)])


def logprobs(logits: Row, token: int, alternatives: int) -> Logprobs:
    """Log-softmax of the logits at the token, and the likeliest alternatives, best first."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    count = min(alternatives, len(exact))
    best: Ids = np.argpartition(-exact, count - 1)[:count] if count else np.empty(0, np.int64)
    best = best[np.lexsort((best, -exact[best]))]
    return Logprobs(float(exact[token]), [(int(id), float(exact[id])) for id in best])
