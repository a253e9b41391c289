"""Codes and steps made better together, after a first solution: coordinate descent on the layer's loss tr(E H Eᵀ).

Each sweep goes through the groups. A group's steps move to where the loss is least for its codes, in closed form; then
each of its codes to the one that is best given all others (Behdin et al., 2023, "QuantEase", with steps that move as
well). Pruned weights stay pruned. The loss does not rise but by what is rounded: steps to their stored type, which is
checked, and slopes (see `feedback.Descent`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..formats.affine import PER_TENSOR
from .feedback import Descent, blocks
from .rounding import Rounder
from .steps import stored

Floats = NDArray[np.float32]


def refine(
    rounder: Rounder,
    centred: NDArray[np.int16],
    weight: Floats,
    hessian: Floats,
    ridge: float,
    sweeps: int,
    kept: NDArray[np.bool_] | None = None,
) -> None:
    """Change ``centred`` (in, out) and the rounder's steps in place.

    weight: (in, out).  ridge: what damping adds to the hessian's diagonal.  kept: (in, out), what was not pruned.
    """
    if not sweeps:
        return
    error = np.empty_like(weight)
    for group, scale in enumerate(rounder.scale):
        columns = slice(group * rounder.width, (group + 1) * rounder.width)
        np.multiply(centred[columns], -scale, out=error[columns])
    error += weight
    descent = Descent(weight, error, hessian, ridge)
    for _ in range(sweeps):
        for start, stop in blocks(len(weight), rounder.width):
            group = start // rounder.width
            if start % rounder.width == 0 and rounder.grid.group_size != PER_TENSOR:
                slope = _move_steps(rounder, group, centred, descent)[: stop - start]
            else:
                slope = descent.slope(start, stop)
            mask = None if kept is None else kept[start:stop]
            centred[start:stop] = descent.settle(start, slope, mask, rounder.steps(group, stop - start))


def _move_steps(rounder: Rounder, group: int, centred: NDArray[np.int16], descent: Descent) -> Floats:
    """The group's steps to where the loss is least, and the slope of its columns then."""
    start, stop = group * rounder.width, (group + 1) * rounder.width
    slope = descent.slope(start, stop)
    q = centred[start:stop].astype(np.float32)
    turned = descent.turned(start, q)
    along, curve = np.einsum("no,no->o", slope, q), np.einsum("no,no->o", turned, q)
    scale = rounder.scale[group]
    moved = stored(scale + along / np.maximum(curve, np.float32(1e-30)), rounder.grid)
    change = moved - scale
    gains = (change * (curve * change - 2 * along) < 0) & (along > -scale * curve)
    change = np.where(gains, change, np.float32(0))
    rounder.scale[group] += change
    descent.error[start:stop] -= change * q
    slope -= change * turned
    return slope
