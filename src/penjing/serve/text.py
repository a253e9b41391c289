"""From tokens back to text, piece by piece: whole characters, and nothing that may become a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer as Backend

from ..engine.messages import Event
from ..models.step import Logprobs
from ..models.tokenizer import Tokenizer


class StopStrings:
    """Passes text on until one of the stop strings appears; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What can be shown now. After `found`, nothing more."""
        if self.found:
            return ""
        text = self._held + text
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            place, stop = min(places, key=lambda found: (found[0], -len(found[1])))
            return text[: place + len(stop)] if self._include else text[:place]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and is no stop string after all."""
        rest, self._held = self._held, ""
        return rest

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of the text that is a beginning of the stop string."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Token:
    """A token in an answer.  offset: characters of the text before it.  logprobs: None for the first of a prompt."""

    id: int
    offset: int
    logprobs: Logprobs | None


@dataclass
class Piece:
    """What an event added to one choice."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Choice:
    """One text being written.

    stops, min_tokens: stop strings count from so many tokens on.  show_end: the token or string that ends the text is
    part of it.  cached_tokens: of the prompt, found in the engine's cache.  offset: characters before the text (of a
    prompt that is echoed).
    """

    index: int
    tokenizer: Tokenizer
    prompt: Sequence[int]
    stops: Sequence[str] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True
    show_end: bool = False
    offset: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self._detokenizer = self.tokenizer.detokenizer(self.prompt, skip_special_tokens=self.skip_special_tokens)
        self._stop = StopStrings(self.stops, self.show_end)

    def take(self, event: Event) -> Piece:
        """The piece that an event makes; `finish_reason` "stop" also if a stop string ended the text."""
        piece = Piece(self.index)
        self.cached_tokens += event.cached_tokens
        logprobs: Sequence[Logprobs | None] = event.logprobs or [None] * len(event.tokens)
        for position, (token, found) in enumerate(zip(event.tokens, logprobs, strict=True)):
            self.completion_tokens += 1
            ends = event.finish_reason == "stop" and position == len(event.tokens) - 1
            if ends and not self.show_end:
                break
            piece.tokens.append(Token(token, self.offset, found))
            piece.text += self._show(self._detokenizer.push(token))
            if self._stop.found:
                break
        if event.finish_reason and not self._stop.found:
            piece.text += self._show(self._detokenizer.flush())
            piece.text += self._stop.flush()
        piece.finish_reason = "stop" if self._stop.found else event.finish_reason
        self.done = piece.finish_reason is not None
        return piece

    def _show(self, text: str) -> str:
        self.offset += len(text)
        return text if self.completion_tokens < self.min_tokens else self._stop.push(text)


class TokenBytes:
    """The bytes of single tokens, which need not be whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend: Backend = tokenizer.backend
        self._byte_level = b"ByteLevel" in (self._backend.decoder.__getstate__() if self._backend.decoder else b"")
        self._added = {id: each.content for id, each in self._backend.get_added_tokens_decoder().items()}

    def __call__(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        written = self._backend.id_to_token(token)
        if written is None:  # a vocabulary padded beyond the tokenizer's
            return b""
        if self._byte_level:
            return bytes(_BYTE_OF[letter] for letter in written if letter in _BYTE_OF)
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", written):
            return bytes([int(match.group(1), 16)])
        return written.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _byte_letters() -> dict[str, int]:
    """GPT-2's writing of bytes as letters: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
