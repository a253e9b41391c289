"""A checkpoint folder as Hugging Face lays it out, plain or compressed: config.json, weights, side files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..errors import BadCheckpoint, Unsupported
from . import floats, qweight, storage
from .atomic import read_json
from .pickled import PickledFile, StridedInfo
from .safetensors import SafetensorsFile
from .storage import Scheme, Weight
from .tensors import TensorFile, TensorInfo

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_PICKLED = "pytorch_model.bin"
# What says how the weights are stored, and is not true of others.
_OF_WEIGHTS = (CONFIG, "penjing.json", "quantize_config.json", "quant_config.json")
# What trainers leave beside the weights.
_OF_TRAINERS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scheduler.bin", "rng_state.pth"}
_SIDE_FILES = ("*.json", "*.model", "*.jinja", "*.tiktoken", "vocab.txt", "merges.txt", "LICENSE*", "NOTICE*")
# Tensors that belong to one weight: X.weight_packed, X.weight.bitmask, X.qweight, … → X
_PART_NAMES = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight.compressed",
    "weight.bitmask",
    "weight.row_offsets",
    "weight.shape",
    floats.DIVISOR,
    floats.INPUT_SCALE,
    *qweight.PARTS,
)


class Checkpoint:
    """A folder of tensors, opened for reading; only headers are in memory.

    path: the folder.  config: what config.json says.  infos: stored name → TensorInfo.  names: what a plain
    checkpoint would call its tensors; a compressed weight counts as one, ``X.weight``.
    """

    def __init__(self, path: Path, config: dict[str, Any], files: Mapping[str, TensorFile]) -> None:
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
        if isinstance(info, StridedInfo):
            raise Unsupported(f"{file.path}: tensor {name} lies transposed in its storage; save it contiguous")
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
        """A module's weight as it is stored: an array, an AffineTensor, a FloatTensor or a BitmaskTensor."""
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
        stepped = any(f"{module}.{part}" in self.infos for part in ("weight_scale", "qweight"))
        return self.scheme(module) if stepped else None

    def activations(self, module: str) -> Literal["float", "int8"]:
        """What the module multiplies its weight with: its input as it is, or quantized to int8 token by token.

        Inputs that other programs round to FP8 stay as they are.
        """
        stepped = f"{module}.weight_scale" in self.infos
        return "int8" if stepped and self.scheme(module).activations == "int8" else "float"

    def is_compressed(self, module: str) -> bool:
        return any(f"{module}.{part}" in self.infos for part in _PART_NAMES)

    def parts(self, module: str) -> list[str]:
        """Names, after "X.", of the tensors that a module's weight is stored in."""
        return [part for part in ("weight", *_PART_NAMES) if f"{module}.{part}" in self.infos]

    def weight_shape(self, module: str) -> tuple[int, ...]:
        """(out, in) of a module's weight, however it is stored; only what is small is read for it."""
        for part in ("weight_shape", "weight.shape"):
            if f"{module}.{part}" in self.infos:
                return tuple(int(size) for size in self.read(f"{module}.{part}").reshape(-1))
        if f"{module}.weight" in self.infos:
            return self.infos[f"{module}.weight"].shape
        infos = {part: self.infos[f"{module}.{part}"] for part in self.parts(module)}
        if (packed := floats.shape_of(infos)) is not None:
            return packed
        for part in ("qweight", "scales"):
            if f"{module}.{part}" not in self.infos:
                raise BadCheckpoint(f"{self.path}: {module}: weight_shape, or qweight and scales, are missing")
        shapes = {part: self.infos[f"{module}.{part}"].shape for part in self.parts(module)}
        scheme = self.scheme(module)
        return qweight.shape_of(shapes, scheme.grid.bits, scheme.format)

    @property
    def compressed(self) -> tuple[str, ...]:
        """The modules whose weights are stored quantized or as bitmasks."""
        modules = (name.removesuffix(".weight") for name in self.names if name.endswith(".weight"))
        return tuple(module for module in modules if self.is_compressed(module))

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
        """What a user of the weights should know: where they are not computed on as they are stored."""
        scattered = [name for name in self.infos if name.endswith(".g_idx") and not self._in_order(name)]
        if not scattered:
            return ()
        return (
            f"{self.path}: {len(scattered)} weights have groups of scattered columns (desc_act): they are computed on"
            " as float32, exactly and in the memory that takes",
        )

    def _in_order(self, name: str) -> bool:
        scales = self.infos.get(f"{module_of(name)}.scales")
        groups = self.read(name)
        return scales is None or qweight.in_order(groups, len(groups), max(1, scales.shape[0]))

    @cached_property
    def side_files(self) -> Mapping[str, bytes | Path]:
        """What goes with the weights: tokenizer, generation settings, templates, licence; no code.

        Name → the file, or what would be in it.
        """
        found = {}
        for file in sorted(self.path.iterdir()):
            ours = file.name in _OF_WEIGHTS or file.name.endswith(".index.json")
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
        what = "there is no such file" if folder.suffix == ".gguf" else "there is no such folder; download the model"
        if folder.exists():
            what = "is a file; give the folder that holds it, or a .gguf"
        raise BadCheckpoint(f"{folder}: {what}")
    if config is None:
        config = _read_config(folder)
    return Checkpoint(folder, config, _open_files(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        unfinished = (folder / ".journal").exists()
        hint = "compressing it was not finished; run the same command again" if unfinished else "not a model folder"
        raise BadCheckpoint(f"{folder}: {CONFIG} is missing: {hint}")
    config = read_json(folder / CONFIG, BadCheckpoint)
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{folder / CONFIG}: not an object")
    return config


def _read_index(path: Path) -> dict[str, str]:
    """Tensor → the file that holds it."""
    index = read_json(path, BadCheckpoint)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise BadCheckpoint(f"{path}: needs weight_map, an object of tensor → file")
    for file in places.values():
        if not file or Path(file).name != file:
            raise BadCheckpoint(f"{path}: {file!r} is not the name of a file in this folder")
    return places


def _open_files(folder: Path) -> dict[str, TensorFile]:
    """The files that hold the weights, by name: those of an index, or the only one."""
    kinds: tuple[tuple[Callable[[Path], TensorFile], str, str, tuple[str, ...]], ...] = (
        (SafetensorsFile, INDEX, SINGLE, ("*.safetensors",)),
        (PickledFile, f"{_PICKLED}.index.json", _PICKLED, ("*.bin", "*.pt", "*.pth")),
    )
    for opened, index, single, patterns in kinds:
        if (folder / index).exists():
            places = _read_index(folder / index)
            files = {name: opened(folder / name) for name in _shards(folder, places)}
            _check_index(folder / index, places, files)
            return files
        if (folder / single).exists():
            return {single: opened(folder / single)}
        others = sorted({file.name for pattern in patterns for file in folder.glob(pattern)} - _OF_TRAINERS)
        if len(others) > 1:
            kind = patterns[0].removeprefix("*.")
            raise BadCheckpoint(f"{folder}: {len(others)} {kind} files and no {index} that says what is in which")
        if others:
            return {others[0]: opened(folder / others[0])}
    raise BadCheckpoint(f"{folder}: no weights: neither {SINGLE} nor {_PICKLED}, nor an index of several")


def _shards(folder: Path, index: Mapping[str, str]) -> list[str]:
    shards = sorted(set(index.values()))
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        raise BadCheckpoint(f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(shards)} are)")
    return shards


def _check_index(path: Path, index: Mapping[str, str], files: Mapping[str, TensorFile]) -> None:
    """Index and shards agree: each tensor is where the index says, and nowhere else."""
    for tensor, file in index.items():
        if tensor not in files[file].infos:
            raise BadCheckpoint(f"{path.parent / file}: tensor {tensor} is missing; {path.name} says it is here")
    for name, shard in files.items():
        for tensor in shard.infos:
            if index.get(tensor) != name:
                raise BadCheckpoint(f"{path.parent / name}: tensor {tensor} is not in {path.name} at this file")
