"""A compressed checkpoint as the plain one that it stands for: what compressing it again reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadCheckpoint
from ..formats.bitmask import BitmaskTensor
from ..formats.floats import FloatGrid
from . import kv_cache
from .folder import Checkpoint, is_part, module_of
from .storage import SCALE_NAMES, Quantized, Weight
from .tensors import DecodedInfo, TensorInfo

_STEPS = ("weight_scale", "scales", "weight.compressed")


class Decoded(Checkpoint):
    """The weights of ``stored`` as float32, exactly what their codes stand for; config.json says nothing of codes.

    Steps of the cache of keys and values are not there: they are not of what is made of these weights.
    One weight's codes are held at a time, however many rows of it are asked for.
    """

    def __init__(self, stored: Checkpoint) -> None:
        config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
        super().__init__(stored.path, config, {})
        self._whole, self.weight_files = stored, stored.weight_files
        self._held: tuple[str, Weight | None] = ("", None)
        compressed, steps = set(stored.compressed), set(kv_cache.steps(stored))
        for name, info in stored.infos.items():
            if name in steps:
                continue
            module = module_of(name)
            if module not in compressed or not (is_part(name) or name == f"{module}.weight"):
                self.infos[name] = info
            elif f"{module}.weight" not in self.infos:
                self.infos[f"{module}.weight"] = self._info(module)

    def _info(self, module: str) -> TensorInfo:
        shape, parts = self._whole.weight_shape(module), self._whole.parts(module)
        found = {part: self._whole.infos[f"{module}.{part}"] for part in parts}
        step = next((found[part].dtype for part in _STEPS if part in found), None)
        if step is not None and f"{module}.weight_scale" in self._whole.infos:
            grid = self._whole.scheme(module).grid
            step = grid.dtype if isinstance(grid, FloatGrid) and grid.bits == 4 else step
        if step is None or step not in SCALE_NAMES:
            raise BadCheckpoint(f"{self.path}: {module}: weight_scale is missing, or is {step} and no float")
        first, size = min(part.start for part in found.values()), sum(part.nbytes for part in found.values())
        # The tensors, as read and as turned; codes, as turned; of scattered groups the numbers, too.
        decoding = 2 * size + (5 if "g_idx" in parts else 3) * math.prod(shape)
        return DecodedInfo(f"{module}.weight", np.dtype(np.float32), shape, first, size, step, decoding)

    def close(self) -> None:
        self._whole.close()

    def file_of(self, stored_name: str) -> Path:
        if not isinstance(self.infos.get(stored_name), DecodedInfo):
            return self._whole.file_of(stored_name)
        module = module_of(stored_name)
        return self._whole.file_of(f"{module}.{self._whole.parts(module)[0]}")

    def _stored(self, stored_name: str, rows: slice | None) -> NDArray[Any]:
        if not isinstance(self.infos.get(stored_name), DecodedInfo):
            return self._whole.read(stored_name, rows)
        module, weight = self._held
        if module != module_of(stored_name) or weight is None:
            module = module_of(stored_name)
            weight = self._whole.weight(module)
            self._held = module, weight
        return _rows(weight, rows or slice(None)).astype(np.float32, copy=False)


def _rows(weight: Weight, rows: slice) -> NDArray[Any]:
    if isinstance(weight, BitmaskTensor):
        weight = weight.decode()
    return weight.rows(rows).decode() if isinstance(weight, Quantized) else weight[rows]
