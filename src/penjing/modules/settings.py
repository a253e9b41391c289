"""What `prune` is asked for, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from ..errors import BadInput, nearest

Method = Literal["l1", "l2", "random"]
Scope = Literal["layer", "global"]
# Structured patterns, and the layers whose outputs each cuts.
STRUCTURES: dict[str, tuple[type[nn.Module], ...]] = {
    "channel": (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    "filters": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "neurons": (nn.Linear,),
    "heads": (nn.Linear,),
}


@dataclass(frozen=True)
class Settings:
    """keep: (N, M) of an N:M pattern, or None."""

    amount: float
    method: Method
    scope: Scope
    keep: tuple[int, int] | None
    seed: int


def settings_of(amount: float | None, method: str, scope: str, pattern: str, seed: int) -> Settings:
    for name, value, known in (("method", method, get_args(Method)), ("scope", scope, get_args(Scope))):
        if value not in known:
            raise BadInput(f"{name}={value!r} is unknown: {nearest(str(value), known)}")
    keep = None
    if matched := re.fullmatch(r"(\d+):(\d+)", str(pattern)):
        keep = int(matched[1]), int(matched[2])
        if not 0 < keep[0] < keep[1]:
            raise BadInput(f"pattern={pattern!r}: N of M stay, with 0 < N < M, as in '2:4'")
        if amount is not None and amount != 1 - keep[0] / keep[1]:
            raise BadInput(f"amount={amount} contradicts pattern={pattern!r}, which removes {1 - keep[0] / keep[1]}")
        amount = 1 - keep[0] / keep[1]
    elif pattern != "unstructured" and pattern not in STRUCTURES:
        raise BadInput(f"pattern={pattern!r} is unknown: {nearest(str(pattern), ['unstructured', 'N:M', *STRUCTURES])}")
    amount = 0.5 if amount is None else amount
    if not 0 < amount < 1:
        raise BadInput(f"amount={amount}: the share to remove lies between 0 and 1, as in 0.5")
    return Settings(amount, method, scope, keep, seed)  # type: ignore[arg-type]
