"""What the settings of a method may be: one line that says what is wrong and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import BadRecipe, nearest


def number(name: str, value: Any, low: float, high: float) -> None:
    """A finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRecipe(f"{name}={value!r}: give a number from {low:g} to {high:g}")


def whole(name: str, value: Any, low: int, high: int) -> None:
    """A whole number in [low, high]."""
    if type(value) is not int or not low <= value <= high:
        raise BadRecipe(f"{name}={value!r}: give a whole number from {low} to {high}")


def flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise BadRecipe(f"{name}={value!r}: give true or false")


def word(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise BadRecipe(f"{name}={value!r} is unknown: {nearest(str(value), known)}")
