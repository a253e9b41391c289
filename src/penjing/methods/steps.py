"""Steps found by search: of a spread of ranges, the step and zero point with the least weighted squared error.

For a group w of weights with importances h, and codes q = clamp(round(w / s)) of a trial step s, the best step for
those very codes is the closed form s* = Σ h w q / Σ h q²; its error is Σ h w² − (Σ h w q)² / Σ h q². Each trial is
judged by that, as llama.cpp's quantizers with an importance matrix judge theirs. Symmetric and asymmetric grids; zero
points are integers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..formats.affine import SCALE_DTYPES, Grid

Floats = NDArray[np.float32]
# Trial ranges as shares of min-max. Fewer bits gain from clipping more; beyond 1 the grid's odd code comes into use.
SHARES = {2: (0.4, 1.1, 29), 3: (0.5, 1.1, 25), 4: (0.6, 1.1, 21)}
MANY = (0.8, 1.05, 11)
NEAR = (0.95, 1.0, 1.05)  # steps that are tried with the zero points beside the best
_CHUNK = 1 << 16  # values at a time: what a trial makes stays in the cache


def search(values: Floats, importance: NDArray[Any] | None, grid: Grid) -> tuple[Floats, NDArray[np.int8] | None]:
    """Rows of values (rows, n) → scale float32 (rows, 1), as stored, and zero_point int8 (rows, 1) or None.

    importance: ≥ 0, (n,) or (rows, n); None: all alike. Values of importance 0 do not count, not even for the range.
    """
    h = np.ones(values.shape[1], np.float32) if importance is None else importance.astype(np.float32)
    height = max(1, _CHUNK // values.shape[1])
    cuts = [slice(low, low + height) for low in range(0, len(values), height)]

    def solve(rows: slice) -> tuple[Floats, Floats]:
        return _search(values[rows], h if h.ndim == 1 else h[rows], grid)

    if len(cuts) == 1:
        parts = [solve(cuts[0])]
    else:
        with ThreadPoolExecutor(kernels.threads()) as pool:
            parts = list(pool.map(solve, cuts))
    scale = np.concatenate([part[0] for part in parts])
    zero = np.concatenate([part[1] for part in parts])
    return scale, None if grid.symmetric else zero.astype(np.int8)


def stored(scale: Floats, grid: Grid) -> Floats:
    """Steps as the grid's type holds them: positive and finite, 1 where there is none."""
    rounded = scale.astype(SCALE_DTYPES[grid.scale_dtype]).astype(np.float32)
    return np.where((rounded > 0) & np.isfinite(rounded), rounded, np.float32(1))


def _search(values: Floats, h: Floats, grid: Grid) -> tuple[Floats, Floats]:
    counted = values if h.all() else np.where(h > 0, values, np.float32(0))
    low = np.minimum(counted.min(axis=1, keepdims=True), 0)
    high = np.maximum(counted.max(axis=1, keepdims=True), 0)
    span = np.float32((grid.qmax - grid.qmin) / 2 if grid.symmetric else grid.qmax - grid.qmin)
    reach = np.maximum(-low, high) if grid.symmetric else high - low
    trials = _Trials(values, h * counted, h, grid, stored(reach / span, grid), low)
    for share in np.linspace(*SHARES.get(grid.bits, MANY), dtype=np.float32):
        step = np.maximum(reach * share / span, np.float32(1e-30))
        trials.judge(step, trials.zero_for(low * share, step))
    if not grid.symmetric:  # the ends need not shrink alike
        scale, zero = trials.scale, trials.zero
        for moved in (-1, 1):
            for share in NEAR:
                trials.judge(scale * share, np.clip(zero + np.float32(moved), grid.qmin, grid.qmax))
    return trials.scale, trials.zero


class _Trials:
    """The best step and zero point (rows, 1) of those judged so far; at first those of the whole range."""

    def __init__(self, values: Floats, weighted: Floats, h: Floats, grid: Grid, scale: Floats, low: Floats) -> None:
        self._values, self._weighted, self._h, self._grid = values, weighted, h, grid
        self._gain = np.zeros(scale.shape, np.float32)
        self.scale, self.zero = scale, self.zero_for(low, scale)

    def zero_for(self, low: Floats, step: Floats) -> Floats:
        """Where zero lies when the lowest code stands for ``low``."""
        if self._grid.symmetric:
            return np.zeros(step.shape, np.float32)
        found: Floats = np.clip(np.rint(self._grid.qmin - low / step), self._grid.qmin, self._grid.qmax)
        return found

    def judge(self, step: Floats, zero: Floats) -> None:
        """Codes on that step, and the best step for those codes in closed form, kept where it gains most."""
        q = self._values * (1 / step)
        np.rint(q, out=q)
        np.clip(q, self._grid.qmin - zero, self._grid.qmax - zero, out=q)
        along = np.einsum("rn,rn->r", self._weighted, q)[:, None]
        q *= q
        power = (q @ self._h if self._h.ndim == 1 else np.einsum("rn,rn->r", q, self._h))[:, None]
        power = np.maximum(power, np.float32(1e-30))
        gain = along * along / power
        better = (gain > self._gain) & (along > 0)
        self._gain = np.where(better, gain, self._gain)
        self.scale = np.where(better, stored(along / power, self._grid), self.scale)
        self.zero = np.where(better, zero, self.zero)
