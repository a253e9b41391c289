"""Damaged configurations of every family: refused in one line that names what is wrong, or described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from variants import SHAPE, VARIANTS

from penjing.errors import BadInput
from penjing.models.families import FAMILIES, describe

WRONG: tuple[Any, ...] = (
    *(None, 0, -1, 1, 3, 7, 2**31, 1e308, -0.5, 0.3, float("nan"), True, "", "llama"),
    *([], {}, [1, 2], ["full_attention"], [None] * 3, {"full_attention": 3}, {"1": {"head_dim": 3}}),
)


def complete(variant: str) -> dict[str, Any]:
    """config.json as transformers writes it, with every key that it knows."""
    transformers = pytest.importorskip("transformers")
    family, changes = VARIANTS[variant]
    config: dict[str, Any] = transformers.AutoConfig.for_model(family, **{**SHAPE, **changes}).to_dict()
    return config


def damaged(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in config.items():
        yield {k: v for k, v in config.items() if k != key}
        yield from ({**config, key: wrong} for wrong in WRONG)
        if isinstance(value, dict):
            yield from ({**config, key: inner} for inner in damaged(value))


def test_every_family_has_a_variant() -> None:
    assert {family.removesuffix("_text") for family, _ in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_damaged_configurations_are_refused_or_described(variant: str) -> None:
    messages = [said for config in damaged(complete(variant)) if (said := refusal(config)) is not None]
    assert len(messages) > 100
    assert all(message.startswith("config.json: ") and "\n" not in message for message in messages)


def refusal(config: dict[str, Any]) -> str | None:
    try:
        describe(config, "config.json")
    except BadInput as error:
        return str(error)
    return None
