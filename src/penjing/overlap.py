"""Is text that was calibrated on being taken for held-out text? Found by runs of words that both have.

What is kept of a text is a sketch: the `KEPT` smallest hashes of its different runs of eight words (Broder, "On the
resemblance and containment of documents", 1997). Of another text's runs, those that hash below the largest of these
are looked for, which is as if they were drawn by lot.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from .errors import BadInput

KEPT = 1024
RUN = 8
MOST, FEWEST = 0.1, 4  # share, and number, of common runs from which on a text was not held out
# Where words are not written apart, each sign counts as one.
_WORD = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+")


def sketch(texts: Iterable[str]) -> list[int]:
    """The smallest hashes of the runs of words in texts, in ascending order."""
    return sorted(_hashes(texts))[:KEPT]


def check_held_out(texts: Iterable[str], calibrated: Sequence[int], where: str) -> None:
    """BadInput if much of the texts was calibrated on, as a sketch of that shows: what is lost there says nothing."""
    if not calibrated:
        return
    largest = calibrated[-1] if len(calibrated) == KEPT else 1 << 64
    drawn = {value for value in _hashes(texts) if value <= largest}
    both = len(drawn.intersection(calibrated))
    if both >= FEWEST and both > MOST * len(drawn):
        raise BadInput(
            f"{where}: about {both / len(drawn):.0%} of it was calibrated on, and what is lost there says nothing of"
            " other text; give text that was held out"
        )


def _hashes(texts: Iterable[str]) -> set[int]:
    found = set()
    for text in texts:
        words = _WORD.findall(text)
        for start in range(len(words) - RUN + 1):
            run = " ".join(words[start : start + RUN]).encode("utf-8", "replace")
            found.add(int.from_bytes(hashlib.blake2b(run, digest_size=8).digest(), "big"))
    return found
