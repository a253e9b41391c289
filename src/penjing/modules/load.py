"""``penjing.load``: the folder that `save` wrote as a module again.

Nothing is imported or run that a file names. Either the user gives the uncompressed module (``into=``), or the module
is rebuilt from torch's own layers and from classes that the program has imported already (see `skeleton`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import atomic
from ..checkpoint.safetensors import read_safetensors
from ..errors import BadCheckpoint, BadInput
from ..formats.affine import Grid
from . import masks
from .fold import mark_folded
from .layers import Coded, CodedLayer, buffers, convert, keep_off_fast_paths
from .save import MODULE, TENSORS, VERSION
from .skeleton import build
from .snapshot import Snapshot
from .storage import MASK, SCALE, ZERO, Arrays, decode_affine, decode_float, own_tensors, to_torch

KEYS = {"penjing_module", "module", "quantized", "shapes", "folded", "pruned", "resized", "tied"}


def load(folder: str | Path, into: nn.Module | None = None) -> nn.Module:
    """A saved module, in evaluation mode.

    into: the uncompressed module (its architecture; its numbers are replaced), changed in place and returned. Without
    it the module is rebuilt, which works for torch's own layers and containers, and for classes of the user's that are
    imported already and whose arguments were plain attributes.
    Raises BadCheckpoint when the files are damaged, contradict themselves or do not fit the module, BadInput when the
    module is needed; ``into`` is then as it was.
    """
    folder = Path(folder)
    if not (folder / MODULE).is_file():
        raise BadCheckpoint(f"{folder}: no {MODULE}: not a module that penjing.save wrote, or not finished")
    description = _checked(atomic.read_json(folder / MODULE, BadCheckpoint), folder / MODULE)
    arrays, _ = read_safetensors(folder / TENSORS)
    if into is None:
        if description["module"] is None:
            raise BadInput(f"{folder}: its class cannot be rebuilt from its attributes: load(folder, into=module)")
        with torch.random.fork_rng(devices=[]):
            into = build(description["module"])
    with Snapshot(into.modules()):
        try:
            _fill(into, description, arrays)
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise BadCheckpoint(f"{folder} does not fit {type(into).__name__}: {error}") from error
    return into.eval()


def _checked(description: Any, path: Path) -> dict[str, Any]:
    if not isinstance(description, dict) or description.get("penjing_module") != VERSION:
        raise BadCheckpoint(f"{path}: penjing_module {VERSION} is expected at its head")
    if description.keys() != KEYS:
        raise BadCheckpoint(f"{path}: has {sorted(description)}, should have {sorted(KEYS)}")
    return description


def _fill(root: nn.Module, description: dict[str, Any], arrays: Arrays) -> None:
    for name in description["folded"]:
        mark_folded(root.get_submodule(name))
    for name, sizes in description["resized"].items():
        part = root.get_submodule(name)
        part.__dict__.update({key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()})
        part.__dict__["resized"] = sizes
    used = _fill_codes(root, description, arrays)
    used |= _fill_floats(root, description, arrays, used)
    if extra := arrays.keys() - used:
        raise BadCheckpoint(f"{sorted(extra)[0]} is in the file, but not in the module ({len(extra)} such)")
    for name, original in description["tied"].items():
        _tie(root, name, original)
    for name, parameter in description["pruned"]:
        part = root.get_submodule(name)
        if parameter in part._parameters:
            masks.put(part, parameter, part.get_parameter(parameter).detach() != 0)
    masks.watch_attention(root)
    if description["quantized"]:
        keep_off_fast_paths(root)
        root.requires_grad_(False)


def _fill_codes(root: nn.Module, description: dict[str, Any], arrays: Arrays) -> set[str]:
    used = set()
    tied = description["tied"]
    for entry in description["quantized"]:
        grid = Grid(entry["bits"], entry["group_size"], entry["symmetric"], entry["scale"])
        for name, of_layer in entry["layers"].items():
            part, tensors = root.get_submodule(name), {}
            for weight in of_layer["weights"]:
                own = f"{name}.{weight}".lstrip(".")
                full = tied.get(own, own)
                shape = tuple(description["shapes"].get(full) or arrays[full].shape)
                _check_shape(part, weight, shape, own)
                tensors[weight] = buffers(decode_affine(full, arrays, grid, shape), torch.Size(shape))
                used |= {full + suffix for suffix in ("", SCALE, ZERO, MASK)}
            grids = dict.fromkeys(of_layer["weights"], grid)
            dtype = getattr(torch, entry["dtype"])
            coded = Coded(grids, entry["compute"], of_layer.get("step"), of_layer.get("zero", 0), dtype)
            convert(part, coded, tensors)
    return used


def _fill_floats(root: nn.Module, description: dict[str, Any], arrays: Arrays, coded: set[str]) -> set[str]:
    used = set()
    for prefix, part in root.named_modules():
        dot = f"{prefix}." if prefix else ""
        names = {name for name, _ in own_tensors(part)}
        names |= {name for name in part._parameters if dot + name in arrays}
        for name in sorted(names):
            full = dot + name
            if full in description["tied"]:
                continue
            if full not in arrays:
                raise BadCheckpoint(f"{full} is in the module, but not in the file")
            shape = description["shapes"].get(full)
            tensor = to_torch(decode_float(full, arrays, None if shape is None else tuple(shape)))
            _check_shape(part, name, tensor.shape, full)
            used |= {full, full + MASK}
            _assign(part, name, tensor)
    return used


def _check_shape(part: nn.Module, name: str, shape: tuple[int, ...], full: str) -> None:
    """Cut layers have the file's shapes; all others must have the module's."""
    own = part._parameters.get(name, part._buffers.get(name))
    if own is not None and tuple(own.shape) != tuple(shape) and "resized" not in part.__dict__:
        raise BadCheckpoint(f"{full}: {tuple(shape)} in the file, {tuple(own.shape)} in the module")


def _assign(part: nn.Module, name: str, tensor: Tensor) -> None:
    if name in part._buffers:
        part._buffers[name] = tensor
        return
    old = part._parameters[name]
    setattr(part, name, nn.Parameter(tensor, tensor.is_floating_point() and (old is None or old.requires_grad)))


def _tie(root: nn.Module, name: str, original: str) -> None:
    """Let two layers hold the same tensor objects."""
    (part, key), (first, source) = _owner(root, name), _owner(root, original)
    if isinstance(part, CodedLayer) and key in part.coded.grids:
        for suffix in ("codes", "scale", "zero_point"):
            part._buffers[f"{key}_{suffix}"] = first._buffers[f"{source}_{suffix}"]
    elif source in first._parameters:
        setattr(part, key, first._parameters[source])
    else:
        part._buffers[key] = first._buffers[source]


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    place, _, key = name.rpartition(".")
    return root.get_submodule(place), key
