"""The server's life: keys, overload, disconnects, drain, death of the engine, what cannot be started."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from conftest import NOVELIST, Server, running, wait_until
from penjing.cli import main

ENDLESS = {"prompt": [5, 6, 7], "max_tokens": 1000, "ignore_eos": True, "temperature": 0}
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WRONG_KEYS = (
    {},
    {"Authorization": "Bearer third"},
    {"Authorization": "Basic second"},
    {"Authorization": "é".encode()},
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """One place, one more in the queue, keys, another name, a chat template."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    options = "--max-num-seqs 1 --max-num-queued-reqs 1 --api-key first --api-key second --max-model-len 1010"
    names = ("--served-model-name", "mine", "--served-model-name", "org/mine", "--chat-template", template)
    with running(*options.split(), *names) as server:
        yield server


KEY = {"Authorization": "Bearer second"}


def open_stream(server: Server, **changes: object) -> tuple[httpx.Client, httpx.Response]:
    """A stream that has begun."""
    client = httpx.Client(timeout=30)
    asked = client.build_request(
        "POST", f"{server.url}/v1/completions", json={**ENDLESS, "stream": True, **changes}, headers=KEY
    )
    return client, client.send(asked, stream=True)


def test_keys_cover_everything_but_health(small: Server) -> None:
    for path in ("/v1/models", "/metrics", "/version", "/docs", "/nowhere"):
        for wrong in WRONG_KEYS:
            answer = small.get(path, headers=wrong)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert small.post("/v1/completions", json=ENDLESS).status_code == 401
    for path in ("/health", "/health/ready", "/ping"):
        assert small.get(path).status_code == 200
    for key in ("first", "second"):
        with small.client(api_key=key) as client:
            assert [model.id for model in client.models.list()] == ["mine", "org/mine"]
            assert client.models.retrieve("org/mine").root == "mine"
    with small.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as error:
        client.models.list()
    assert error.value.code == "invalid_api_key"


