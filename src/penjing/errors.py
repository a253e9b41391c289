"""Every error Penjing raises on purpose.

    PenjingError            something went wrong on the way            exit 1
    ├── BadInput            the user's input cannot be used            exit 2
    │   ├── BadCheckpoint   a model folder or file is damaged or contradicts itself
    │   ├── BadRecipe       a recipe, a rule or a method's settings
    │   └── Unsupported     something that exists, but that Penjing cannot do
    └── OutOfBudget         does not fit in the memory or the disk that is there

A message is one line: what is wrong, where, and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PenjingError(Exception):
    """Base of all errors that Penjing raises on purpose; ``exit_code`` is the program's exit status."""

    exit_code = 1

    def __str__(self) -> str:
        """One line, whatever names a damaged file gave to what it holds: what cannot be printed is escaped."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class BadInput(PenjingError, ValueError):
    exit_code = 2


class BadCheckpoint(BadInput):
    pass


class BadRecipe(BadInput):
    pass


class Unsupported(BadInput):
    pass


class OutOfBudget(PenjingError):
    pass


def nearest(word: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
