"""Real server processes on loopback, and the official client."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import pytest

ROOT = Path(__file__).parents[2]
NOVELIST = ROOT / "examples" / "novelist"
LONG = "The old man walked to the sea. " * 60  # some 500 tokens


@dataclass
class Server:
    """A running `penjing serve`."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **options)

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **options)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([0-9.e+-]+)$", self.get("/metrics").text, re.MULTILINE)
        assert found, f"{name} is not among the metrics"
        return sum(map(float, found))

    def engine(self) -> psutil.Process:
        (engine,) = (
            each
            for each in psutil.Process(self.process.pid).children()
            if "penjing.engine.process" in " ".join(each.cmdline())
        )
        return engine

    def wait_idle(self, seconds: float = 10) -> None:
        wait_until(
            lambda: self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") == 0, seconds
        )

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


def wait_until(condition, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "penjing", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def running(*options: object, model: Path = NOVELIST, wait: bool = True) -> Iterator[Server]:
    """`penjing serve` on a free port, stopped at the end however the test ends."""
    process = subprocess.Popen(
        command("serve", model, "--port", 0, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    server = Server(process)
    announced = threading.Event()

    def read() -> None:
        for line in process.stdout:
            server.lines.append(line)
            if match := re.search(r"at (http://\S+)", line):
                server.url = match.group(1)
                announced.set()
        announced.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if wait:
            assert announced.wait(60), server.lines
            assert server.url, "".join(server.lines)
        yield server
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.wait()
        reader.join(5)
        process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("--max-num-seqs", 8) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as one:
        yield one
