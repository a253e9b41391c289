"""What attention puts into its cache: keys, turned and normed as they are kept, and values.

transformers' attention hands them to the cache that it is called with. So a cache that only looks is put there,
whatever the family is; rows go through whole and nothing comes before them, so that it gives back what it is given.
Attention is told from other layers as compressed-tensors tells it, which is to find the steps there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from ..checkpoint import kv_cache
from ..errors import PenjingError, Unsupported
from .block import LiveBlock, to_numpy
from .graph import Graph

ROWS = 256  # tokens whose keys and values are kept, to say what rounding them loses
# What attention's forward calls its cache, in one version of transformers or another.
_ARGUMENTS = ("cache", "past_key_values", "past_key_value")
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")


def attentions(graph: Graph, block: str) -> dict[str, nn.Module]:
    """The modules of a block that keep keys and values, by their names in the checkpoint.

    Raises Unsupported for attention that keeps latents, or that reads what another layer has kept: servers would use
    steps for these that nobody has found.
    """
    found = {}
    for name, module in graph.model.get_submodule(graph.modules[block]).named_modules():
        where = f"{graph.checkpoint.path}: kv_cache: {block}.{name}"
        if "attention" not in type(module).__name__.lower() or _argument(module) is None:
            continue
        if hasattr(module, "kv_b_proj"):
            raise Unsupported(f"{where} keeps latents, not keys and values; leave kv_cache out")
        if getattr(module, "is_kv_shared_layer", False):
            raise Unsupported(f"{where} reads the keys and values of another layer; leave kv_cache out")
        if any(hasattr(module, each) for each in _PROJECTIONS):
            found[f"{block}.{name}"] = module
    return found


def _argument(module: nn.Module) -> str | None:
    names = inspect.signature(module.forward).parameters
    return next((name for name in _ARGUMENTS if name in names), None)


def bytes_needed(modules: Mapping[str, nn.Module]) -> int:
    """What `Watch` keeps, and one part of it as it is rounded."""
    layers = [getattr(module, name, None) for module in modules.values() for name in _PROJECTIONS]
    return sum(5 * 4 * ROWS * layer.out_features for layer in layers if isinstance(layer, nn.Linear))


class Watch:
    """Sees what a block's attention keeps, from when it is made until it is closed.

    modules: as `attentions` found them.  batches: how often the block is run.
    """

    def __init__(self, live: LiveBlock, modules: Mapping[str, nn.Module], batches: int) -> None:
        self._live, self._batches = live, batches
        self._largest: dict[str, dict[str, float]] = {}
        self._samples: dict[str, dict[str, list[NDArray[np.float32]]]] = {}
        self._hooks = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, module in modules.items()
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = inspect.signature(module.forward).bind(*args, **kwargs)
            given.arguments[str(_argument(module))] = _Looking(self, name, self._live.graph.model.config)
            return given.args, given.kwargs

        return look

    def see(self, name: str, kept: Mapping[str, Tensor]) -> None:
        """See keys and values (batch, heads, length, head_dim). PenjingError for a NaN or an infinity."""
        largest = self._largest.setdefault(name, dict.fromkeys(kept, 0.0))
        samples = self._samples.setdefault(name, {each: [] for each in kept})
        for each, numbers in kept.items():
            top = float(torch.stack(numbers.aminmax()).abs().max())
            if not np.isfinite(top):
                raise PenjingError(f"{name}: {each} have a NaN or an infinity: the model overflows on this text")
            largest[each] = max(largest[each], top)
            by_token = numbers.transpose(1, 2)
            length, tokens = by_token.shape[1], by_token.shape[0] * by_token.shape[1]
            stride = max(1, tokens * self._batches // ROWS)
            chosen = torch.arange(stride // 2, tokens, stride, device=numbers.device)
            some = by_token[chosen // length, chosen % length]
            samples[each].append(to_numpy(some.to("cpu", torch.float32)))

    def steps(self) -> Iterator[tuple[str, dict[str, NDArray[Any]], dict[str, float]]]:
        """Each attention that kept something, with its tensors and what rounding by them loses: `kv_cache.encode`."""
        infos = self._live.graph.checkpoint.infos
        for name, largest in self._largest.items():
            stored = next(info for key, info in infos.items() if key.startswith(f"{name}.") and len(info.shape) == 2)
            sample = {each: np.concatenate(parts) for each, parts in self._samples[name].items()}
            yield name, *kv_cache.encode(largest, sample, stored.step_dtype)


class _Looking(DynamicCache):  # type: ignore[misc]
    """An empty cache that shows keys and values to a watch and keeps none of them."""

    def __init__(self, watch: Watch, name: str, config: Any) -> None:
        super().__init__(config=config)
        self._watch, self._name = watch, name

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._watch.see(self._name, {"keys": key_states, "values": value_states})
        return key_states, value_states
