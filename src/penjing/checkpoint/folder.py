"""A checkpoint folder as Hugging Face lays it out, plain or compressed: config.json, safetensors, side files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..errors import BadCheckpoint, Unsupported
from . import storage
from .atomic import read_json
from .safetensors import SafetensorsFile, TensorInfo
from .storage import Scheme, Weight

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_SIDE_FILES = ("*.json", "*.model", "*.jinja", "*.tiktoken", "vocab.txt", "merges.txt", "LICENSE*", "NOTICE*")
# Tensors that belong to one weight: X.weight_packed, X.weight.bitmask, … → X
_PART_NAMES = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight.compressed",
    "weight.bitmask",
    "weight.row_offsets",
    "weight.shape",
)


class Checkpoint:
    """A folder of tensors, opened for reading; only headers are in memory.

    path: the folder.  config: what config.json says.  infos: stored name → TensorInfo.  names: what a plain
    checkpoint would call its tensors; a compressed weight counts as one, ``X.weight``.
    """

    def __init__(self, path: Path, config: dict[str, Any], files: Mapping[str, SafetensorsFile]) -> None:
        self.path = path
        self.config = config
        self._files = {name: file for file in files.values() for name in file.infos}
        self.infos: dict[str, TensorInfo] = {name: file.infos[name] for name, file in self._files.items()}
        self.weight_files = sorted(files)
        quantization = config.get("quantization_config")
        self.schemes: tuple[Scheme, ...] = (
            storage.read_schemes(quantization, f"{path}/{CONFIG}") if quantization is not None else ()
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        logical = (f"{module_of(name)}.weight" if is_part(name) else name for name in self.infos)
        return tuple(dict.fromkeys(logical))

    def close(self) -> None:
        for file in set(self._files.values()):
            file.close()

    def file_of(self, stored_name: str) -> Path:
        return self._files[stored_name].path

    def read(self, stored_name: str, rows: slice | None = None) -> NDArray[Any]:
        """A tensor as it is stored, or some of its rows.

        BadCheckpoint when there is no such name, or when one of the numbers is not finite: nothing that is computed
        from such a model means anything, and looking costs less than reading.
        """
        array = self._stored(stored_name, rows)
        if array.dtype in storage.SCALE_NAMES and kernels.has_nonfinite(array):
            raise BadCheckpoint(f"{self.file_of(stored_name)}: tensor {stored_name} has a NaN or an infinity")
        return array

    def _stored(self, stored_name: str, rows: slice | None) -> NDArray[Any]:
        if stored_name not in self._files:
            raise BadCheckpoint(f"{self.path}: tensor {stored_name} is missing")
        return self._files[stored_name].read(stored_name, rows)

    def split(self, name: str, parts: Mapping[str, tuple[int, int, int]]) -> None:
        """Let a tensor (n, rows, columns) be read as matrices: new name → number on the first axis, first row, rows.

        Nothing is read; the tensor's own name is gone.
        """
        info, file = self.infos.pop(name), self._files.pop(name)
        _, height, columns = info.shape
        for part, (index, first, rows) in parts.items():
            start = info.start + (index * height + first) * columns * info.dtype.itemsize
            file.infos[part] = self.infos[part] = TensorInfo(part, info.dtype, (rows, columns), start)
            self._files[part] = file
        self.__dict__.pop("names", None)

    def tensor(self, name: str) -> NDArray[Any]:
        """A tensor of `names`; a weight that is stored compressed is decoded, to float32 or its own dtype."""
        module, _, part = name.rpartition(".")
        if name in self.infos and not (part == "weight" and self.is_compressed(module)):
            return self.read(name)  # as a bias is, whatever its weight is stored in
        weight = self.weight(module)
        return weight if isinstance(weight, np.ndarray) else weight.decode()

    def weight(self, module: str) -> Weight:
        """A module's weight as it is stored: an array, an AffineTensor or a BitmaskTensor."""
        if not self.is_compressed(module):
            return self.read(f"{module}.weight")
        parts = {part: self.read(f"{module}.{part}") for part in self.parts(module)}
        return storage.decode(parts, self._scheme_of(module), self._where(module))

    def check_weight(self, module: str, shape: tuple[int, int]) -> None:
        """BadCheckpoint, by headers alone, unless a module's weight is whole, of this shape, in the right dtypes."""
        if not self.is_compressed(module):
            self.check_tensor(f"{module}.weight", shape)
            return
        parts: dict[str, storage.Array | TensorInfo] = {
            part: self.read(f"{module}.{part}") if part in storage.SHAPES else self.infos[f"{module}.{part}"]
            for part in self.parts(module)
        }
        storage.check(parts, self._scheme_of(module), self._where(module), shape)

    def check_tensor(
        self, name: str, shape: tuple[int, ...], dtypes: Iterable[Any] = tuple(storage.SCALE_NAMES)
    ) -> None:
        """BadCheckpoint, by headers alone, unless a tensor is there, of this shape and one of these dtypes."""
        if (info := self.infos.get(name)) is None:
            raise BadCheckpoint(f"{self.path}: tensor {name} is missing; {CONFIG} calls for it")
        where = f"{self.file_of(name)}: tensor {name}"
        if info.shape != shape:
            raise BadCheckpoint(f"{where} has shape {info.shape}, {CONFIG} calls for {shape}")
        if info.dtype not in (right := [np.dtype(each) for each in dtypes]):
            raise BadCheckpoint(f"{where} has dtype {info.dtype}; {' or '.join(map(str, right))} is right")

    def _where(self, module: str) -> str:
        return f"{self.path}: tensor {module}"

    def _scheme_of(self, module: str) -> Scheme | None:
        return self.scheme(module) if f"{module}.weight_scale" in self.infos else None

    def activations(self, module: str) -> Literal["float", "int8"]:
        """What the module multiplies its weight with: its input as it is, or quantized to int8 token by token."""
        return self.scheme(module).activations if f"{module}.weight_scale" in self.infos else "float"

    def is_compressed(self, module: str) -> bool:
        return any(f"{module}.{part}" in self.infos for part in _PART_NAMES)

    def parts(self, module: str) -> list[str]:
        """Names, after "X.", of the tensors that a module's weight is stored in."""
        return [part for part in ("weight", *_PART_NAMES) if f"{module}.{part}" in self.infos]

    def scheme(self, module: str) -> Scheme:
        """How a quantized module is stored; BadCheckpoint when config.json does not say."""
        exact_first = sorted(self.schemes, key=lambda scheme: "Linear" in scheme.targets)
        for scheme in exact_first:
            if scheme.covers(module):
                return scheme
        raise BadCheckpoint(
            f"{self.path}: {module} is stored quantized, but no group of {CONFIG}'s quantization_config targets it"
        )

    @property
    def weight_paths(self) -> list[Path]:
        return [self.path / name for name in self.weight_files]

    @property
    def size_bytes(self) -> int:
        """Of all weight files."""
        return sum(path.stat().st_size for path in self.weight_paths)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of the weights should know: where they are not computed on exactly as they are stored."""
        return ()

    @cached_property
    def side_files(self) -> Mapping[str, bytes | Path]:
        """What goes with the weights: tokenizer, generation settings, templates, licence; no code.

        Name → the file, or what would be in it.
        """
        found = {}
        for file in sorted(self.path.iterdir()):
            ours = file.name in (CONFIG, "penjing.json") or file.name.endswith(".index.json")
            if file.is_file() and not ours and any(file.match(pattern) for pattern in _SIDE_FILES):
                found[file.name] = file
        return found


def is_part(stored_name: str) -> bool:
    """Is this one of the tensors that a compressed weight is stored in?"""
    return any(stored_name.endswith(f".{part}") for part in _PART_NAMES)


def module_of(name: str) -> str:
    """``X.weight``, ``X.weight_packed``, ``X.weight.bitmask``, ``X.bias`` → X."""
    for part in _PART_NAMES:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}")
    return name.rpartition(".")[0]


def open_checkpoint(path: str | Path, config: dict[str, Any] | None = None) -> Checkpoint:
    """Open a checkpoint folder or a GGUF file; ``config`` stands in for a config.json that is not written yet.

    Raises BadCheckpoint when a file is missing, damaged or contradicts another, Unsupported for weights in a format
    that Penjing does not read.
    """
    folder = Path(path)
    if folder.suffix == ".gguf" and folder.is_file():
        from .gguf import GgufCheckpoint  # which is a checkpoint, as here

        return GgufCheckpoint(folder)
    if not folder.is_dir():
        what = "is a file; give the folder that holds it, or a .gguf" if folder.exists() else "there is no such folder"
        raise BadCheckpoint(f"{folder}: {what}")
    if config is None:
        config = _read_config(folder)
    index = _read_index(folder) if (folder / INDEX).exists() else None
    files = {name: SafetensorsFile(folder / name) for name in _weight_files(folder, index)}
    checkpoint = Checkpoint(folder, config, files)
    if index is not None:
        _check_index(folder, index, files)
    return checkpoint


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        unfinished = (folder / ".journal").exists()
        hint = "compressing it was not finished; run the same command again" if unfinished else "not a model folder"
        raise BadCheckpoint(f"{folder}: {CONFIG} is missing: {hint}")
    config = read_json(folder / CONFIG, BadCheckpoint)
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{folder / CONFIG}: not an object")
    return config


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor → the file that holds it."""
    path = folder / INDEX
    index = read_json(path, BadCheckpoint)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise BadCheckpoint(f"{path}: needs weight_map, an object of tensor → file")
    for file in places.values():
        if not file or Path(file).name != file:
            raise BadCheckpoint(f"{path}: {file!r} is not the name of a file in this folder")
    return places


