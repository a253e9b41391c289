"""What calibration says of whole layers, and of units inside them: how much the model would miss them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..checkpoint.safetensors import SafetensorsFile
from .graph import to_torch
from .inputs import is_routed, routing
from .stream import Calibrator, OpenBlock


def block_influence(calibrator: Calibrator, block: str) -> float:
    """1 − the mean cosine of the hidden states that come into a block and out of it, token by token.

    Men et al., 2024, "ShortGPT", arXiv 2403.03853. The block is passed on as it is.
    """
    with calibrator.open(block, lambda _: None) as opened:
        opened.advance()
    number = calibrator.order.index(block)
    total, count = 0.0, 0
    with SafetensorsFile(calibrator.file(number)) as before, SafetensorsFile(calibrator.file(number + 1)) as after:
        for row in range(len(calibrator.tokens)):
            one, two = (to_torch(each.read("hidden", slice(row, row + 1))).double() for each in (before, after))
            cosines = torch.nn.functional.cosine_similarity(one, two, dim=-1)
            total, count = total + float(cosines.sum()), count + cosines.numel()
    return 1 - total / count


class Routed:
    """While it lasts, notes what a block's router gives each expert: the sum of its squared weights over all tokens."""

    def __init__(self, opened: OpenBlock, experts: int) -> None:
        self.squares = np.zeros(experts)
        self._modules = [module for module in opened.live.module.modules() if is_routed(module)]
        self._hooks: list[Any] = []

    @property
    def possible(self) -> bool:
        return len(self._modules) == 1

    def __enter__(self) -> Routed:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = routing(module, args, kwargs)
            index, weights = given["top_k_index"].reshape(-1).cpu(), given["top_k_weights"].reshape(-1)
            squares = weights.detach().double().square().cpu()
            self.squares += torch.zeros(len(self.squares), dtype=torch.float64).index_add_(0, index, squares).numpy()

        self._hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def expert_influence(opened: OpenBlock, outputs: Mapping[int, float], experts: int) -> NDArray[np.float64] | None:
    """What each expert adds to the stream: its squared weight over all tokens times its mean squared output.

    As "REAP" weighs experts by what they give (Lasby et al., 2025, arXiv 2510.13999).  outputs: number → mean squared
    output; 0 for those that nothing came to. None where the block's router cannot be watched.
    """
    routed = Routed(opened, experts)
    if not routed.possible:
        return None
    with routed:
        opened.watch()
    found: NDArray[np.float64] = routed.squares * [outputs.get(number, 0.0) for number in range(experts)]
    return found
