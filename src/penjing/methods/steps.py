"""Steps found by search: of a spread of ranges, the step and zero point with the least weighted squared error.

For a group w of weights with importances h, and codes q = clamp(round(w / s)) of a trial step s, the best step for
those very codes is the closed form s* = Σ h w q / Σ h q²; its error is Σ h w² − (Σ h w q)² / Σ h q². Each trial is
judged by that, as llama.cpp's quantizers with an importance matrix judge theirs. Symmetric and asymmetric grids; zero
points are integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..formats.affine import SCALE_DTYPES, Grid

Floats = NDArray[np.float32]
# Trial ranges as shares of min-max. Fewer bits gain from clipping more; beyond 1 the grid's odd code comes into use.
SHARES = {2: (0.4, 1.1, 29), 3: (0.5, 1.1, 25), 4: (0.6, 1.1, 21)}
MANY = (0.8, 1.05, 11)
NEAR = np.array((0.95, 1.0, 1.05), np.float32)  # steps that are tried with the zero points beside the best


def search(values: Floats, importance: NDArray[Any] | None, grid: Grid) -> tuple[Floats, NDArray[np.int8] | None]:
    """Rows of values (rows, n) → scale float32 (rows, 1), as stored, and zero_point int8 (rows, 1) or None.

    importance: ≥ 0, (n,) or (rows, n); None: all alike. Values of importance 0 do not count, not even for the range.
    """
    h = np.ones(values.shape[1], np.float32) if importance is None else importance.astype(np.float32, copy=False)
    shares = np.linspace(*SHARES.get(grid.bits, MANY), dtype=np.float32)
    scale, zero = kernels.search_steps(values.T, h[:, None] if h.ndim == 1 else h.T, grid, shares, NEAR)
    return scale[:, None], None if grid.symmetric else zero[:, None].astype(np.int8)


def stored(scale: Floats, grid: Grid) -> Floats:
    """Steps as the grid's type holds them: positive and finite, 1 where there is none."""
    rounded = scale.astype(SCALE_DTYPES[grid.scale_dtype]).astype(np.float32)
    return np.where((rounded > 0) & np.isfinite(rounded), rounded, np.float32(1))
