"""The server's end of the engine's process: start it, send requests, hear of its events and of its death."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

from ..errors import PenjingError
from .messages import Abort, Add, Command, Event, Failed, Load, Ready, Report, Request, Stats, Stop, report_decoder
from .process import HEADER, pack


class EngineFailed(PenjingError):
    """The engine could not load the model; ``exit_code`` is that of the reason."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Generation:
    """The events of some requests, in order of arrival. A context: leaving it aborts those that are not done."""

    def __init__(self, engine: EngineProcess, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._requests = requests
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self.unfinished = {request.id for request in requests}

    def __enter__(self) -> Self:
        for request in self._requests:
            self._engine.add(request, self._queue)
        return self

    async def next(self, timeout: float | None = None) -> Event | None:
        """The next event, or None if there is none for ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):  # wait_for loses a cancellation that meets an event, before 3.12
                event = await self._queue.get()
        except TimeoutError:
            return None
        if event.finish_reason:
            self.unfinished.discard(event.request_id)
        return event

    def abort(self, request_id: str) -> None:
        self.unfinished.discard(request_id)
        self._engine.abort(request_id)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for request_id in list(self.unfinished):
            self.abort(request_id)


class EngineProcess:
    """One engine. ``state`` goes from "new" over "loading" and "ready" to "dead", whose reason is ``epitaph``."""

    def __init__(self, settings: Load) -> None:
        self.settings = settings
        self.state: Literal["new", "loading", "ready", "dead"] = "new"
        self.epitaph = ""
        self.ready: Ready | None = None
        self.stats = Stats()
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self._last_sign = time.monotonic()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> Ready:
        """Start the process and wait until the model is loaded; raises EngineFailed with the reason if it is not."""
        self.state = "loading"
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "penjing.engine.process", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._send(self.settings)
        try:
            first = await self._receive()
        except (asyncio.IncompleteReadError, OSError):
            first = Failed(await self._cause_of_death(), 1)
        if not isinstance(first, Ready):
            self.state = "dead"
            failure = first if isinstance(first, Failed) else Failed(f"unexpected {type(first).__name__}", 1)
            self.epitaph = failure.message
            raise EngineFailed(failure.message, failure.exit_code)
        self.ready = first
        self.state = "ready"
        self.stats = Stats(blocks=first.blocks)
        self._reading = asyncio.create_task(self._read())
        return first

    def add(self, request: Request, queue: asyncio.Queue[Event]) -> None:
        """Send a request; its events, and at the latest the engine's death, arrive in the queue."""
        if self.state != "ready":
            queue.put_nowait(_error(request.id, self.epitaph or "the engine is not ready"))
            return
        if not self._queues:
            self._last_sign = time.monotonic()
        self._queues[request.id] = queue
        self._send(Add(request))

    def abort(self, request_id: str) -> None:
        if self._queues.pop(request_id, None) is not None and self.state == "ready":
            self._send(Abort(request_id))

    def fail_all(self, message: str) -> None:
        """Give every request that is not done an error event, and stop computing it."""
        for request_id, queue in list(self._queues.items()):
            queue.put_nowait(_error(request_id, message))
            self.abort(request_id)

    def silent_seconds(self) -> float:
        """How long the engine has given no sign of life although it has work; 0 without work."""
        return time.monotonic() - self._last_sign if self._queues else 0.0

    async def stop(self, timeout: float = 5.0) -> None:
        """Ask the process to end, and kill it if it does not; while it loads it does not listen."""
        if self._process is not None:
            if self.state == "loading" and self._process.returncode is None:
                self._process.kill()
            self._send(Stop())
            try:
                await asyncio.wait_for(self._process.wait(), timeout)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._reading:
            await self._reading
        if self._writer:
            self._writer.close()

    def _send(self, message: Command) -> None:
        if self._writer and not self._writer.is_closing():
            self._writer.write(pack(message))

    async def _receive(self) -> Report:
        size = HEADER.unpack(await self._reader.readexactly(HEADER.size))[0]
        return report_decoder.decode(await self._reader.readexactly(size))

    async def _read(self) -> None:
        try:
            while True:
                report = await self._receive()
                if isinstance(report, (Ready, Failed)):
                    continue
                self._last_sign = time.monotonic()
                self.stats = report.stats
                for event in report.events:
                    if (queue := self._queues.get(event.request_id)) is not None:
                        queue.put_nowait(event)
                        if event.finish_reason:
                            del self._queues[event.request_id]
        except (asyncio.IncompleteReadError, OSError):
            self.state = "dead"
            self.epitaph = await self._cause_of_death()
            self.fail_all(self.epitaph)

    async def _cause_of_death(self) -> str:
        status = await self._process.wait() if self._process else 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the engine's process {how}"


def _error(request_id: str, message: str) -> Event:
    return Event(request_id=request_id, finish_reason="error", error=message)
