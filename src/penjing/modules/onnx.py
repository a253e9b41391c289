"""``penjing.to_onnx``: a module, compressed or not, as an ONNX file with QuantizeLinear and DequantizeLinear.

Weights are integer initializers behind DequantizeLinear: INT4 where all codes of a weight fit, else INT8, or UINT8
where sums of INT8 may saturate, with a step a tensor, a channel or a block. Integer layers have QuantizeLinear and
DequantizeLinear before them; a dynamic range is computed in the graph. The file is run by onnxruntime and compared
before it gets its name.

Few values may come on the next code: QuantizeLinear computes round(x / s) + z where the kernels compute
round(x · (1/s) + z), and sums in float32 differ in their last bits from exact ones. `_allowed` bounds what that does.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checkpoint.atomic import replacing
from ..errors import BadInput, PenjingError, Unsupported
from . import masks
from .data import Batch, evaluating
from .layers import CodedConv, CodedLayer
from .reference import dynamic_steps
from .targets import check
from .traced import OPSET, trace_codes

MOST_BYTES = (1 << 31) - 1  # of one protobuf file
SUMMATION = 1e-5  # of the largest output: float32 sums in another order
NUDGE = 1e-3  # of a step
DRAWS = 3


@dataclass(frozen=True)
class ExportResult:
    """The file, its size, operators, and weights by integer type; what onnxruntime answered.

    difference: largest absolute difference from the module's own answers on the example, of outputs as large as
    ``largest``, or None when onnxruntime is not installed.  allowed: the difference above which the export fails.
    """

    file: Path
    size_bytes: int
    nodes: int
    weights: dict[str, int]
    difference: float | None
    allowed: float
    largest: float

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.weights.items() if count) or "no integer"
        run = "not run: onnxruntime is not installed"
        if self.difference is not None:
            run = f"onnxruntime differs by {self.difference:.1e} at most (allowed {self.allowed:.1e})"
        return (
            f"{self.file}: {self.size_bytes:,} bytes, {self.nodes} nodes, {kinds} weights; {run}, outputs up to"
            f" {self.largest:.3g}"
        )

    __repr__ = __str__


def to_onnx(
    module: nn.Module,
    example_inputs: Any,
    file: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    signed_weights: bool = False,
) -> ExportResult:
    """Write a module to an ONNX file (opset 21) that answers as the module does; the module is left as it is.

    example_inputs: what the module is called with: a tensor, a tuple, or a dict of arguments by name.
    dynamic_batch: axis 0 of every input may have any length; the file is then also run at a second length.
    signed_weights: keep 8-bit weights of static layers int8, for processors with VNNI and for Arm only: onnxruntime is
    up to twice as fast with them there, and on other processors its sums of them saturate, to answers far off.
    Raises BadInput for inputs the module does not take, Unsupported when onnx is missing or torch cannot export the
    module, PenjingError when onnxruntime's answers differ by more than rounding explains; no file is left then.
    """
    _need("onnx", "onnxscript")
    twin = copy.deepcopy(check(module))
    path = Path(file)
    if not path.parent.is_dir() or path.is_dir():
        raise BadInput(f"{path}: give the name of a file in a folder that is there")
    inputs = _example(example_inputs)
    with evaluating(twin):
        masks.bake(twin)
        expected = [_answers(twin, each, dynamic_batch) for each in _checked(inputs, dynamic_batch)]
        trace_codes(twin, signed_weights)
        try:
            model = _export(twin, inputs, dynamic_batch)
        except Exception as error:
            hint = "; dynamic_batch=False may help" if dynamic_batch else ""
            name = type(module).__name__
            raise Unsupported(f"torch cannot export {name} to ONNX: {_line(error)}{hint}") from error
    weights = _pack(model)
    data = _serialize(model, path)
    difference = _compare(data, expected, path)
    with replacing(path) as temporary, open(temporary, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    allowed = max(example.allowed for example in expected)
    return ExportResult(
        path, len(data), len(model.graph.node), weights, difference, allowed, max(each.largest for each in expected)
    )


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Unsupported(f"ONNX export needs {' and '.join(missing)}: pip install 'penjing[onnx]'")


def _example(given: Any) -> Batch:
    inputs = tuple(given) if isinstance(given, list) else given
    tensors = _tensors(inputs)
    if not tensors:
        raise BadInput(f"example_inputs has no tensor ({type(given).__name__}): give what the module is called with")
    if any(tensor.dtype is torch.bfloat16 for tensor in tensors):
        raise Unsupported("example_inputs is bfloat16, which onnxruntime does not compute on CPUs: use module.float()")
    inputs = pytree.tree_map_only(Tensor, Tensor.detach, inputs)
    return Batch(inputs, None, len(tensors[0]) if tensors[0].dim() else 1)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _checked(inputs: Batch, dynamic_batch: bool) -> list[Batch]:
    """What the file is run on: the example, and with a dynamic batch another length of it."""
    if not dynamic_batch:
        return [inputs]
    return [inputs, _doubled(inputs) if inputs.size == 1 else inputs.part(0, 1)]


def _doubled(inputs: Batch) -> Batch:
    double = pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.dim() else x, inputs.inputs)
    return Batch(double, None, 2 * inputs.size)


@dataclass(frozen=True)
class _Expected:
    """Inputs, the module's own outputs, how large they are, and by how much another runtime's may differ."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    largest: float
    allowed: float


