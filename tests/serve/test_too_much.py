"""More than the model, the memory or a request has room for: real processes say the numbers in one line, and go on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from conftest import LONG, NOVELIST, Server, command, environment, running

WINDOW = 1024
TIGHT = ("--memory-budget", "192MiB", "--max-num-batched-tokens", 64, "--max-num-seqs", 4)  # 3,328 tokens of cache
GREEDY = {"model": "novelist", "temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def tight() -> Iterator[Server]:
    with running(*TIGHT) as server:
        yield server


def asked(server: Server, prompt: object) -> list[str]:
    answer = server.post("/v1/completions", json=GREEDY | {"prompt": prompt})
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [5] * WINDOW}, "prompt"),
        ("/v1/completions", {"prompt": [[5] * 3, [5] * 5000]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG * 4}]}, "messages"),
    ],
    ids=["prompt", "one of a batch", "conversation"],
)
def test_a_prompt_beyond_the_window_is_refused_by_serve(
    tight: Server, path: str, body: dict, param: str, stream: bool
) -> None:
    before = asked(tight, "It was")
    answer = tight.post(path, json=GREEDY | body | {"stream": stream})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "context_length_exceeded",
        param,
    )
    asked_for = error["n_prompt_tokens"]
    assert asked_for >= WINDOW
    assert f"maximum context length is {WINDOW} tokens" in error["message"]
    assert f"requested {asked_for + 4} tokens ({asked_for} in the {param}, 4 in the completion)" in error["message"]
    assert "\n" not in error["message"]
    assert asked(tight, "It was") == before


def test_a_batch_that_the_cache_has_no_room_for_is_answered_in_turns(tight: Server) -> None:
    """Forty prompts of 200 tokens are more than twice what the budget holds: each gets the text that it gets alone."""
    prompts = [[each % 7 + 300] * 150 + [5] * (50 + each % 5) for each in range(40)]
    assert sum(map(len, prompts)) > 2 * 3328
    alone = [asked(tight, prompt)[0] for prompt in prompts[:3]]
    assert asked(tight, prompts)[:3] == alone
    assert tight.get("/health/ready").status_code == 200


def test_a_batch_of_too_many_is_refused_with_the_numbers(tight: Server) -> None:
    answer = tight.post("/v1/completions", json=GREEDY | {"prompt": [[5]] * 600, "n": 2})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "prompt")
    assert error["message"] == "prompts × n are 1200 sequences; 1024 fit into a request: send several"
    assert asked(tight, "It was")


@pytest.mark.parametrize(
    ("verb", "options", "numbers"),
    [
        ("serve", ("--max-num-batched-tokens", 10**7, "--memory-budget", "300MiB"), ("activations 14,", "of 300 MiB")),
        ("serve", ("--max-model-len", 1024, "--memory-budget", "183MiB"), ("of 183 MiB", "1024 tokens needs 3 MiB")),
        ("chat", ("--memory-budget", "183MiB"), ("activations 6 MiB", "of 183 MiB")),
        ("chat", ("--memory-budget", "150MiB"), ("weights are 21 MiB", "budget is 150 MiB")),
    ],
)
def test_a_step_beyond_the_budget_is_refused_at_the_start(verb: str, options: tuple, numbers: tuple[str, ...]) -> None:
    port = ("--port", 0) if verb == "serve" else ()
    program = command(verb, NOVELIST, *port, *options)
    ended = subprocess.run(program, input="It was\n", capture_output=True, text=True, env=environment(), timeout=60)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert all(number in line for number in numbers), line
    assert not ended.stdout


def test_chat_refuses_a_message_beyond_the_window_and_goes_on() -> None:
    program = command("chat", NOVELIST, "--temperature", 0, "--max-tokens", 8)

    def said(text: str) -> tuple[list[str], list[str]]:
        ended = subprocess.run(program, input=text, capture_output=True, text=True, env=environment(), timeout=60)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.splitlines(), ended.stderr.splitlines()

    plain, _ = said("It was\n")
    answers, errors = said(f"{LONG * 4}\nIt was\n")
    (refused,) = [line for line in errors if "window" in line]
    assert f"the window is {WINDOW}" in refused
    assert int(refused.split(" tokens;")[0].split()[-1]) >= WINDOW
    assert answers == ["", *plain]
