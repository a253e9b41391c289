"""The server's life: bind, load, answer, drain, end."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

import uvicorn

from ..checkpoint import open_checkpoint
from ..engine.blocks import BLOCK
from ..engine.messages import Load
from ..errors import PenjingError
from ..models import read_any
from ..models.tokenizer import Tokenizer
from .app import create_app
from .prompts import Prompts
from .service import Service, Settings

log = logging.getLogger("penjing.serve")
KEEP_ALIVE_SECONDS = 30


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    served_model_names: Sequence[str] = (),
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 512,
    max_num_queued_reqs: int = 256,
    memory_budget: int | None = None,
    kv_cache_dtype: str = "auto",
    enable_prefix_caching: bool | None = None,
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs",
    speculative: str | None = None,
    num_speculative_tokens: int = 5,
    threads: int | None = None,
    weight_cache: bool = False,
    shutdown_timeout: float = 30.0,
    chat_template: str | Path | None = None,
) -> None:
    """Answer until SIGTERM or SIGINT; prints the address when the model is loaded.

    memory_budget: bytes.  shutdown_timeout: seconds.  None: as much as there is. See `Settings` and docs/serve.md.
    What is wrong with the model's folder or the address is found before anything is loaded. Raises PenjingError if
    the port is taken or the engine cannot load the model.
    """
    load = Load(
        folder=str(model),
        memory_budget=memory_budget,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
        threads=threads,
        weight_cache=weight_cache,
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=enable_prefix_caching,
        scheduling_policy=scheduling_policy,
        speculative=speculative,
        num_speculative_tokens=num_speculative_tokens,
    )
    settings = Settings(
        load=load,
        names=tuple(served_model_names) or (Path(model).resolve().name,),
        api_keys=tuple(api_keys),
        max_num_queued_reqs=max_num_queued_reqs,
        shutdown_timeout=shutdown_timeout,
        chat_template=Path(chat_template) if chat_template is not None else None,
    )
    checkpoint = open_checkpoint(settings.load.folder)
    config = read_any(checkpoint)
    checkpoint.close()
    prompts = Prompts(Tokenizer(settings.load.folder), config.bos_token_id, settings.chat_template)
    service = Service(settings, prompts, config)
    with _bind(host, port) as listener:
        asyncio.run(_serve(service, listener, host))


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise PenjingError(f"cannot listen on {host}:{port}: {reason}; --host and --port choose another") from None
    return listener


async def _serve(service: Service, listener: socket.socket, host: str) -> None:
    config = uvicorn.Config(
        create_app(service),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        server_header=False,
    )
    server = _Server(config, service)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(service.engine.start())
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and starting.exception():
            server.should_exit = True
        elif not service.draining:  # asked to stop while it loads, it closes the socket: nothing to announce
            shown = f"[{host}]" if ":" in host else host
            _announce(service, f"http://{shown}:{listener.getsockname()[1]}")
        await serving
        if starting.done():
            starting.result()
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await service.engine.stop()


def _announce(service: Service, url: str) -> None:
    ready = service.engine.ready
    assert ready is not None
    mib = 1 << 20
    print(
        f"{service.name}: weights {ready.weights_bytes / mib:,.0f} MiB, "
        f"cache {ready.blocks * ready.block_bytes / mib:,.0f} MiB ({ready.kv_cache_dtype}) for "
        f"{ready.blocks * BLOCK:,} tokens, at most {ready.max_model_len:,} in a request; "
        f"budget {ready.memory_budget / mib:,.0f} MiB; loaded in {ready.load_seconds:.1f} s"
        + (" from the weight cache" if ready.from_cache else "")
    )
    print(f"Penjing serves {service.name} at {url} (OpenAI's interface at {url}/v1)", flush=True)


class _Server(uvicorn.Server):
    """The first signal drains, the second ends at once; both end with status 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._asked_to_stop)

    def _asked_to_stop(self) -> None:
        if self._draining is None:
            self._draining = self._loop.create_task(self._drain())
        else:
            self._service.hurry()
            self.should_exit = True

    async def _drain(self) -> None:
        print("penjing: stopping; requests in flight finish first", file=sys.stderr)
        await self._service.drain()
        self.should_exit = True
