"""``penjing.save``: a compressed module as safetensors and JSON. No pickle, no code.

    FOLDER/model.safetensors    the tensors as `storage` names and packs them
    FOLDER/module.json          which layers are codes, which were folded, cut or tied, and what the module is

`load` (its own file) reads them back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint import atomic
from ..checkpoint.safetensors import write_safetensors
from ..errors import BadInput
from . import masks
from .fold import FoldedBatchNorm
from .layers import CodedLayer
from .skeleton import describe
from .storage import MASK, SCALE, ZERO, Arrays, encode_own, grids_of, own_tensors
from .targets import check

TENSORS, MODULE = "model.safetensors", "module.json"
VERSION = 1


def save(module: nn.Module, folder: str | Path) -> Path:
    """Keep a module, compressed or not, in a folder → the folder.

    The folder is made if need be; files of an earlier save are replaced, each whole or not at all. Raises BadInput if
    the folder holds something else.
    """
    check(module)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {TENSORS, MODULE}):
        raise BadInput(f"{folder} already holds something else: give a new or empty folder")
    masks.enforce(module)
    arrays, tied = _arrays(module)
    with atomic.plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODULE).unlink(missing_ok=True)
    write_safetensors(folder / TENSORS, arrays)
    text = json.dumps(_description(module, arrays, tied), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    atomic.write_bytes(folder / MODULE, text.encode())
    return folder


def _arrays(root: nn.Module) -> tuple[Arrays, dict[str, str]]:
    """What is stored, and name → name of the tensor that it is tied to."""
    arrays: Arrays = {}
    first: dict[int, str] = {}
    tied = {}
    for prefix, part in _parts(root):
        stored = encode_own(part)
        for name, tensor in _own(part).items():
            full = prefix + name
            original = first.setdefault(id(tensor), full)
            if original != full:
                tied[full] = original
            else:
                arrays |= {prefix + key: stored[key] for key in _keys(name) if key in stored}
    return arrays, tied


def _parts(root: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}." if name else "", part) for name, part in root.named_modules()]


def _own(part: nn.Module) -> dict[str, Tensor]:
    """Name → float tensor, or the codes in its place."""
    codes = {name: part._buffers[f"{name}_codes"] for name in grids_of(part)}
    return dict(own_tensors(part)) | {name: tensor for name, tensor in codes.items() if tensor is not None}


def _keys(name: str) -> tuple[str, ...]:
    return name, name + SCALE, name + ZERO, name + MASK


def _description(root: nn.Module, arrays: Arrays, tied: dict[str, str]) -> dict[str, Any]:
    """Everything but the tensors; layers of the same settings share an entry."""
    layers: dict[str, dict[str, Any]] = {}
    shapes = {}
    for prefix, part in _parts(root):
        for name, grid in grids_of(part).items():
            assert isinstance(part, CodedLayer)
            settings = {
                "bits": grid.bits,
                "group_size": grid.group_size,
                "symmetric": grid.symmetric,
                "scale": grid.scale_dtype,
                "compute": part.coded.compute,
                "dtype": str(part.coded.dtype).removeprefix("torch."),
            }
            entry = layers.setdefault(json.dumps(settings), settings | {"layers": {}})
            of_layer = entry["layers"].setdefault(prefix.removesuffix("."), {"weights": []})
            of_layer["weights"].append(name)
            if part.coded.step is not None:
                of_layer |= {"step": part.coded.step, "zero": part.coded.zero}
        for name, tensor in _own(part).items():
            if prefix + name in arrays and arrays[prefix + name].shape != tensor.shape:
                shapes[prefix + name] = list(tensor.shape)
    named = dict(root.named_modules())
    return {
        "penjing_module": VERSION,
        "module": describe(root),
        "quantized": list(layers.values()),
        "shapes": shapes,
        "folded": [name for name, part in named.items() if isinstance(part, FoldedBatchNorm)],
        "pruned": [[name, parameter] for name, _, parameter in masks.masked(root)],
        "resized": {name: part.__dict__["resized"] for name, part in named.items() if "resized" in part.__dict__},
        "tied": tied,
    }
