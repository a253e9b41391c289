"""The native sampler of a sequence, from what its request asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..kernels import Sampler
from .messages import SamplingParams

MASK64 = 2**64 - 1


def sampler_for(params: SamplingParams, prompt: Sequence[int], end_tokens: Iterable[int], vocab_size: int) -> Sampler:
    """Chooses the tokens of one sequence; the rules are those of `SamplingParams`, in the order of its docstring.

    Raises ValueError for tokens outside the vocabulary; drawing raises PenjingError for logits that are not finite, and
    where nothing is allowed. The same seed and choice draw the same tokens from the same logits, on every machine.
    """
    return Sampler(
        list(prompt),
        sorted(end_tokens),
        vocab_size,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=list(params.logit_bias.items()),
        seed=params.seed & MASK64,
        choice=params.choice,
        min_tokens=params.min_tokens,
    )
