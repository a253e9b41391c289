"""Structured pruning: channels, filters, neurons or heads go, and every tensor that depends on them shrinks.

What depends on what is found by torch-pruning's dependency graph (Fang et al., 2023, "DepGraph").
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, PenjingError
from .data import evaluating
from .heads import HEAD_COUNTS, cut_heads, heads_of
from .settings import STRUCTURES, Settings
from .targets import Target

SIZES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "num_channels",
    "normalized_shape",
    "num_embeddings",
    "embedding_dim",
    "input_size",
    "hidden_size",
    "num_parameters",
    *HEAD_COUNTS,
)


class Structured:
    """The module's dependency graph, cut in rounds."""

    def __init__(
        self,
        root: nn.Module,
        targets: list[Target],
        inputs: Any,
        pattern: str,
        settings: Settings,
        heads: Mapping[str, int],
    ) -> None:
        self._root, self._pattern, self._inputs = root, pattern, inputs
        self._types, self._whole = STRUCTURES[pattern], settings.scope == "global"
        self._method, self._importance, self._seed = settings.method, _importance(settings.method), settings.seed
        self._heads = heads_of(root, pattern, heads)
        self._shape = self._output_shapes()
        named = {id(target.module) for target in targets}
        self._others = [part for part in root.modules() if isinstance(part, self._types) and id(part) not in named]
        self._outputs = self._output_layers()
        self._first = {target.name: _shapes(target) for target in targets}
        self._sizes = {part: _plain_sizes(part) for part in root.modules()}
        self._done = 0.0
        if all(any(t.module is part for part in self._outputs) for t in targets if isinstance(t.module, self._types)):
            raise BadInput(f"pattern={pattern!r}: every layer of {type(root).__name__} is an output; none can be cut")

    def shrink(self, amount: float) -> None:
        """Cut until that share of what was there at the start is gone."""
        share = 1 - (1 - amount) / (1 - self._done)
        with torch.random.fork_rng(devices=[]), _tracing(self._root):
            torch.manual_seed(self._seed)
            if self._pattern == "heads":
                self._heads = cut_heads(self._root, self._inputs, self._heads, share, self._method)
            else:
                self._cut_channels(share)
        self._done = amount
        if self._output_shapes() != self._shape:
            raise BadInput(
                f"pattern={self._pattern!r} would change the module's output from {self._shape} to"
                f" {self._output_shapes()}: name the last layers in ignore"
            )
        for part, before in self._sizes.items():
            if changed := {key: value for key, value in _plain_sizes(part).items() if before[key] != value}:
                part.__dict__["resized"] = part.__dict__.get("resized", {}) | changed

    def _cut_channels(self, share: float) -> None:
        import torch_pruning

        pruner = torch_pruning.pruner.BasePruner(
            self._root,
            self._inputs,
            self._importance,
            global_pruning=self._whole,
            pruning_ratio=share,
            num_heads=dict(self._heads),
            ignored_layers=[*self._outputs, *self._others],
            root_module_types=list(self._types),
        )
        pruner.step()

    def describe(self, target: Target) -> str:
        before, after = self._first[target.name], _shapes(target)
        return "as it was" if before == after else f"{before} → {after}"

    def _output_layers(self) -> list[nn.Module]:
        """Layers whose outputs reach no other layer's inputs: cutting them would cut the module's answer."""
        import torch_pruning

        with _tracing(self._root):
            graph = torch_pruning.DependencyGraph().build_dependency(self._root, self._inputs)
            found = []
            for part in self._root.modules():
                if isinstance(part, self._types) and graph.check_pruning_group(self._probe(graph, part)):
                    group = self._probe(graph, part)
                    if not any(graph.is_in_channel_pruning_fn(item.dep.handler) for item in group):
                        found.append(part)
        return found

    @staticmethod
    def _probe(graph: Any, part: nn.Module) -> Any:
        return graph.get_pruning_group(part, graph.get_pruner_of_module(part).prune_out_channels, idxs=[0])

    def _output_shapes(self) -> Any:
        with evaluating(self._root):
            try:
                output = self._root(*self._inputs) if isinstance(self._inputs, tuple) else self._root(self._inputs)
            except (RuntimeError, AssertionError, ValueError, TypeError) as error:
                raise PenjingError(
                    f"the module does not run on example_inputs: {str(error).splitlines()[0]}"
                ) from error
        parts = output if isinstance(output, (tuple, list)) else [output]
        return [tuple(part.shape) for part in parts if isinstance(part, Tensor)]


def _importance(method: str) -> Any:
    import torch_pruning

    if method == "random":
        return torch_pruning.importance.RandomImportance()
    return torch_pruning.importance.GroupMagnitudeImportance(p=1 if method == "l1" else 2)


def _shapes(target: Target) -> str:
    return ", ".join("×".join(map(str, target.module.get_parameter(name).shape)) for name in target.parameters)


def _plain_sizes(part: nn.Module) -> dict[str, Any]:
    return {name: part.__dict__[name] for name in SIZES if isinstance(part.__dict__.get(name), (int, tuple))}


@contextlib.contextmanager
def _tracing(root: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on every parameter, which is how torch-pruning finds the graph; quietly."""
    frozen = [parameter for parameter in root.parameters() if not parameter.requires_grad]
    modes = [(part, part.training) for part in root.modules()]
    root.eval()
    for parameter in frozen:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for part, mode in modes:
            part.training = mode
