"""A run of a block that stands still before products that somebody waits for, and goes on when it is told to.

So all of the text can go through a block layer by layer, each computed once, while weights change between them. A run
is a thread of its own, because that keeps whatever a module holds in the middle of its forward; one computes at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from threading import Semaphore, Thread

from torch import Tensor

from ..errors import PenjingError
from .products import Seen


class _Left(Exception):
    """The run is not wanted any more."""


class Walk:
    """compute: runs a block, and tells of each product before it is made.  stops: weights whose products it waits for.

    What goes wrong on the way is raised where the walk is told to go on.
    """

    def __init__(self, compute: Callable[[Seen], Tensor], stops: Collection[str]) -> None:
        self._compute, self._stops = compute, stops
        self._go, self._stands = Semaphore(0), Semaphore(0)
        self._at: tuple[tuple[str, ...], Tensor] | None = None  # names of the product it stands before, and its input
        self._result: Tensor | BaseException | None = None
        self._left = False
        self._thread = Thread(target=self._run, name="penjing-walk", daemon=True)
        self._thread.start()

    def to(self, name: str) -> Tensor:
        """Go on to the product with a weight, whose input this is; PenjingError where another one comes first."""
        self._go_on()
        if self._at is None or name not in self._at[0]:
            where = "nothing" if self._at is None else self._at[0][0]
            raise PenjingError(f"{name}: other text came to {where} before it: the order of layers depends on the text")
        return self._at[1]

    def end(self) -> Tensor:
        """Go on to the end → what leaves the block."""
        self._stops = ()
        self._go_on()
        found, self._result = self._result, None
        assert isinstance(found, Tensor)
        return found

    def leave(self) -> None:
        """Go no further, and free what is held on the way."""
        if self._thread.is_alive():
            self._left = True
            self._go.release()
            self._thread.join()
        self._at = self._result = None

    def _go_on(self) -> None:
        self._at = None
        self._go.release()
        self._stands.acquire()
        if isinstance(self._result, BaseException):
            raise self._result

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._left:
                self._result = self._compute(self._seen)
        except _Left:
            pass
        except BaseException as error:
            self._result = error
        self._stands.release()

    def _seen(self, names: tuple[str, ...], x: Tensor) -> None:
        if any(name in self._stops for name in names):
            self._at = names, x
            self._stands.release()
            self._go.acquire()
            if self._left:
                raise _Left
