"""torch's checkpoints (``pytorch_model.bin``, ``.pt``): the tensors in them, and nothing that could run.

torch.save writes a pickle of how tensors are made of storages, and the storages' bytes beside it: as records of a zip
file, or, before torch 1.6, one after another behind the pickle. A pickle is a program; `_Machine` knows only the
steps that build dictionaries of tensors, and calls nothing that a file names. So a file is read without torch, one
tensor at a time from where its bytes lie.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import BadCheckpoint, PenjingError, Unsupported
from .tensors import TensorFile, TensorInfo

_STORAGES: dict[str, np.dtype[Any]] = {
    f"torch {name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_DICTIONARY = "collections OrderedDict"
_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the number that files before 1.6 begin with
# Where programs that save more than the weights put them.
_WITHIN = ("state_dict", "model", "module")


@dataclass(frozen=True)
class _Name:
    """Something that a pickle names: it is compared, never imported."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class _Tensor:
    """offset, strides: in elements of the storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class StridedInfo(TensorInfo):
    """A tensor whose elements do not follow one another (a transpose, say). strides: in elements, by axis."""

    strides: tuple[int, ...]


class PickledFile(TensorFile):
    """A checkpoint of torch's, open for reading.

    Raises BadCheckpoint for a file that is damaged or holds no tensors, Unsupported for a pickle that needs more than
    tensors, both with the file's name.
    """

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        info = self.infos[name]
        if not isinstance(info, StridedInfo):
            return super().read(name, rows)
        raw = np.empty(_span(info.shape, info.strides) * info.dtype.itemsize, np.uint8)
        self._read_into(raw, info.start, name)
        steps = tuple(stride * info.dtype.itemsize for stride in info.strides)
        whole = np.lib.stride_tricks.as_strided(raw.view(info.dtype), info.shape, steps)
        return np.ascontiguousarray(whole[rows or slice(None)])

    def _read_infos(self, size: int) -> dict[str, TensorInfo]:
        with open(self._descriptor, "rb", closefd=False) as file:
            try:
                found, places = self._zipped(file) if zipfile.is_zipfile(file) else self._in_a_row(file)
            except PenjingError:
                raise
            except Exception as error:  # what zipfile, pickletools and the machine's own steps say to damage
                raise BadCheckpoint(
                    f"{self.path}: damaged, or no checkpoint of torch's: {type(error).__name__}"
                ) from None
        return {name: self._info(name, tensor, places, size) for name, tensor in self._tensors(found).items()}

    def _zipped(self, file: BinaryIO) -> tuple[Any, Mapping[str, int]]:
        """What the pickle builds, and where each storage begins: records of a zip file, not compressed."""
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in records if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise BadCheckpoint(f"{self.path}: a zip file without torch's data.pkl")
            prefix = pickles[0].removesuffix("data.pkl")
            packed = [name for name, info in records.items() if info.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise Unsupported(f"{self.path}: record {packed[0]} is compressed, which torch.save does not do")
            order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in records else b"little"
            if order != b"little":
                raise Unsupported(f"{self.path}: is written in {order.decode(errors='replace')}-endian byte order")
            places = {}
            for name, record in records.items():
                lengths = os.pread(self._descriptor, 4, record.header_offset + 26)  # of its name, and what follows it
                start = record.header_offset + 30 + sum(struct.unpack("<HH", lengths))
                places[name.removeprefix(f"{prefix}data/")] = start
            return self._run(archive.read(pickles[0])), places

    def _in_a_row(self, file: BinaryIO) -> tuple[Any, Mapping[str, int]]:
        """The same of a file from before torch 1.6: pickles, then each storage behind its count."""
        file.seek(0)
        if file.read(len(_MAGIC)) != _MAGIC:
            raise BadCheckpoint(f"{self.path}: no checkpoint of torch's: neither a zip file nor what was before it")
        self._run(file)  # the version
        if self._run(file).get("little_endian") is not True:
            raise Unsupported(f"{self.path}: is written in big-endian byte order")
        machine = self._machine()
        found, keys = machine.run(file), self._run(file)
        start, places = file.tell(), {}
        for key in keys:
            places[key] = start + 8
            start += 8 + machine.storages[key].count * machine.storages[key].dtype.itemsize
        return found, places

    def _machine(self) -> _Machine:
        return _Machine(str(self.path))

    def _run(self, pickle: bytes | BinaryIO) -> Any:
        return self._machine().run(pickle)

    def _tensors(self, found: Any) -> dict[str, _Tensor]:
        """The dictionary that was saved, or the one in it that holds the weights."""
        whole = found if isinstance(found, dict) else {}
        for inner in (*(whole.get(name) for name in _WITHIN), whole):
            tensors = {str(name): each for name, each in inner.items() if isinstance(each, _Tensor)} if inner else {}
            if tensors:
                return tensors
        raise BadCheckpoint(f"{self.path}: holds no dictionary of name → tensor")

    def _info(self, name: str, tensor: _Tensor, places: Mapping[str, int], size: int) -> TensorInfo:
        storage, where = tensor.storage, f"{self.path}: tensor {name}"
        if storage.key not in places:
            raise BadCheckpoint(f"{where}: its storage {storage.key} is not in the file")
        start = places[storage.key] + tensor.offset * storage.dtype.itemsize
        if tensor.offset + _span(tensor.shape, tensor.strides) > storage.count:
            raise BadCheckpoint(f"{where}: shape {tensor.shape} does not fit its storage of {storage.count} numbers")
        if places[storage.key] + storage.count * storage.dtype.itemsize > size:
            raise BadCheckpoint(f"{where}: truncated: goes beyond the {size} bytes of the file")
        plain = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
        follow = all(n <= 1 or s == p for n, s, p in zip(tensor.shape, tensor.strides, plain, strict=True))
        if follow or 0 in tensor.shape:
            return TensorInfo(name, storage.dtype, tensor.shape, start)
        return StridedInfo(name, storage.dtype, tensor.shape, start, tensor.strides)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first of a tensor to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


class _Machine:
    """Runs a pickle as far as it builds dictionaries, lists, texts, numbers and tensors.

    Whatever else it asks for is refused by name. The steps are those of Python's pickle machine (pickletools).
    storages: key → storage, in the order that they were met.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under marks
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, pickle: bytes | BinaryIO) -> Any:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name in _VALUES:
                self._stack.append(_VALUES[opcode.name](argument))
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                raise self._refusal(f"pickle's {opcode.name}")
        return self._stack.pop()

    def _refusal(self, what: str) -> Unsupported:
        return Unsupported(
            f"{self._where}: needs more than tensors ({what}), which could run code; save its state_dict alone,"
            " best as safetensors"
        )

    def marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        found, self._stack = self._stack, self._below.pop()
        return found

    def mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def take(self, count: int) -> None:
        """The last ones become a tuple."""
        if count > len(self._stack):
            raise LookupError("stack underflow")
        cut = len(self._stack) - count
        self._stack[cut:] = [tuple(self._stack[cut:])]

    def tuple(self, _: Any) -> None:
        self._put(tuple(self.marked()))

    def _put(self, value: Any) -> None:
        self._stack.append(value)

    def append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self.marked())

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError("append to what is no list")
        target.extend(values)

    def item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def items(self, _: Any) -> None:
        self._update(self.marked())

    def _update(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError("an item of what is no dictionary")
        if not all(type(key) in (str, int) for key in values[::2]):
            raise TypeError("a key that is no text")
        target.update(zip(values[::2], values[1::2], strict=True))

    def name(self, argument: Any) -> None:
        self._put(_Name(str(argument)))

    def stacked_name(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._put(_Name(f"{module} {name}"))

    def put(self, argument: Any) -> None:
        self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]

    def get(self, argument: Any) -> None:
        self._put(self._memo[argument])

    def storage(self, _: Any) -> None:
        """A persistent id: ("storage", its class, key, device, count); old files say of which it is a part."""
        what, kind, key, _device, count, *part = self._stack.pop()
        if what != "storage" or part not in ([], [None]):
            raise self._refusal("a view of a storage")
        if type(key) is not str:
            raise TypeError("a storage's key that is no text")
        if kind.name not in _STORAGES:
            raise self._refusal(kind.name.replace(" ", "."))
        self._put(self.storages.setdefault(key, _Storage(key, _STORAGES[kind.name], _count(count))))

    def call(self, _: Any) -> None:
        """What a pickle would call; a dictionary and a tensor are made here, everything else is refused."""
        arguments, function = self._stack.pop(), self._stack.pop()
        name = function.name
        if name == _DICTIONARY and arguments in ((), ([],)):
            self._put({})
        elif name == _PARAMETER:
            self._put(arguments[0])
        elif name == _TENSOR:
            storage, offset, shape, strides = arguments[:4]
            if not isinstance(storage, _Storage) or len(shape) != len(strides):
                raise TypeError("a tensor of what is no storage")
            sizes, steps = (tuple(map(_count, each)) for each in (shape, strides))
            self._put(_Tensor(storage, _count(offset), sizes, steps))
        else:
            raise self._refusal(name.replace(" ", "."))

    def state(self, _: Any) -> None:
        """What a dictionary has besides its items (a state_dict's version numbers) is left out."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise self._refusal("the state of an object")


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("no count")
    return value


def _same(argument: Any) -> Any:
    return argument


_VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"), _same),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"), _same),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING", "STRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _same),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple,
    "TUPLE1": lambda machine, _: machine.take(1),
    "TUPLE2": lambda machine, _: machine.take(2),
    "TUPLE3": lambda machine, _: machine.take(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.item,
    "SETITEMS": _Machine.items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stacked_name,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "BINPERSID": _Machine.storage,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "BUILD": _Machine.state,
}
