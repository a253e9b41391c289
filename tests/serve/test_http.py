"""Raw HTTP: malformed bodies, routes, request ids, metrics. Whatever comes, the answer is JSON and the server lives."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from conftest import Server
from penjing.serve.openai import ChatRequest, CompletionRequest, TokenizeRequest

POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


def is_error(answer: httpx.Response, status: int) -> bool:
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert error.keys() >= {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert answer.headers["x-request-id"]
    return True


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"prompt":' + b"[" * 100_000,
        b'{"model": 7}',
        b'{"prompt": 5, "messages": 3, "tokens": "x"}',
        b'{"prompt": {"a": 1}, "messages": {}, "tokens": [1.5]}',
        b'{"prompt": "x", "messages": [{}], "tokens": [-1], "max_tokens": 1e99}',
        b'{"prompt": [99999999999999999999], "messages": [[]], "tokens": [99999999999999999999]}',
    ],
)
def test_malformed_bodies_are_the_clients_fault(server: Server, path: str, body: bytes) -> None:
    assert is_error(server.post(path, content=body), 400)


SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text()
ANY = st.recursive(
    SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
FIELDS = sorted(
    {*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__, *TokenizeRequest.__struct_fields__, "tokens"}
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(POSTS),
    body=st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=5),
    with_prompt=st.booleans(),
)
def test_any_json_gets_an_answer(server: Server, path: str, body: dict, with_prompt: bool) -> None:
    if with_prompt:  # get past the first check, and keep it short where nothing else is said
        body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **body}
    try:
        content = json.dumps(body).encode()
    except UnicodeEncodeError:
        return
    answer = server.post(path, content=content)
    assert answer.status_code < 500, (body, answer.text)
    if answer.status_code != 200:
        assert is_error(answer, answer.status_code)


def test_the_server_is_well_after_all_that(server: Server) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/health/ready").status_code == server.get("/ping").status_code == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", server.get("/version").json()["version"])
    server.wait_idle()


def test_routes_and_methods_that_are_not_there(server: Server) -> None:
    assert is_error(server.get("/v2/models"), 404)
    assert is_error(server.get("/v1/completions"), 405)
    assert is_error(server.post("/v1/embeddings", json={}), 404)


def test_a_body_beyond_all_measure(server: Server) -> None:
    assert is_error(server.post("/v1/completions", content=b" " * (33 << 20)), 413)


def test_request_ids(server: Server) -> None:
    assert server.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for odd in ("x" * 129, "with space"):
        assert re.fullmatch(
            "[0-9a-f]{32}", server.get("/health", headers={"x-request-id": odd}).headers["x-request-id"]
        )


def test_metrics_are_prometheus_and_count_what_happened(server: Server) -> None:
    before = server.metric("vllm:generation_tokens_total"), server.metric("vllm:prompt_tokens_total")
    asked = {"prompt": [5, 6, 7], "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    server.post("/v1/completions", json=asked)
    after = server.metric("vllm:generation_tokens_total"), server.metric("vllm:prompt_tokens_total")
    assert (after[0] - before[0], after[1] - before[1]) == (9, 3)
    families = {each.name: each for each in text_string_to_metric_families(server.get("/metrics").text)}
    wanted = (
        "num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries prefix_cache_hits "
        "prompt_tokens generation_tokens request_success time_to_first_token_seconds inter_token_latency_seconds "
        "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds "
        "request_decode_time_seconds request_prompt_tokens request_generation_tokens admission_rejections "
        "num_preemptions"
    )
    for name in wanted.split():
        samples = families[f"vllm:{name}"].samples
        assert all(sample.labels["model_name"] == "novelist" for sample in samples), name
    lengths = {
        sample.labels["finished_reason"]: sample.value
        for sample in families["vllm:request_success"].samples
        if sample.name.endswith("_total")
    }
    assert lengths["length"] >= 1
    assert sum(lengths.values()) == server.metric("vllm:e2e_request_latency_seconds_count")
    assert server.metric("penjing:engine_ready") == 1
