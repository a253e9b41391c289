"""The hessian's factor, and the loss it stands for.

With H = xᵀx / n of a layer's input, an error E = W − Ŵ (out, in) costs tr(E H Eᵀ), the mean squared error of the
layer's output. Factored as H = M D Mᵀ, with M unit upper triangular and D diagonal, that is Σ_k D_k · ‖(E M)_k‖²:
column by column,

    (E M)_k = w'_k − ŵ_k      with      w'_k = w_k + Σ_{j<k} e_j M_jk

so that whoever decides on the columns in order best puts w'_k in place, and pays D_k (w'_k − ŵ_k)² for what is left.
This is GPTQ's and SparseGPT's update (there with the Cholesky factor U of H⁻¹: U_kk² = 1 / D_k), in the form of LDLQ
(Chee et al., 2023, "QuIP", theorem 6), which needs no inverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from .statistics import Statistics

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
BLOCK = 256  # columns that the factorization takes at a time
# The share of the mean diagonal from which on float32 loses no eigenvalue: half the time and memory of float64.
ENOUGH_DAMPING = 1e-3


@dataclass(frozen=True)
class Factor:
    """H + damping · mean(diag H) · I = M D Mᵀ, its rows and columns in ``order``.

    order: int64 (in,), the columns as they are decided on.  unit: M float32 (in, in).  diagonal: D float32 (in,).
    damping: what it took; more than was asked for when H is not positive definite.
    """

    order: NDArray[np.int64]
    unit: Floats
    diagonal: Floats
    damping: float


def factor(statistics: Statistics, columns: int, damping: float, act_order: bool) -> Factor:
    """The hessian's factor, shared by all layers that share the statistics.

    act_order: columns with large inputs come first, while there are many left to make up for their errors.
    Raises BadInput when even a thousand times the damping does not make it positive definite.
    """
    hessian = statistics.need("hessian", columns)
    return statistics.derived("factor", (damping, act_order), lambda: _factor(hessian, damping, act_order))


def _factor(hessian: NDArray[Any], damping: float, act_order: bool) -> Factor:
    diagonal = np.diagonal(hessian)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    # M is upper triangular because columns are eliminated from the last one on: the order is turned for Cholesky.
    turned, used = _damped_cholesky(hessian, order[::-1], damping, np.float32)
    root = np.diagonal(turned)[::-1].copy()
    unit = np.empty(turned.shape, np.float32)
    np.divide(turned[::-1, ::-1], root, out=unit, casting="same_kind")
    return Factor(order, unit, np.square(root).astype(np.float32), used)


def inverse_diagonal(statistics: Statistics, columns: int, damping: float) -> tuple[Floats, float]:
    """The diagonal of (H + damping · mean(diag H) · I)⁻¹, float32 (in,), and the damping that it took."""
    hessian = statistics.need("hessian", columns)

    def make() -> tuple[Floats, float]:
        lower, used = _damped_cholesky(hessian, np.arange(columns), damping, np.float64)
        _invert(lower)
        return np.einsum("ij,ij->j", lower, lower).astype(np.float32), used

    return statistics.derived("inverse_diagonal", damping, make)


def inverse(statistics: Statistics, columns: int, damping: float) -> Doubles:
    """(H + damping · mean(diag H) · I)⁻¹, float64 (in, in)."""
    lower, _ = _damped_cholesky(statistics.need("hessian", columns), np.arange(columns), damping, np.float64)
    _invert(lower)
    found: Doubles = lower.T @ lower
    return found


def damping_used(statistics: Statistics) -> dict[str, float]:
    """The damping of the factor that was last made from these statistics, if one was, by the name "damping"."""
    made = statistics.last("factor")
    return {} if made is None else {"damping": made.damping}


def _damped_cholesky(
    hessian: NDArray[Any], order: NDArray[np.int64], damping: float, enough: type[np.floating[Any]]
) -> tuple[NDArray[Any], float]:
    """The lower factor of the damped hessian, in that order, and the damping that made it positive definite.

    enough: the type of it, where the damping is large enough for that one; else float64.
    """
    if (np.diagonal(hessian) < 0).any():
        raise BadInput("the hessian has a negative diagonal: it is not xᵀx of any input")
    for tried in (damping, *(max(damping, 1e-4) * 10**power for power in (1, 2, 3))):
        for dtype in dict.fromkeys((enough if tried >= ENOUGH_DAMPING else np.float64, np.float64)):
            added = ridge(hessian, tried)
            a = _ordered(hessian, order, dtype)
            a.flat[:: len(a) + 1] += dtype(added)
            try:
                _cholesky(a, added / 2)
            except np.linalg.LinAlgError:
                del a  # before the next one is made
                continue
            return a, tried
    raise BadInput(f"the hessian is not positive definite, even with {tried:g} of its mean diagonal added to it")


def _ordered(hessian: NDArray[Any], order: NDArray[np.int64], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """The hessian with its rows and columns in that order, and nothing as large beside it."""
    found = np.empty(hessian.shape, dtype)
    for low in range(0, len(order), BLOCK):
        # the mode spares a check of each number: 0.14 of the time
        found[low : low + BLOCK] = hessian[order[low : low + BLOCK]].take(order, axis=1, mode="clip")
    return found


def _cholesky(a: NDArray[Any], least: float) -> None:
    """The lower Cholesky factor in place of a symmetric matrix, zeros above it; LinAlgError unless positive definite.

    least: what no pivot may lie below, because the matrix has no smaller eigenvalue; where one does, rounding took it.
    In place and by blocks, because numpy's own takes three times the matrix.
    """
    smallest = max(math.sqrt(least), 1e-150)
    for low in range(0, len(a), BLOCK):
        high = min(low + BLOCK, len(a))
        a[low:, low:high] -= a[low:, :low] @ a[low:high, :low].T
        corner = np.linalg.cholesky(a[low:high, low:high].astype(np.float64))
        if not np.isfinite(corner).all() or np.diagonal(corner).min() < smallest:
            raise np.linalg.LinAlgError
        a[low:high, low:high] = corner
        a[high:, low:high] = a[high:, low:high] @ np.linalg.inv(corner).T.astype(a.dtype)
        a[low:high, high:] = 0


def _invert(lower: Doubles) -> None:
    """The inverse in place of a lower triangular matrix, by blocks of rows."""
    for low in range(0, len(lower), BLOCK):
        high = min(low + BLOCK, len(lower))
        corner = np.linalg.inv(lower[low:high, low:high])
        lower[low:high, :low] = -(corner @ (lower[low:high, :low] @ lower[:low, :low]))
        lower[low:high, low:high] = corner


def losses(error: NDArray[Any], hessian: NDArray[Any]) -> Doubles:
    """e H eᵀ of each row of an error (out, in): float64 (out,).  hessian: (in, in), or its diagonal alone (in,)."""
    found = np.empty(len(error), np.float64)
    h = hessian.astype(np.float32, copy=False)
    if h.ndim == 1:
        np.einsum("oi,i->o", np.square(error.astype(np.float32)), h, dtype=np.float64, out=found)
        return found
    for low in range(0, len(error), 512):
        rows = error[low : low + 512].astype(np.float32)
        found[low : low + 512] = np.einsum("oi,oi->o", rows @ h, rows, dtype=np.float64)
    return found


def relative_loss(weight: NDArray[Any], solved: NDArray[Any], hessian: NDArray[Any]) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ): the share of the layer's output that is lost; 0 where there is no output."""
    return relative_losses(weight, [solved], hessian)[0]


def relative_losses(weight: NDArray[Any], solved: Sequence[NDArray[Any]], hessian: NDArray[Any]) -> list[float]:
    """`relative_loss` of several solutions of one weight."""
    w = weight.astype(np.float32)
    whole = float(losses(w, hessian).sum())
    lost = [float(losses(w - each.astype(np.float32), hessian).sum()) for each in solved]
    return [each / whole if whole > 0 else 0.0 for each in lost]


def ridge(hessian: NDArray[Any], damping: float) -> float:
    """What damping adds to the diagonal: a share of its mean, or of 1 where nothing was seen."""
    return damping * (float(np.diagonal(hessian).astype(np.float64).mean()) or 1.0)
