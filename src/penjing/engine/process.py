"""The engine in a process of its own: what runs there, and the pipe to it.

A message is four bytes of length and so many of msgpack. The engine's process ends when its pipe closes, so it never
outlives the server, and does not listen to the terminal's signals: how to stop is the server's decision.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import struct
import sys
import threading
import time

import msgspec

from ..checkpoint import open_checkpoint
from ..errors import BadInput, PenjingError, Unsupported, nearest
from ..kernels import KV_TYPES
from ..models import ModelConfig, Outline, load_any, read_any
from ..models import load as load_model
from ..models.step import StepModel
from . import budget
from .budget import Sizes
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
from .scheduler import Limits
from .speculate import Draft, Guesser, PromptLookup, Speculation, check_tokens, measured_cost

log = logging.getLogger("penjing.engine")
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
    if settings.kv_cache_dtype not in ("auto", *KV_TYPES):
        raise BadInput(
            f"kv_cache_dtype={settings.kv_cache_dtype!r}; {nearest(settings.kv_cache_dtype, ('auto', *KV_TYPES))}"
        )
    checkpoint = open_checkpoint(settings.folder)
    config = read_any(checkpoint)
    if isinstance(config, Outline):
        settings = _for_graph(settings, config)
    kv_type = "float16" if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype
    stored = checkpoint.size_bytes
    drafts = open_checkpoint(settings.speculative) if settings.speculative not in (None, "prompt") else None
    if settings.speculative and isinstance(config, ModelConfig) and config.state_bytes:
        raise Unsupported(
            f"{settings.folder}: its recurrent state cannot be taken back, so nothing can be guessed; "
            "leave --speculative away"
        )
    if drafts is not None:
        check_tokens(drafts, checkpoint)
    budget.check_weights(stored + (drafts.size_bytes if drafts else 0), total)
    # Before anything is read, with the least that it can take.
    expected = Sizes.expected(config, settings, stored, kv_type)
    budget.limits(settings, config, expected, total)
    model = load_any(
        checkpoint,
        threads=settings.threads,
        length=settings.max_model_len,
        cache=settings.weight_cache,
        screen=budget.has_room_for_screen(settings, config, expected, total),
    )
    sizes = Sizes.of(model, settings, kv_type)
    draft = load_model(drafts, length=settings.max_model_len, cache=settings.weight_cache) if drafts else None
    if draft is not None:
        sizes += Sizes.of(draft, settings, kv_type)
    limits, _ = budget.limits(settings, model.config, sizes, total)
    for each in (model, draft):
        if each is not None:
            each.reserve(limits.blocks, kv_type, limits.max_num_seqs)
    ready = Ready(
        max_model_len=limits.max_model_len,
        weights_bytes=sizes.weights,
        blocks=limits.blocks,
        block_bytes=sizes.block,
        kv_cache_dtype=kv_type,
        memory_budget=total,
        load_seconds=time.monotonic() - start,
        from_cache=model.from_cache,
    )
    return Engine(model, limits, speculation=_speculation(settings, limits, model, draft)), ready


def _for_graph(settings: Load, outline: Outline) -> Load:
    """What suits a model that transformers computes, which has no cache blocks to share or to store in another type."""
    for name, value, right in (
        ("kv_cache_dtype", settings.kv_cache_dtype, ("auto", "float32")),
        ("speculative", settings.speculative, (None,)),
        ("enable_prefix_caching", settings.enable_prefix_caching, (None, False)),
    ):
        if value not in right:
            raise Unsupported(
                f"{settings.folder}: {name}={value}: model_type = {outline.family!r} has no description, and"
                " transformers' graph keeps a float32 cache for each sequence alone; leave this option away"
            )
    return msgspec.structs.replace(settings, kv_cache_dtype="float32", enable_prefix_caching=False)


def _speculation(settings: Load, limits: Limits, model: StepModel, draft: StepModel | None) -> Speculation | None:
    if settings.speculative is None:
        return None
    guesser: Guesser = PromptLookup()
    if draft is not None:
        guesses = max(1, min(settings.num_speculative_tokens, limits.max_model_len - 1))
        cost = measured_cost(draft, model, guesses)
        if cost >= 1:
            log.info("the draft cannot pay, and is not asked: a guess takes %.2f of a step of the model", cost)
        guesser = Draft(draft, model, limits.max_model_len, limits.max_num_batched_tokens, cost)
    return Speculation(guesser, settings.num_speculative_tokens)


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
