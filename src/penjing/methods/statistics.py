"""What calibration collects on a layer's input x (n, in), row by row of tokens, and what methods read of it.

    absmax      float32 (in,)     max |x|
    absmean     float32 (in,)     mean |x|
    mean        float32 (in,)     mean x
    input_norm  float32 (in,)     √(mean x²): ‖x_j‖₂ / √n, so that no method depends on how much was seen
    hessian     float32 (in, in)  xᵀx / n: half the second derivative of the layer's mean squared error

Layers that read the same input (q, k, v; gate, up) share one `Statistics`, and so what methods derive from it, such as
the Cholesky factor of the hessian: it is computed for the first of them, and kept for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, nearest

Floats = NDArray[np.float32]
Derived = TypeVar("Derived")
KINDS = ("absmax", "absmean", "hessian", "input_norm", "mean")
PANEL = 512  # columns of the hessian that are summed at a time, so that no second (in, in) array is made


class Statistics(Mapping[str, NDArray[Any]]):
    """Statistics by name, read-only, and what was derived from them."""

    def __init__(self, values: Mapping[str, NDArray[Any]] | None = None) -> None:
        self._values = dict(values or {})
        self._derived: dict[str, tuple[Hashable, Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def need(self, name: str, columns: int) -> NDArray[Any]:
        """A statistic of an input of that many columns; BadInput when it is absent, misshapen or not finite."""
        if name not in self._values:
            raise BadInput(f"the statistic {name!r} is missing: this method needs calibration")
        value, shape = self._values[name], (columns,) * (2 if name == "hessian" else 1)
        if value.shape != shape:
            raise BadInput(
                f"the statistic {name!r} has the shape {value.shape}; {shape} fits the weight's {columns} columns"
            )
        if not np.isfinite(value).all():
            raise BadInput(f"the statistic {name!r} has a NaN or an infinity: the calibration went wrong")
        return value

    def derived(self, name: str, settings: Hashable, make: Callable[[], Derived]) -> Derived:
        """What ``make`` gives, made once for the same settings; of each name the last is kept."""
        known = self._derived.get(name)
        if known is None or known[0] != settings:
            self._derived.pop(name, None)  # both at once need not fit in memory
            known = self._derived[name] = (settings, make())
        value: Derived = known[1]
        return value

    def last(self, name: str) -> Any:
        """What was last derived by that name, or None."""
        return self._derived[name][1] if name in self._derived else None


class Collector:
    """Sums over batches of rows; `statistics` divides them by the rows seen. Batches in any cut give the same sums.

    needs: names of `KINDS`.  accumulate: what sums are held in; "float32" halves the memory of a hessian, and is good
    for about 10⁶ rows at its usual damping.
    """

    def __init__(
        self, columns: int, needs: tuple[str, ...], accumulate: Literal["float32", "float64"] = "float64"
    ) -> None:
        for name in needs:
            if name not in KINDS:
                raise BadInput(f"the statistic {name!r} is unknown; {nearest(name, KINDS)}")
        self.columns, self.needs, self.count = columns, tuple(sorted(set(needs))), 0
        self._sums: dict[str, NDArray[Any]] = {
            name: np.zeros((columns,) * (2 if name == "hessian" else 1), accumulate) for name in self.needs
        }

    @staticmethod
    def bytes_needed(columns: int, needs: tuple[str, ...], accumulate: str = "float64", rows: int = 0) -> int:
        """Memory of a collector, and of adding that many rows at a time to it, in bytes."""
        sums = (
            sum(columns * (columns if name == "hessian" else 1) for name in set(needs)) * np.dtype(accumulate).itemsize
        )
        panel = min(PANEL, columns) * columns * 4 if "hessian" in needs else 0
        return sums + max(panel, rows * columns * 8)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._sums.values())

    def add(self, x: NDArray[Any]) -> None:
        """Rows of the layer's input: (n, in), any float. BadInput for a NaN, an infinity or another width."""
        if x.ndim != 2 or x.shape[1] != self.columns:
            raise BadInput(f"rows of shape {x.shape}: this layer's input has {self.columns} columns")
        rows = np.ascontiguousarray(x, np.float32)
        if not np.isfinite(rows).all():
            raise BadInput("the layer's input has a NaN or an infinity: the model overflows on this text")
        if not len(rows):
            return
        self.count += len(rows)
        for name, total in self._sums.items():
            if name == "hessian":
                add_products(total, rows)
            elif name == "absmax":
                np.maximum(total, np.abs(rows).max(axis=0), out=total)
            elif name == "input_norm":
                total += np.einsum("nj,nj->j", rows, rows, dtype=np.float64)
            else:
                total += (np.abs(rows) if name == "absmean" else rows).sum(axis=0, dtype=np.float64)

    def merge(self, other: Collector) -> None:
        """Take over what another collector of the same layer saw."""
        if (other.columns, other.needs) != (self.columns, self.needs):
            raise BadInput("two collectors of different columns or needs cannot be merged")
        self.count += other.count
        for name, total in self._sums.items():
            (np.maximum if name == "absmax" else np.add)(total, other._sums[name], out=total)

    def statistics(self) -> Statistics:
        """What was seen; BadInput when nothing was."""
        if not self.count:
            raise BadInput("the layer saw no rows: no calibration text reached it (an expert that no token chose?)")
        found: dict[str, NDArray[Any]] = {}
        for name, total in self._sums.items():
            if name == "hessian":
                found[name] = _symmetric(total, self.count)
            elif name == "absmax":
                found[name] = total.astype(np.float32)
            else:
                mean = total / self.count
                found[name] = (np.sqrt(mean) if name == "input_norm" else mean).astype(np.float32)
        return Statistics(found)


def add_products(total: NDArray[Any], rows: Floats) -> None:
    """total += rowsᵀ rows, the upper triangle of panels only: the rest is its mirror."""
    for low in range(0, len(total), PANEL):
        high = min(low + PANEL, len(total))
        total[low:high, low:] += rows[:, low:high].T @ rows[:, low:]


def _symmetric(total: NDArray[Any], count: int) -> Floats:
    """The mean, float32, with the lower triangle filled in."""
    whole = np.empty(total.shape, np.float32)
    for low in range(0, len(total), PANEL):
        high = min(low + PANEL, len(total))
        np.divide(total[low:high, low:], count, out=whole[low:high, low:], casting="same_kind")
        corner = np.triu(whole[low:high, low:high])
        whole[low:high, low:high] = corner + np.triu(corner, 1).T
        whole[high:, low:high] = whole[low:high, high:].T
    return whole


def evenly(count: int, most: int) -> NDArray[np.int64]:
    """Numbers of at most so many of ``count`` rows, evenly spread."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)