def _answers(module: nn.Module, inputs: Batch, dynamic_batch: bool) -> _Expected:
    try:
        outputs = _tensors(inputs.run(module))
    except PenjingError:
        raise
    except Exception as error:
        hint = f" with {inputs.size} samples (dynamic_batch=False allows only one number)" if dynamic_batch else ""
        raise BadInput(f"{type(module).__name__} does not take example_inputs{hint}: {_line(error)}") from error
    if not outputs:
        raise BadInput(f"{type(module).__name__} answers no tensor: there is nothing to export")
    largest = max((float(each.abs().max()) for each in outputs if each.numel()), default=0.0)
    return _Expected(_tensors(inputs.inputs), outputs, largest, _allowed(module, inputs, outputs, largest))


def _allowed(module: nn.Module, inputs: Batch, outputs: list[Tensor], largest: float) -> float:
    """1e-5 of the largest output, plus twice what the module's own answers move by under a nudge, the worst of three.

    What each integer layer is given is moved by up to a thousandth of a step at random, which puts one value in 2000 on
    the next code, and one value a sample by a whole step. Two ways of rounding the same numbers differ less often; a
    wrong step, zero point or axis moves most codes. Static layers also answer half a unit of their int32 sums off:
    onnxruntime's optimizer rounds their biases to such units.
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(layer: nn.Module, args: tuple[Any, ...]) -> Any:
        assert isinstance(layer, CodedLayer)
        x = args[0]
        conv = isinstance(layer, CodedConv)
        batch = x if x.dim() > (layer.get_buffer("weight_codes").dim() - 1 if conv else 1) else x[None]
        axes = tuple(range(1, batch.dim())) if conv else (-1,)
        scale = dynamic_steps(batch.float(), axes)[0] if layer.coded.step is None else layer.coded.step
        noise = NUDGE * (2 * torch.rand(batch.shape, generator=generator) - 1)
        samples = noise.view(len(batch), -1)
        samples.scatter_(1, torch.randint(samples.shape[1], (len(batch), 1), generator=generator), 1)
        return ((batch + noise * scale).view(x.shape).to(x.dtype), *args[1:])

    def round_bias(layer: nn.Module, _: Any, y: Tensor) -> Tensor:
        assert isinstance(layer, CodedLayer)
        unit = layer.get_buffer("weight_scale")[:, 0] * (layer.coded.step or 0.0)
        signs = torch.randint(0, 2, (len(layer.get_buffer("weight_codes")),), generator=generator) - 0.5
        return y + (signs * unit).view(-1, *[1] * len(getattr(layer, "stride", ())))

    layers = [part for part in module.modules() if isinstance(part, CodedLayer) and part.coded.compute == "integer"]
    hooks = [layer.register_forward_pre_hook(nudge) for layer in layers]
    hooks += [layer.register_forward_hook(round_bias) for layer in layers if layer.coded.step is not None]
    try:
        moved = [_tensors(inputs.run(module)) for _ in range(DRAWS if layers else 0)]
    finally:
        for hook in hooks:
            hook.remove()
    return SUMMATION * largest + 2 * max((_largest_difference(draw, outputs) for draw in moved), default=0.0)


def _largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def _line(error: BaseException) -> str:
    """The first line of the error that was at the beginning."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of its own deprecated calls and of packages that it could also use."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnxscript", "onnx_ir"))}
    fast = torch.backends.mha.get_fastpath_enabled()
    for logger in levels:
        logger.setLevel(logging.ERROR)
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention reads weights where nothing is traced
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(fast)


