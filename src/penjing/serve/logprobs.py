"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .text import Token, TokenBytes

LOWEST = -9999.0  # JSON has no −∞


def chat_logprobs(tokens: Sequence[Token], bytes_of: TokenBytes) -> dict[str, Any]:
    """``{content: [{token, logprob, bytes, top_logprobs}], refusal}``."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = bytes_of(token)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LOWEST), "bytes": list(raw)}

    content = [
        {**entry(each.id, each.logprobs.chosen), "top_logprobs": [entry(*best) for best in each.logprobs.top]}
        for each in tokens
        if each.logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Token], bytes_of: TokenBytes) -> dict[str, Any]:
    """``{tokens, token_logprobs, top_logprobs, text_offset}``; null where there is none (the first prompt token)."""
    return {
        "tokens": [_text(bytes_of(each.id)) for each in tokens],
        "token_logprobs": [max(each.logprobs.chosen, LOWEST) if each.logprobs else None for each in tokens],
        "top_logprobs": [
            {
                _text(bytes_of(id)): max(value, LOWEST)
                for id, value in [*each.logprobs.top, (each.id, each.logprobs.chosen)]
            }
            if each.logprobs
            else None
            for each in tokens
        ],
        "text_offset": [each.offset for each in tokens],
    }


def _text(raw: bytes) -> str:
    """A token as text, or as OpenAI writes one that is no whole character: ``bytes:\\xe2\\x80``."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
