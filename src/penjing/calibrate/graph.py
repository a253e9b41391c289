"""transformers' graph of a checkpoint, its parameters without memory: its blocks, and what they are called with.

Which tensor of the checkpoint is which of the graph is transformers' to say, experts that it puts together included.
What lies outside the blocks (embeddings, norms) is filled as its module runs and dropped again; of an embedding only
the rows that are looked up are read. So nothing here knows a family, and nothing needs the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

from ..checkpoint import Checkpoint
from ..checkpoint.blocks import layer_of, order_blocks
from ..errors import BadCheckpoint, Unsupported
from ..models.foreign.empty import build_empty, quietly


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor of the checkpoint that are rows of a parameter, both seen as matrices: ``rows`` of them."""

    name: str
    first: int
    at: int
    rows: int


@dataclass(frozen=True)
class Part:
    """What makes a tensor of the graph.

    sources: the checkpoint's tensors.  pieces: where their rows lie in it; None where it is no matter of rows, and
    ``converter`` makes the whole tensor.
    """

    sources: tuple[tuple[str, str], ...]
    pieces: tuple[Piece, ...] | None
    converter: Any = None


@dataclass(frozen=True)
class Call:
    """What a block was called with; its hidden states come in place of the first argument, or of ``hidden_states``.

    Other floating arguments (angles, masks) are given to it in the type of the hidden states.
    """

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module, hidden: Tensor) -> Tensor:
        args, kwargs = tree_map_only(Tensor, lambda each: _alike(each, hidden), (self.args[1:], self.kwargs))
        by_name = {} if self.args else {"hidden_states": hidden}
        found = module(*((hidden, *args) if self.args else ()), **{**kwargs, **by_name})
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments but the hidden states, in order."""
        return list(_tensors([self.args[1:], {k: v for k, v in self.kwargs.items() if k != "hidden_states"}]))


def _alike(tensor: Tensor, hidden: Tensor) -> Tensor:
    return tensor.to(hidden.dtype) if tensor.is_floating_point() else tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


class Graph:
    """A model that computes block by block.

    model: transformers' module.  parts: name of its tensors → what makes them.  modules: the checkpoint's blocks →
    the graph's, in order.  device: where it computes.
    Raises Unsupported when transformers cannot build the architecture, or it is not one stack of blocks.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        with quietly():
            self.model = _empty(checkpoint)
            self.parts = _match(self.model, checkpoint)
        for name, buffer in list(self.model.named_buffers()):
            if buffer.device.type != "meta":
                module, last = self.owner(name)
                module._buffers[last] = buffer.to(device)
        targets = {name: target for target, part in self.parts.items() for _, name in part.sources}
        self.modules: dict[str, str] = {}
        for block in order_blocks(checkpoint.infos):
            path = _module_path(targets, block.tensors) if block.is_layer else None
            if path is not None:
                self.modules[block.name] = path
        self._as_tuple = False

    def owner(self, target: str) -> tuple[nn.Module, str]:
        """The module that a tensor of the graph belongs to, and what it calls it."""
        parent, _, last = target.rpartition(".")
        return self.model.get_submodule(parent), last

    def tensor(self, target: str) -> Tensor:
        """A tensor of the graph as it is now, with or without memory."""
        module, last = self.owner(target)
        found: Tensor | None = module._parameters.get(last)
        found = module._buffers.get(last) if found is None else found
        assert found is not None
        return found

    def block_parts(self, block: str) -> dict[str, Part]:
        """The tensors of a block."""
        prefix = f"{self.modules[block]}."
        return {target: part for target, part in self.parts.items() if target.startswith(prefix)}

    def block_bytes(self, block: str) -> int:
        """Memory of a block's tensors."""
        found = 0
        for target, part in self.block_parts(block).items():
            tensor, (module, last) = self.tensor(target), self.owner(target)
            found += tensor.numel() * self._dtype(part, module, last, tensor).itemsize
        return found

    def states(self, block: str, dtype: torch.dtype) -> torch.dtype:
        """The type of hidden states in a block whose products are made in ``dtype``: that where all of it is stored so,
        as its own code was written for, else float32."""
        names = {name for part in self.block_parts(block).values() for _, name in part.sources}
        stored = {self._stored(name) for name in names if self.checkpoint.infos[name].dtype.kind in "fV"}
        return dtype if stored == {dtype} else torch.float32

    def _stored(self, name: str) -> torch.dtype:
        return to_torch(np.zeros(0, self.checkpoint.infos[name].dtype)).dtype

    def check_filled(self, block: str) -> None:
        """BadCheckpoint when a tensor that the graph of a block needs is not in the checkpoint."""
        prefix = self.modules[block]
        for name in self.model.get_submodule(prefix).state_dict():
            if f"{prefix}.{name}" not in self.parts:
                raise BadCheckpoint(
                    f"{self.checkpoint.path}: tensor {prefix}.{name} is missing;"
                    f" transformers' {type(self.model).__name__} calls for it"
                )

    def filled(self, target: str, other: torch.dtype = torch.float32) -> Tensor:
        """A tensor of the graph, read from the checkpoint: what linear layers multiply with as stored, what else is
        floating as ``other``."""
        part, empty, (module, last) = self.parts[target], self.tensor(target), self.owner(target)
        if part.pieces is None:
            values = self._converted(target, part)
            if values.shape != empty.shape:
                raise self._misshapen(target, values.shape, empty.shape)
            return values.to(self.device, other if values.is_floating_point() else values.dtype)
        filled = torch.empty(empty.shape, dtype=self._dtype(part, module, last, empty, other), device=self.device)
        rows, covered = as_rows(filled, part), 0
        for piece in part.pieces:
            shape = self.checkpoint.infos[piece.name].shape
            if part.converter is None and tuple(shape) != tuple(empty.shape):
                raise self._misshapen(target, shape, empty.shape)
            some = None if part.converter is None else slice(piece.first, piece.first + piece.rows)
            read = read_tensor(self.checkpoint, piece.name, some)
            rows[piece.at : piece.at + piece.rows] = read.reshape(piece.rows, -1)
            covered += piece.rows
        if covered != len(rows):
            raise BadCheckpoint(f"{self.checkpoint.path}: tensors of {target} make {covered} of its {len(rows)} rows")
        return filled

    def _dtype(
        self, part: Part, module: nn.Module, last: str, empty: Tensor, other: torch.dtype = torch.float32
    ) -> torch.dtype:
        """What products are made with stays as it is stored; what is not floating stays what it is."""
        if not empty.is_floating_point():
            return empty.dtype
        products = empty.ndim > 1 and (isinstance(module, nn.Linear) or len(part.sources) > 1)
        return self._stored(part.sources[0][1]) if products else other

    def _converted(self, target: str, part: Part) -> Tensor:
        converter = copy.deepcopy(part.converter)
        for pattern, name in part.sources:
            converter.add_tensor(target, name, pattern, read_tensor(self.checkpoint, name).float())
        made = converter.convert(target, model=self.model, config=self.model.config)[target]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def _misshapen(self, target: str, shape: Sequence[int], right: Sequence[int]) -> BadCheckpoint:
        return BadCheckpoint(
            f"{self.checkpoint.path}: tensor {target} has shape {tuple(shape)}, config.json calls for {tuple(right)}"
        )

    def put(self, target: str, value: Tensor | None) -> None:
        """Put a tensor in its place, or with None take it out again."""
        module, last = self.owner(target)
        new = self.tensor(target).to("meta") if value is None else value
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(new, requires_grad=False)
        else:
            module._buffers[last] = new

    def enter(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Hidden states (batch, length, width) that come to the first block, and what each block is called with.

        tokens: int64 (batch, length).
        """
        ways = (True,) if self._as_tuple else (False, True)
        reason = "its blocks are not called one after the other"
        for as_tuple in ways:
            recorder = _Recorder(self, as_tuple)
            try:
                recorder.run(tokens)
            except Exception as error:
                if isinstance(error, (BadCheckpoint, MemoryError)):
                    raise
                reason = " ".join(str(error).split())[:200]
                continue
            if recorder.hidden is not None and not recorder.broken:
                self._as_tuple = as_tuple
                return recorder.hidden, recorder.calls
        raise Unsupported(
            f"{self.checkpoint.path}: {type(self.model).__name__} cannot be computed block by block: {reason}"
        )


class _Reached(Exception):
    """The last block was called: nothing after it is needed."""


class _Recorder:
    """Runs a graph with every block replaced by one that passes its hidden states on, and notes its arguments."""

    def __init__(self, graph: Graph, as_tuple: bool) -> None:
        self.graph, self.as_tuple = graph, as_tuple
        self.calls: list[Call] = []
        self.hidden: Tensor | None = None
        self.broken = False

    def run(self, tokens: Tensor) -> None:
        model, blocks = self.graph.model, {path: name for name, path in self.graph.modules.items()}
        modules = {path: model.get_submodule(path) for path in blocks}
        for path, module in modules.items():
            module.forward = self._forward(blocks[path])
        hooks = [hook for name, module in model.named_modules() for hook in self._fill_around(name, module, blocks)]
        try:
            with torch.no_grad(), _Rows(self.graph):
                model(input_ids=tokens, use_cache=False)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
            for module in modules.values():
                del module.forward

    def _forward(self, block: str) -> Any:
        def passed_on(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.hidden is None:
                self.hidden = hidden
            self.broken |= hidden is not self.hidden or block in {call.block for call in self.calls}
            self.calls.append(Call(block, args, kwargs))
            stack = block.rpartition(".")[0]
            if self.broken or len(self.calls) == sum(name.rpartition(".")[0] == stack for name in self.graph.modules):
                raise _Reached
            return (hidden,) if self.as_tuple else hidden

        return passed_on

    def _fill_around(self, name: str, module: nn.Module, blocks: dict[str, str]) -> Iterator[Any]:
        """Hooks that fill a module's own tensors while it runs; those of blocks and embeddings are not theirs."""
        if any(name == path or name.startswith(f"{path}.") for path in blocks) or isinstance(module, nn.Embedding):
            return
        own = [f"{name}.{last}" if name else last for last in (*module._parameters, *module._buffers)]
        own = [target for target in own if target in self.graph.parts]
        if not own:
            return

        def fill(*_: Any) -> None:
            for target in own:
                filled = self.graph.filled(target)
                self.graph.put(target, filled.float() if filled.is_floating_point() else filled)

        def empty(*_: Any) -> None:
            for target in own:
                self.graph.put(target, None)

        yield module.register_forward_pre_hook(fill)
        yield module.register_forward_hook(empty, always_call=True)


class _Rows(TorchFunctionMode):
    """Embeddings without memory: the rows that are looked up come from the checkpoint, as float32."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.names = {id(tensor): name for name, tensor in graph.model.named_parameters(remove_duplicate=False)}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if function is functional.embedding:
            index, weight = args[0], args[1] if len(args) > 1 else named["weight"]
            if weight.device.type == "meta" and id(weight) in self.names:
                return self._look_up(index, self.names[id(weight)])
        return function(*args, **named)

    def _look_up(self, index: Tensor, target: str) -> Tensor:
        part = self.graph.parts.get(target)
        if part is None or part.pieces is None or len(part.pieces) != 1:
            raise BadCheckpoint(f"{self.graph.checkpoint.path}: tensor {target} is missing, or not stored by rows")
        wanted, inverse = torch.unique(index.cpu(), return_inverse=True)
        name = part.pieces[0].name
        rows = [read_tensor(self.graph.checkpoint, name, slice(i, i + 1)) for i in wanted.tolist()]
        table = torch.cat(rows).float().to(self.graph.device)
        return table[inverse.to(self.graph.device)]


def read_tensor(checkpoint: Checkpoint, name: str, rows: slice | None = None) -> Tensor:
    """A tensor of the checkpoint, or some of its rows, as torch's; BadCheckpoint when a number is not finite."""
    return to_torch(checkpoint.read(name, rows))


def to_torch(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor on the same memory; bfloat16 too, which numpy only has by another library."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_rows(tensor: Tensor, part: Part) -> Tensor:
    """A parameter as the matrix whose rows its pieces are: a vector is one row, one that is put together a column."""
    if tensor.ndim > 1:
        return tensor.view(-1, tensor.shape[-1])
    return tensor.view(1, -1) if part.converter is None else tensor.view(-1, 1)


def _empty(checkpoint: Checkpoint) -> Any:
    """The graph, its parameters without memory, its buffers computed. Code from the folder never runs."""
    where, family = checkpoint.path, checkpoint.config.get("model_type")
    if not where.is_dir():
        raise Unsupported(f"{where}: calibration needs a model's folder; rtn and hqq, l1, l2 and random need no data")
    if family not in transformers.CONFIG_MAPPING:
        raise Unsupported(
            f"{where}: model_type = {family!r}: transformers {transformers.__version__} does not know this family, and"
            " calibration runs its graph; rtn and hqq, l1, l2 and random need no data"
        )
    names = checkpoint.config.get("architectures") or [None]
    kind = getattr(transformers, str(names[0]), None)
    known = isinstance(kind, type) and issubclass(kind, PreTrainedModel)

    def build() -> Any:
        config = transformers.CONFIG_MAPPING[family].from_dict(dict(checkpoint.config))
        config._experts_implementation = "eager"  # one product an expert, which shows what each of them is given
        if known:
            return kind._from_config(config, dtype=torch.float32)  # type: ignore[union-attr]
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)

    return build_empty(checkpoint, build).eval()


def _match(graph: Any, checkpoint: Checkpoint) -> dict[str, Part]:
    """Each tensor of the graph that the checkpoint has → what makes it."""
    conversions = get_model_conversion_mapping(graph)
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
    makes = {pattern: each for each in converters for pattern in each.source_patterns}
    wanted, prefix = graph.state_dict(), graph.base_model_prefix
    merged: dict[str, list[tuple[str, str]]] = {}
    parts: dict[str, Part] = {}
    for name in sorted(checkpoint.infos, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target in wanted and pattern is None:
            shape = checkpoint.infos[name].shape
            rows = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
            parts[target] = Part((("", name),), (Piece(name, 0, 0, rows),))
        elif target in wanted:
            merged.setdefault(target, []).append((str(pattern), name))
    for target, sources in merged.items():
        parts |= _merged(graph, checkpoint, target, sources, makes[sources[0][0]])
    return parts


def _merged(
    graph: Any, checkpoint: Checkpoint, target: str, sources: list[tuple[str, str]], converter: Any
) -> dict[str, Part]:
    """The tensors that a converter makes of others: found by converting the numbers of their rows."""
    numbered = copy.deepcopy(converter)
    for number, (pattern, name) in enumerate(sources):
        rows = torch.arange(checkpoint.infos[name].shape[0])
        numbered.add_tensor(target, name, pattern, torch.stack([torch.full_like(rows, number), rows], dim=1))
    made: dict[str, Any] = {target: None}
    try:
        if all(len(checkpoint.infos[name].shape) <= 2 for _, name in sources):
            made = numbered.convert(target, model=graph, config=graph.config)
    except Exception:
        made = {target: None}  # rows alone do not say it
    wanted, found = graph.state_dict(), {}
    for name, table in made.items():
        table = table[0] if isinstance(table, list) else table
        right = wanted[name].shape[:-1] if wanted[name].ndim > 1 else wanted[name].shape
        by_rows = table is not None and tuple(table.shape) == (*right, 2)
        pieces = _pieces(table.reshape(-1, 2).numpy(), [name for _, name in sources]) if by_rows else None
        found[name] = Part(tuple(sources), pieces, converter)
    return found


def _pieces(table: np.ndarray[Any, Any], names: list[str]) -> tuple[Piece, ...]:
    """Runs of rows in a table (rows, [number of the source, row of the source])."""
    breaks = np.flatnonzero((np.diff(table[:, 0]) != 0) | (np.diff(table[:, 1]) != 1)) + 1
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), len(table)]
    return tuple(
        Piece(names[int(table[start, 0])], int(table[start, 1]), start, end - start)
        for start, end in zip(starts, ends, strict=True)
    )


def _module_path(targets: dict[str, str], names: Sequence[str]) -> str | None:
    """The graph's module of a block, from the names of its tensors; None when it has none of them."""
    found = (layer_of(targets[name]) for name in names if name in targets)
    return next((path for path in found if path is not None), None)