def test_the_template_given_is_used(small: Server) -> None:
    messages = [{"role": "developer", "content": "Be."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    chat = small.post("/tokenize", json={"messages": messages}, headers=KEY).json()
    text = small.post("/detokenize", json={"tokens": chat["tokens"]}, headers=KEY).json()["prompt"]
    assert text == "<system>Be.<user>Hi<assistant>"
    with small.client(api_key="first") as client:
        answer = client.chat.completions.create(model="org/mine", messages=messages, max_tokens=3)
    assert answer.usage.prompt_tokens == len(chat["tokens"])
    assert answer.model == "org/mine"


def test_too_many_are_told_to_come_back(small: Server) -> None:
    first = open_stream(small)
    second = open_stream(small)
    try:
        wait_until(lambda: waiting(small) == 1)
        refused = small.post("/v1/completions", json=ENDLESS, headers=KEY)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        with small.client(api_key="first") as client, pytest.raises(openai.RateLimitError) as error:
            client.completions.create(model="mine", prompt="x")
        assert error.value.code == "rate_limit_exceeded"
    finally:
        for client, response in (first, second):
            response.close()
            client.close()
    idle(small)
    with small.client(api_key="first", max_retries=0) as client:
        client.completions.create(model="mine", prompt="x", max_tokens=1)


def metric(server: Server, name: str) -> float:
    text = server.get("/metrics", headers=KEY).text
    return float(re.search(rf"^vllm:{name}.*}} (.*)$", text, re.MULTILINE)[1])


def waiting(server: Server) -> float:
    return metric(server, "num_requests_waiting")


def aborted(server: Server) -> float:
    return metric(server, 'request_success_total{finished_reason="abort"')


def idle(server: Server) -> None:
    wait_until(lambda: metric(server, "num_requests_running") + waiting(server) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(small: Server, stream: bool) -> None:
    """The one place is taken; a second request waits for it and gets it when the first client hangs up."""
    before = aborted(small)
    with socket.create_connection(("127.0.0.1", int(small.url.rpartition(":")[2]))) as leaves:
        body = json.dumps({**ENDLESS, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\nContent-Length: {len(body)}"
        leaves.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: metric(small, "num_requests_running") == 1)
    answer = small.post("/v1/completions", json={**ENDLESS, "max_tokens": 5}, headers=KEY)
    assert answer.json()["usage"]["completion_tokens"] == 5
    idle(small)
    assert aborted(small) == before + 1


def test_a_client_that_leaves_the_queue_disturbs_nobody(small: Server) -> None:
    before = aborted(small)
    client, response = open_stream(small, max_tokens=300)
    lines = response.iter_lines()
    next(lines)
    other, queued = open_stream(small)
    wait_until(lambda: waiting(small) == 1)
    queued.close()
    other.close()
    wait_until(lambda: waiting(small) == 0)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    client.close()
    idle(small)
    assert aborted(small) == before + 1


def test_a_client_that_leaves_while_its_prompt_is_read(small: Server) -> None:
    before = metric(small, "generation_tokens_total"), aborted(small)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{small.url}/v1/completions", json={**ENDLESS, "prompt": [5] * 1000, "max_tokens": 9},
            headers=KEY, timeout=httpx.Timeout(5, read=0.01),
        )  # fmt: skip
    wait_until(lambda: aborted(small) == before[1] + 1)
    idle(small)
    assert metric(small, "generation_tokens_total") == before[0]


def test_the_servers_processes_have_no_torch(small: Server) -> None:
    for pid in (small.process.pid, small.engine().pid):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "_native" in maps
        assert "libtorch" not in maps
        assert "/torch/" not in maps


def test_sigterm_lets_requests_finish() -> None:
    with running() as server:
        client, response = open_stream(server, max_tokens=150)
        lines = response.iter_lines()
        next(lines)
        server.terminate()
        wait_until(lambda: server.get("/health/ready").status_code == 503)
        assert server.get("/health").status_code == 200
        refused = server.post("/v1/completions", json=ENDLESS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        client.close()
        assert server.process.wait(10) == 0


def test_sigterm_ends_what_takes_too_long_with_an_error() -> None:
    with running("--shutdown-timeout", "0.2", "--max-num-seqs", "1") as server:
        engine = server.engine()
        client, response = open_stream(server)
        lines = response.iter_lines()
        next(lines)
        waiting: list[httpx.Response] = []
        queued = threading.Thread(target=lambda: waiting.append(server.post("/v1/completions", json=ENDLESS)))
        queued.start()
        wait_until(lambda: server.metric("vllm:num_requests_waiting") == 1)
        start = time.monotonic()
        server.terminate()
        last = [line for line in lines if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert "shutting down" in error["message"]
        assert isinstance(error["code"], str)
        queued.join(10)
        assert waiting[0].status_code == 503
        client.close()
        assert server.process.wait(10) == 0
        assert time.monotonic() - start < 5
        assert not engine.is_running()


def test_the_engines_death_is_an_error_and_not_a_silence() -> None:
    with running() as server:
        with server.client() as client:
            stream = client.completions.create(
                model="novelist", prompt=[5], max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
            )
            next(stream)
            waiting: list[httpx.Response] = []
            whole = threading.Thread(target=lambda: waiting.append(server.post("/v1/completions", json=ENDLESS)))
            whole.start()
            wait_until(lambda: server.metric("vllm:num_requests_running") == 2)
            server.engine().kill()
            with pytest.raises(openai.APIError, match="killed by signal 9"):
                list(stream)
            whole.join(10)
            assert waiting[0].status_code == 503
            health = server.get("/health")
            assert health.status_code == 503
            assert "killed by signal 9" in health.json()["error"]["message"]
            with pytest.raises(openai.InternalServerError) as error:
                client.completions.create(model="novelist", prompt="x")
            assert error.value.code == "engine_unavailable"
            assert server.get("/version").status_code == 200
        server.terminate()
        assert server.process.wait(10) == 0


def test_ctrl_c_stops_at_once_when_it_comes_twice() -> None:
    with running() as server:
        client, response = open_stream(server)
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: server.get("/health/ready").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0
        client.close()


def test_what_cannot_be_started_is_said_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(NOVELIST, broken)
    os.truncate(broken / "model.safetensors", 1_000_000)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, status, text in [
            ((NOVELIST, "--port", port), 1, f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            ((tmp_path / "nothing",), 2, "there is no such folder"),
            ((broken,), 2, "model.safetensors"),
            ((NOVELIST, "--port", 0, "--memory-budget", "100MiB"), 1, "memory budget is 100 MiB"),
            ((NOVELIST, "--port", 0, "--memory-budget", "lots"), 2, "give a size such as 4GiB"),
            ((NOVELIST, "--port", 0, "--max-model-len", 5000), 2, "positions for 1024"),
            ((NOVELIST, "--kv-cache-dtype", "fp8"), 2, "known: auto, bfloat16, float16"),
            ((NOVELIST, "--scheduling-policy", "random"), 2, "give fcfs or priority"),
            ((NOVELIST, "--port", 0, "--speculative", tmp_path / "nothing"), 2, "there is no such folder"),
            ((NOVELIST, "--port", 0, "--speculative", NOVELIST, "--memory-budget", "200MiB"), 1, "memory budget is"),
            ((NOVELIST, "--chat-template", tmp_path / "no.jinja"), 2, "No such file"),
        ]:
            with pytest.raises(SystemExit) as ended:
                main(["serve", *map(str, arguments)])
            out, err = capfd.readouterr()
            (line,) = err.splitlines()
            assert ended.value.code == status, line
            assert text in line
            assert not out


def test_sigterm_while_loading() -> None:
    with running(wait=False) as server:
        wait_until(lambda: psutil.Process(server.process.pid).children(), 20)
        server.terminate()
        assert server.process.wait(10) == 0