def _weight_files(folder: Path, index: Mapping[str, str] | None) -> list[str]:
    if index is not None:
        shards = sorted(set(index.values()))
        missing = [name for name in shards if not (folder / name).exists()]
        if missing:
            raise BadCheckpoint(f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(shards)} are)")
        return shards
    if (folder / SINGLE).exists():
        return [SINGLE]
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise BadCheckpoint(f"{folder}: {len(others)} safetensors files and no {INDEX} that says what is in which")
    if pickles := sorted(file.name for file in folder.glob("*.bin")):
        raise Unsupported(f"{folder}: weights are a pickle ({pickles[0]}), which could run code; save as safetensors")
    raise BadCheckpoint(f"{folder}: no weights: neither {SINGLE} nor {INDEX}")


def _check_index(folder: Path, index: Mapping[str, str], files: Mapping[str, SafetensorsFile]) -> None:
    """Index and shards agree: each tensor is where the index says, and nowhere else."""
    for tensor, file in index.items():
        if tensor not in files[file].infos:
            raise BadCheckpoint(f"{folder / file}: tensor {tensor} is missing; {INDEX} says it is here")
    for name, shard in files.items():
        for tensor in shard.infos:
            if index.get(tensor) != name:
                raise BadCheckpoint(f"{folder / name}: tensor {tensor} is not in {INDEX} at this file")
