"""Calibration without text: on what the model writes itself (data-free, as in LLM-QAT, Liu et al., 2023, 2305.17888).

The engine writes it, in a process of its own, so that the memory which that takes is free again before compressing.
The rows are kept in the journal's folder: a killed run goes on with them. What a model writes is like what it was
trained on, and no more: text like what it will see is better, and whoever calls this says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import hardware, kernels
from ..checkpoint.safetensors import SafetensorsFile
from ..errors import PenjingError, Unsupported

FILE = "own-samples.safetensors"


@dataclass(frozen=True)
class Own:
    """What the model is to write. model: its folder.  samples, length: rows, and tokens of each."""

    model: Path
    samples: int
    length: int
    seed: int

    def stand_in(self, vocabulary: int) -> NDArray[np.int64]:
        """Any rows of that size, to find out with what computing takes before they are written."""
        return np.random.default_rng(self.seed).integers(0, vocabulary, (self.samples, self.length))

    def tokens(self, folder: Path, limit: int | None, progress: Callable[[float, float], None]) -> NDArray[np.int64]:
        """Rows of tokens (samples, length): from the journal's folder, where they are written first if need be.

        limit: bytes that this process and the writing one may take together; None: what there is.
        Raises PenjingError where the whole model does not fit, Unsupported where it is none that writes.
        """
        file = folder / FILE
        if not file.exists():
            self._write(file, limit, progress)
        with SafetensorsFile(file) as opened:
            return opened.read("tokens").astype(np.int64)

    def _write(self, file: Path, limit: int | None, progress: Callable[[float, float], None]) -> None:
        free = hardware.memory_available_bytes()
        budget = free if limit is None else min(free, limit - hardware.peak_memory_bytes())
        numbers = (self.samples, self.length, self.seed, kernels.threads(), max(budget, 1))
        words = [sys.executable, "-P", "-m", "penjing.engine.samples", str(self.model), str(file), *map(str, numbers)]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        child = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                progress(int(line), self.samples * self.length)
            said = child.communicate()[1].strip().splitlines()
        finally:
            child.kill()
            child.wait()
        if child.returncode or not file.exists():
            raise (Unsupported if child.returncode == Unsupported.exit_code else PenjingError)(
                f"the model cannot write text of its own to calibrate on: {said[-1] if said else 'its process died'};"
                " give --calibration FILE with text like what it will see"
            )
