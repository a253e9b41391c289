"""transformers' graph of a checkpoint: its large weights on Penjing's kernels, everything else in float32.

A weight is read once, in what it is stored in; no more than one of them is ever there as floats. Tensors that
transformers renames or puts together as it loads (experts, mostly) go the same way here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers import __version__ as version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D

from ...checkpoint import Checkpoint
from ...checkpoint.folder import module_of
from ...errors import BadCheckpoint, Unsupported
from ...kernels import Matrix, matrix_from
from ..weights import Activations, make_matrix
from .empty import build_empty, quietly
from .weights import Experts, KernelWeight


def load_graph(checkpoint: Checkpoint, activations: Activations = "auto") -> Any:
    """transformers' model of a checkpoint; ``activations`` as for `models.load`.

    Raises Unsupported when transformers cannot build the architecture, BadCheckpoint for tensors that do not fit.
    """
    with quietly():
        graph = _empty(checkpoint)
        names = _Names(graph, checkpoint)
        placed = {target for target in names.plain if _place_plain(graph, target, names, activations)}
        placed |= {target for target in names.merged if _place_experts(graph, target, names, activations)}
        missing = _load_rest(graph, names, placed)
        _tie(graph, missing)
    if left := sorted(missing & {name for name, _ in graph.named_parameters()}):
        raise BadCheckpoint(
            f"{checkpoint.path}: tensor {left[0]} is missing; transformers' {type(graph).__name__} calls for it"
        )
    return graph.eval()


def _empty(checkpoint: Checkpoint) -> Any:
    """The graph, its parameters without memory, its buffers computed. Code from the folder never runs."""
    family = checkpoint.config.get("model_type")
    if family not in CONFIG_MAPPING:
        raise Unsupported(
            f"{checkpoint.path}: model_type = {family!r}: neither Penjing nor transformers {version} knows this family"
        )

    def build() -> Any:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
        config.__dict__.pop("quantization_config", None)  # how weights are stored is the checkpoint's to know
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)

    graph = build_empty(checkpoint, build)
    graph.config._experts_implementation = "eager"  # one product an expert, as its weights are stored
    return graph


@dataclass
class _Merged:
    """Tensors that make one of the graph's: ``sources[pattern]`` in the order in which they are put together."""

    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)


