"""Text from tokens: stop strings, whole characters, bytes of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from penjing.engine.messages import Event
from penjing.models.step import Logprobs
from penjing.models.tokenizer import Tokenizer
from penjing.serve.text import Choice, StopStrings, TokenBytes

NOVELIST = Path(__file__).parents[2] / "examples" / "novelist"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(NOVELIST)


LETTERS = st.text("abc", max_size=5)


@given(pieces=st.lists(LETTERS, max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_stop_strings_end_the_text_where_the_first_one_begins(pieces: list[str], stops: list[str]) -> None:
    one = StopStrings(stops)
    shown = ""
    for index, piece in enumerate(pieces):
        shown += one.push(piece)
        so_far = "".join(pieces[: index + 1])
        assert so_far.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert one.found == any(stop in so_far for stop in stops)
        if one.found:
            assert shown == so_far[: min(so_far.index(stop) for stop in stops if stop in so_far)]
            break
        assert len(so_far) - len(shown) < max([len(stop) for stop in stops], default=1)
    if not one.found:
        assert shown + one.flush() == "".join(pieces)


def test_nothing_is_held_back_without_need() -> None:
    one = StopStrings(["END"])
    assert [one.push(piece) for piece in ("an E", "N", "d E", "ND of it")] == ["an ", "", "ENd ", ""]
    assert one.found


def events(tokens: list[int], reason: str | None = "length") -> list[Event]:
    return [
        Event(request_id="a", tokens=[token], finish_reason=reason if place == len(tokens) - 1 else None)
        for place, token in enumerate(tokens)
    ]


@pytest.mark.parametrize("text", ["It was a dark night.", " naïve – 東京 😀 ok", "\n\n'Oh!'  two"])
def test_characters_come_whole(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    choice = Choice(0, tokenizer, [])
    pieces = [choice.take(event) for event in events(tokens)]
    assert "".join(piece.text for piece in pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(piece.text for piece in pieces)
    assert choice.completion_tokens == len(tokens)
    assert choice.offset == len(text)


def test_an_incomplete_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("😀")
    assert len(tokens) > 1
    choice = Choice(0, tokenizer, [])
    pieces = [choice.take(event) for event in events(tokens[:-1])]
    assert "".join(piece.text for piece in pieces) == "\N{REPLACEMENT CHARACTER}"


def test_the_end_token_is_counted_and_not_shown(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("so"), 1]
    for show, text in ((False, "so"), (True, "so</s>")):
        choice = Choice(0, tokenizer, [], show_end=show, skip_special_tokens=False)
        pieces = [choice.take(event) for event in events(tokens, "stop")]
        assert "".join(piece.text for piece in pieces) == text
        assert choice.completion_tokens == len(tokens)
        assert (pieces[-1].finish_reason, choice.done) == ("stop", True)


def test_stop_strings_wait_for_the_least_length(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a b a b a b")
    choice = Choice(0, tokenizer, [], stops=["b"], min_tokens=4)
    pieces = []
    for event in events(tokens):
        pieces.append(choice.take(event))
        if choice.done:
            break
    assert "".join(piece.text for piece in pieces).count("b") >= 1
    assert choice.completion_tokens >= 4
    assert pieces[-1].finish_reason == "stop"


def test_tokens_carry_offsets_and_logprobs(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("It was a dark")
    choice = Choice(0, tokenizer, [], offset=7)
    found = []
    for token in tokens:
        found += choice.take(Event(request_id="a", tokens=[token], logprobs=[Logprobs(-1.0, [])])).tokens
    assert [each.offset for each in found] == [7, 9, 13, 15]
    assert [each.id for each in found] == tokens


@given(text=st.text(max_size=30))
def test_bytes_of_byte_level_tokens(text: str) -> None:
    tokenizer = Tokenizer(NOVELIST)
    bytes_of = TokenBytes(tokenizer)
    assert b"".join(map(bytes_of, tokenizer.encode(text))) == text.encode()


def test_bytes_of_other_tokens(tokenizer: Tokenizer) -> None:
    class Other:
        backend = Backend(models.BPE(vocab={"▁the": 0, "<0xE2>": 1, "x": 2}, merges=[], byte_fallback=True))

    Other.backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_of = TokenBytes(Other)
    assert [bytes_of(token) for token in range(4)] == [b" the", b"\xe2", b"x", b""]
    assert TokenBytes(tokenizer)(1) == b"</s>"