def _export(twin: nn.Module, inputs: Batch, dynamic_batch: bool) -> Any:
    """The traced graph as an onnx.ModelProto, without the exporter's notes (they name files on this machine)."""
    shapes = None
    if dynamic_batch:
        inputs = _doubled(inputs) if inputs.size == 1 else inputs  # torch takes a length of 1 for a constant
        axis = {0: torch.export.Dim.DYNAMIC}
        given = inputs.inputs if isinstance(inputs.inputs, Mapping | tuple) else (inputs.inputs,)
        shapes = pytree.tree_map(lambda x: axis if isinstance(x, Tensor) and x.dim() else None, given)
    kwargs = dict(inputs.inputs) if isinstance(inputs.inputs, Mapping) else None
    args = () if kwargs else inputs.inputs if isinstance(inputs.inputs, tuple) else (inputs.inputs,)
    with _quiet():
        program = torch.onnx.export(
            twin, args, kwargs=kwargs, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None
    model = program.model_proto
    for item in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    del model.graph.value_info[:]  # readers infer it
    model.producer_name, model.producer_version = "penjing", ""
    return model


def _pack(model: Any) -> dict[str, int]:
    """Store codes that fit in 4 bits as INT4; the number of weights of each integer type."""
    from onnx import numpy_helper

    graph = model.graph
    stored = {item.name: item for item in graph.initializer}
    small: dict[str, Any] = {}
    behind = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
    weights = {node.input[0] for node in behind}
    for node in behind:
        codes = [node.input[at] for at in (0, 2) if at < len(node.input) and node.input[at]]
        arrays = {name: numpy_helper.to_array(stored[name]) for name in codes}
        if any(a.dtype != np.int8 or a.min() < -8 or a.max() > 7 for a in arrays.values()):
            continue
        for at, name in zip((0, 2), codes, strict=False):
            packed = f"{name}_int4"
            small[packed] = small.get(packed) or numpy_helper.from_array(arrays[name].astype(ml_dtypes.int4), packed)
            node.input[at] = packed
    used = {name for node in graph.node for name in node.input}
    kept = [item for item in graph.initializer if item.name in used] + list(small.values())
    del graph.initializer[:]
    graph.initializer.extend(kept)
    kinds = Counter(
        "int4" if f"{name}_int4" in small else numpy_helper.to_array(stored[name]).dtype.name for name in weights
    )
    return {kind: kinds[kind] for kind in ("int8", "uint8", "int4")}


def _serialize(model: Any, path: Path) -> bytes:
    import onnx

    size = model.ByteSize()
    if size > MOST_BYTES:
        raise Unsupported(f"{path}: the model takes {size:,} bytes and one ONNX file holds 2 GiB")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise PenjingError(f"{path}: onnx.checker refuses the exported graph: {_line(error)}") from error
    data: bytes = model.SerializeToString()
    return data


def _compare(data: bytes, expected: list[_Expected], path: Path) -> float | None:
    """Run the file on all examples; the largest difference, or None without onnxruntime."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        worst = 0.0
        for example in expected:
            feed = {name: x.contiguous().numpy() for name, x in zip(names, example.inputs, strict=True)}
            found = [torch.from_numpy(np.asarray(y)) for y in session.run(None, feed)]
            difference = _largest_difference(found, example.outputs)
            if not difference <= example.allowed:
                raise PenjingError(
                    f"{path}: onnxruntime's answers differ from the module's by {difference:.2e}, of outputs up to"
                    f" {example.largest:.3g}; rounding explains {example.allowed:.2e}"
                )
            worst = max(worst, difference)
    except PenjingError:
        raise
    except Exception as error:
        raise PenjingError(f"{path}: onnxruntime cannot run the exported graph: {_line(error)}") from error
    return worst
