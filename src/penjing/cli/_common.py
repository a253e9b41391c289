"""What several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

WEIGHT_CACHE: bool = typer.Option(
    True, envvar="PENJING_WEIGHT_CACHE", help="Keep packed weights in a file, so that the next start is quick."
)


def say_notes(model: str) -> None:
    """On standard error: where the weights are not computed on exactly as they are stored."""
    import sys

    from ..checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    for note in checkpoint.notes:
        print(f"penjing: {note}", file=sys.stderr)
    checkpoint.close()


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[float, float], None]]:
    """A bar with the time left on standard error, for as long as the context lasts: call it with (done, all).

    Where standard error is no terminal, a line every minute in its place.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(what)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Lines:
    """Progress for a log: a line on standard error every so many seconds, with the time left."""

    def __init__(self, what: str, every: float = 60.0) -> None:
        self._what, self._every = what, every
        self._begun: tuple[float, float] | None = None  # when, and what was done by then: a resumed run has done much
        self._said = 0.0

    def __call__(self, done: float, total: float) -> None:
        import sys
        import time

        now = time.monotonic()
        if self._begun is None:
            self._begun, self._said = (now, done), now
        if now - self._said < self._every or not total:
            return
        self._said = now
        since, before = self._begun
        left = f", about {(now - since) * (total - done) / (done - before) / 60:.0f} min left" if done > before else ""
        print(f"penjing: {self._what}: {done / total:.0%}{left}", file=sys.stderr, flush=True)


_UNITS = {"": 1, "B": 1} | {f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}IB": 1024**n for n, prefix in enumerate("KMGT", 1)}


def parse_size(text: str, option: str) -> int:
    """``4GiB``, ``500MB``, ``1000`` → bytes; BadInput names the option."""
    import re

    from ..errors import BadInput

    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise BadInput(f"{option}={text!r}: give a size such as 4GiB, 500MB or 1000000")
    return int(float(found[1]) * _UNITS[found[2].upper()])