class _Names:
    """Which tensor of the checkpoint is which of the graph.

    plain: the graph's name → the checkpoint's.  merged: the graph's name → what it is made of.
    """

    def __init__(self, graph: Any, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.conversions = get_model_conversion_mapping(graph)
        self.plain: dict[str, str] = {}
        self.merged: dict[str, _Merged] = {}
        converters = [each for each in self.conversions if isinstance(each, WeightConverter)]
        renamings = [each for each in self.conversions if not isinstance(each, WeightConverter)]
        makes = {pattern: each for each in converters for pattern in each.source_patterns}
        wanted, prefix = graph.state_dict(), graph.base_model_prefix
        for name in sorted(checkpoint.names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
            if target not in wanted:
                target, pattern = rename_source_key(name, [], [], prefix, wanted)
            if target in wanted and pattern is None:
                self.plain[target] = name
            elif target in wanted:
                merged = self.merged.setdefault(target, _Merged(makes[pattern]))
                merged.sources.setdefault(str(pattern), []).append(name)

    def of(self, target: str) -> list[str]:
        """The checkpoint's names of one of the graph's."""
        if target in self.plain:
            return [self.plain[target]]
        return [name for names in self.merged[target].sources.values() for name in names]


def _owner(graph: Any, target: str) -> tuple[Any, str]:
    """The module that a tensor of the graph belongs to, and what it calls it."""
    parent, _, last = target.rpartition(".")
    return graph.get_submodule(parent), last


def _put(graph: Any, target: str, weight: KernelWeight | Experts, checkpoint: Checkpoint) -> None:
    module, last = _owner(graph, target)
    right = tuple(getattr(module, last).shape)
    if tuple(weight.shape) != right:
        raise BadCheckpoint(
            f"{checkpoint.path}: tensor {target} has shape {tuple(weight.shape)}, config.json calls for {right}"
        )
    delattr(module, last)
    setattr(module, last, weight)


def _place_plain(graph: Any, target: str, names: _Names, activations: Activations) -> bool:
    """Put a kernel's weight in the place of a parameter, if it is one of a linear layer, an embedding or experts."""
    checkpoint, source = names.checkpoint, names.plain[target]
    module, last = _owner(graph, target)
    if last == "weight" and isinstance(module, (nn.Linear, nn.Embedding)):
        matrix = _matrix(checkpoint, source, activations)
        _put(graph, target, KernelWeight([matrix]), checkpoint)
    elif last == "weight" and isinstance(module, Conv1D):
        if checkpoint.is_compressed(module_of(source)):
            raise Unsupported(f"{checkpoint.path}: {source} is compressed, but stored (in, out): its groups lie across")
        stored = checkpoint.read(source)
        _put(graph, target, KernelWeight([matrix_from(np.ascontiguousarray(stored.T))], transposed=True), checkpoint)
    elif _holds_experts(module, last) and len(checkpoint.infos[source].shape) == 3:
        slices = range(checkpoint.infos[source].shape[0])
        parts = (checkpoint.read(source, slice(expert, expert + 1))[0] for expert in slices)
        _put(graph, target, Experts([KernelWeight([matrix_from(part)]) for part in parts]), checkpoint)
    else:
        return False
    return True


def _holds_experts(module: Any, last: str) -> bool:
    """Is this a tensor (experts, out, in) that `nn.functional.linear` is given expert by expert?"""
    parameter = getattr(module, last)
    return getattr(module, "is_transposed", None) is False and last.endswith("_proj") and parameter.ndim == 3


def _place_experts(graph: Any, target: str, names: _Names, activations: Activations) -> bool:
    """The same for experts that the checkpoint has one by one, gate and up apart."""
    merged, (module, last) = names.merged[target], _owner(graph, target)
    merge, *rest = merged.converter.operations
    stacked = isinstance(merge, MergeModulelist) and merge.dim == 0
    joined = not rest or (len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1)
    if not (_holds_experts(module, last) and stacked and joined):
        return False
    parts = [merged.sources.get(pattern, []) for pattern in merged.converter.source_patterns]
    checkpoint = names.checkpoint
    if len({len(part) for part in parts}) > 1:
        raise BadCheckpoint(f"{checkpoint.path}: {target}: its parts are {[len(part) for part in parts]} tensors")
    weights = [
        KernelWeight([_matrix(checkpoint, source, activations) for source in expert])
        for expert in zip(*parts, strict=True)
    ]
    _put(graph, target, Experts(weights), checkpoint)
    return True


def _matrix(checkpoint: Checkpoint, source: str, activations: Activations) -> Matrix:
    module = module_of(source)
    return make_matrix(checkpoint, module, checkpoint.weight(module), activations)


def _load_rest(graph: Any, names: _Names, placed: set[str]) -> set[str]:
    """Load what no kernel holds, as transformers does → names that the checkpoint has not."""
    checkpoint = names.checkpoint
    targets = [target for target in (*names.plain, *names.merged) if target not in placed]
    stored = {name: _floats(checkpoint, name) for target in targets for name in names.of(target)}
    settings = LoadStateDictConfig(dtype=torch.float32, weight_mapping=names.conversions)
    found, _ = convert_and_load_state_dict_in_model(graph, stored, settings)
    if found.mismatched_keys:
        name, shape, right = min(found.mismatched_keys)
        raise BadCheckpoint(
            f"{checkpoint.path}: tensor {name} has shape {tuple(shape)}, config.json calls for {tuple(right)}"
        )
    if found.conversion_errors:
        name, reason = min(found.conversion_errors.items())
        raise BadCheckpoint(f"{checkpoint.path}: tensor {name}: {' '.join(str(reason).split())[:200]}")
    return set(found.missing_keys)


def _floats(checkpoint: Checkpoint, name: str) -> Tensor:
    array = checkpoint.tensor(name)
    return torch.from_numpy(array if array.dtype.kind in "biu" else array.astype(np.float32))


def _tie(graph: Any, missing: set[str]) -> None:
    """Tensors that are one, whichever of them is stored; those that are stored apart stay apart."""
    for target, source in graph.get_expanded_tied_weights_keys(all_submodels=True).items():
        first, second = (source, target) if target in missing or source not in missing else (target, source)
        if second in missing:
            (module, last), (other, its) = _owner(graph, second), _owner(graph, first)
            tied = getattr(other, its)
            delattr(module, last)
            setattr(module, last, tied)
            missing.discard(second)
