"""The engine in a process of its own: what runs there, and the pipe to it.

A message is four bytes of length and so many of msgpack. The engine's process ends when its pipe closes, so it never
outlives the server, and does not listen to the terminal's signals: how to stop is the server's decision.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import struct
import sys
import threading
import time

import msgspec

from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import BadInput, PenjingError
from ..models import load as load_model
from ..models import read_config
from . import budget
from .engine import Engine
from .messages import (
    Abort,
    Add,
    Command,
    Event,
    Failed,
    Load,
    Progress,
    Ready,
    Report,
    Stop,
    command_decoder,
    encoder,
)

HEADER = struct.Struct("<I")


def pack(message: Command | Report) -> bytes:
    body = encoder.encode(message)
    return HEADER.pack(len(body)) + body


class Pipe:
    """The engine's end: blocking."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, message: Report) -> None:
        self._connection.sendall(pack(message))

    def receive(self) -> Command:
        """The next command; EOFError when the server is gone."""
        header = self._file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise EOFError
        body = self._file.read(HEADER.unpack(header)[0])
        return command_decoder.decode(body)


def load(settings: Load) -> tuple[Engine, Ready]:
    """An engine with its model in memory, within its budget; raises PenjingError with the reason if that cannot be."""
    start = time.monotonic()
    total = settings.memory_budget or budget.default_budget()
    checkpoint = open_checkpoint(settings.folder)
    config = read_config(checkpoint)
    stored = stored_bytes(checkpoint)
    budget.check_weights(stored, total)
    budget.limits(settings, config, stored, total)  # before anything is read, with the least that it can take
    model = load_model(checkpoint, threads=settings.threads)
    limits, _ = budget.limits(settings, config, model.weights_bytes, total)
    ready = Ready(
        max_model_len=limits.max_model_len,
        weights_bytes=model.weights_bytes,
        kv_bytes=limits.kv_bytes,
        kv_bytes_per_token=limits.kv_bytes_per_token,
        memory_budget=total,
        load_seconds=time.monotonic() - start,
    )
    return Engine(model, limits), ready


def stored_bytes(checkpoint: Checkpoint) -> int:
    return sum((checkpoint.path / name).stat().st_size for name in checkpoint.weight_files)


def serve(pipe: Pipe) -> None:
    """Load what the first command names, then step while there is work."""
    settings = pipe.receive()
    if not isinstance(settings, Load):
        raise BadInput(f"the first command is {type(settings).__name__}, not Load")
    try:
        engine, ready = load(settings)
    except PenjingError as error:
        pipe.send(Failed(str(error), error.exit_code))
        return
    except MemoryError:
        pipe.send(Failed(f"{settings.folder}: no memory to load the model", 1))
        return
    pipe.send(ready)
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), daemon=True).start()
    while True:
        events: list[Event] = []
        while not inbox.empty() or not engine.has_work:
            command = inbox.get()
            if isinstance(command, Stop):
                return
            events += _obey(engine, command)
            if events or isinstance(command, Abort):
                break  # the answer, or the freed place in the statistics, is due now
        events += engine.step()
        pipe.send(Progress(events, engine.stats()))


def _obey(engine: Engine, command: Command) -> list[Event]:
    if isinstance(command, Abort):
        engine.abort(command.request_id)
    elif isinstance(command, Add):
        try:
            engine.add(command.request)
        except PenjingError as error:
            return [Event(request_id=command.request.id, finish_reason="error", error=str(error))]
    return []


def _read(pipe: Pipe, inbox: queue.SimpleQueue[Command]) -> None:
    while True:
        try:
            inbox.put(pipe.receive())
        except (EOFError, OSError, msgspec.DecodeError):
            os._exit(0)  # the server is gone: there is nobody to answer, however long the step would still take


def main() -> None:
    """``python -m penjing.engine.process FD``: the descriptor of a connected socket."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            serve(Pipe(connection))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            sys.exit(0)


if __name__ == "__main__":
    main()
