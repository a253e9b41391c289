"""The official client against a real server: answers, streams, errors."""

from __future__ import annotations

import asyncio
import json
import math

import numpy as np
import openai
import pytest

from conftest import LONG, NOVELIST, Server
from penjing import models
from penjing.models.tokenizer import Tokenizer
from stepping import all_logits

PROMPT = "It was a dark night, and the old man"
GREEDY = {"model": "novelist", "temperature": 0}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(NOVELIST)


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.load(NOVELIST)


def continued(model: models.Model, prompt: list[int], count: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy, one forward over the whole text for each token: slow and plain."""
    tokens, rows = list(prompt), []
    for _ in range(count):
        row = all_logits(model, tokens)[-1]
        rows.append(row)
        tokens.append(int(row.argmax()))
    return tokens[len(prompt) :], rows


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by, model.max_model_len) == ("novelist", "model", "penjing", 1024)
    assert client.models.retrieve("novelist") == model


def test_completion_is_the_models_own_greedy_text(client, tokenizer, model) -> None:
    answer = client.completions.create(prompt=PROMPT, max_tokens=24, **GREEDY)
    prompt = tokenizer.encode(PROMPT)
    tokens, _ = continued(model, prompt, 24)
    choice = answer.choices[0]
    assert choice.text == tokenizer.decode(prompt + tokens)[len(PROMPT) :]
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), 24, len(prompt) + 24)
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")


def test_stream_and_answer_are_the_same_text(client) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 40, **GREEDY}
    whole = client.completions.create(**asked).choices[0]
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40


def test_chat_without_a_template_reads_the_contents(client) -> None:
    messages = [
        {"role": "system", "content": "It was a dark night,"},
        {"role": "user", "content": [{"type": "text", "text": "and the "}, {"type": "text", "text": "old man"}]},
    ]
    answer = client.chat.completions.create(messages=messages, max_tokens=12, **GREEDY)
    plain = client.completions.create(prompt="It was a dark night,\n\nand the old man", max_tokens=12, **GREEDY)
    assert answer.choices[0].message.content == plain.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens


def test_chat_stream_begins_with_the_role_and_ends_with_the_reason_alone(client) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    asked = {"messages": messages, "max_completion_tokens": 20, "max_tokens": 3, **GREEDY}
    whole = client.chat.completions.create(**asked)
    first, *middle, last = client.chat.completions.create(**asked, stream=True)
    assert first.choices[0].delta.model_dump(exclude_unset=True) == {"role": "assistant", "content": ""}
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == whole.choices[0].message.content
    assert last.choices[0].delta.model_dump(exclude_unset=True) == {}
    assert last.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 20  # the newer name wins
    assert {chunk.object for chunk in (first, *middle, last)} == {"chat.completion.chunk"}


def test_prompts_of_every_shape(client, tokenizer) -> None:
    other = "She looked"
    ids = [tokenizer.encode(PROMPT), tokenizer.encode(other)]
    text = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    second = client.completions.create(prompt=other, **GREEDY).choices[0].text
    for prompt, expected in [
        ([PROMPT], [text]),
        (ids[0], [text]),
        ([PROMPT, other], [text, second]),
        (ids, [text, second]),
    ]:
        answer = client.completions.create(prompt=prompt, **GREEDY)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        assert answer.usage.completion_tokens == 16 * len(expected)  # OpenAI's default


def test_n_choices_differ_and_are_repeatable(client) -> None:
    asked = {"model": "novelist", "prompt": [PROMPT, "She"], "n": 3, "seed": 7, "max_tokens": 8}
    first, again = client.completions.create(**asked), client.completions.create(**asked)
    texts = [choice.text for choice in first.choices]
    assert len(texts) == 6
    assert len(set(texts)) == 6
    assert texts == [choice.text for choice in again.choices]
    assert first.system_fingerprint == again.system_fingerprint
    streamed = ["" for _ in texts]
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_the_same_seed_alone_and_in_company(server: Server) -> None:
    asked = {"model": "novelist", "max_tokens": 24, "temperature": 0.8, "top_p": 0.9}

    async def main() -> list[str]:
        async with server.async_client() as client:
            requests = [client.completions.create(prompt=PROMPT, seed=seed, **asked) for seed in range(12)]
            return [answer.choices[0].text for answer in await asyncio.gather(*requests)]

    together = asyncio.run(main())
    with server.client() as client:
        alone = [client.completions.create(prompt=PROMPT, seed=seed, **asked).choices[0].text for seed in range(12)]
    assert together == alone
    assert len(set(together)) > 1


def test_many_at_once_are_as_each_alone(server: Server, tokenizer) -> None:
    """More requests than places, of different lengths, streamed and not, greedy."""
    words = LONG.split()
    prompts = [" ".join(words[: 1 + 17 * index % 90]) for index in range(24)]

    async def one(client: openai.AsyncOpenAI, index: int, prompt: str) -> str:
        asked = {"prompt": prompt, "max_tokens": 4 + index, **GREEDY}
        if index % 2:
            return (await client.completions.create(**asked)).choices[0].text
        stream = await client.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, *pair) for pair in enumerate(prompts)))

    together = asyncio.run(main())
    with server.client() as client:
        for index, prompt in enumerate(prompts):
            alone = client.completions.create(prompt=prompt, max_tokens=4 + index, **GREEDY)
            assert together[index] == alone.choices[0].text, prompt
    server.wait_idle()
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_stop_strings_are_not_in_the_text(client) -> None:
    free = client.completions.create(prompt=PROMPT, max_tokens=40, **GREEDY).choices[0].text
    stop = free[10:17]
    for stops in (stop, [stop], ["never there", stop, "nor this"]):
        asked = {"prompt": PROMPT, "max_tokens": 40, "stop": stops, **GREEDY}
        answer = client.completions.create(**asked)
        assert answer.choices[0].text == free[: free.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 40
        streamed = list(client.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text
        assert streamed[-1].choices[0].finish_reason == "stop"
    shown = client.completions.create(
        prompt=PROMPT, max_tokens=40, stop=stop, extra_body={"include_stop_str_in_output": True}, **GREEDY
    )
    assert shown.choices[0].text == free[: free.index(stop) + len(stop)]


def test_end_token_ends_the_text_unless_ignored(client) -> None:
    end = 1
    asked = {"prompt": PROMPT, "max_tokens": 6, "logit_bias": {end: 100}, **GREEDY}
    answer = client.completions.create(**asked)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 1
    ignored = client.completions.create(**asked, extra_body={"ignore_eos": True})
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 6)
    at_least = client.completions.create(**asked, extra_body={"min_tokens": 3})
    assert (at_least.choices[0].finish_reason, at_least.usage.completion_tokens) == ("stop", 4)


def test_stop_token_ids(client, tokenizer) -> None:
    free = client.completions.create(prompt=PROMPT, max_tokens=20, logprobs=0, **GREEDY).choices[0]
    fifth = tokenizer.encode(free.text, add_special_tokens=False)[4]
    stopped = client.completions.create(
        prompt=PROMPT, max_tokens=20, extra_body={"stop_token_ids": [fifth], "ignore_eos": True}, **GREEDY
    )
    assert free.text.startswith(stopped.choices[0].text)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens <= 5


def test_top_k_one_is_greedy(client) -> None:
    greedy = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        drawn = client.completions.create(model="novelist", prompt=PROMPT, temperature=1.5, extra_body=extra)
        assert drawn.choices[0].text == greedy
    assert client.completions.create(model="novelist", prompt=PROMPT, top_p=0).choices[0].text == greedy


def test_completion_logprobs_are_the_models_log_softmax(client, tokenizer, model) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 6, "logprobs": 3, **GREEDY}
    found = client.completions.create(**asked).choices[0].logprobs
    tokens, rows = continued(model, tokenizer.encode(PROMPT), 6)
    for place, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        exact = row.astype(np.float64) - np.logaddexp.reduce(row.astype(np.float64))
        assert found.token_logprobs[place] == pytest.approx(exact[token], abs=1e-3)
        best = sorted(exact, reverse=True)[:3]
        assert sorted(found.top_logprobs[place].values(), reverse=True) == pytest.approx(best, abs=1e-3)
    assert found.text_offset[0] == 0
    assert "".join(found.tokens)[found.text_offset[3] :].startswith(found.tokens[3])
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    assert [token for chunk in chunks for token in chunk.tokens] == found.tokens


def test_echo_scores_the_prompt(client, tokenizer, model) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1, **GREEDY}
    choice = client.completions.create(**asked).choices[0]
    assert choice.text == PROMPT
    assert "".join(choice.logprobs.tokens) == PROMPT
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    prompt = tokenizer.encode(PROMPT)
    rows = all_logits(model, prompt)
    for row, token, found in zip(rows[:-1], prompt[1:], choice.logprobs.token_logprobs[1:], strict=True):
        exact = row[token] - np.logaddexp.reduce(row.astype(np.float64))
        assert found == pytest.approx(exact, abs=1e-3)
    asked |= {"max_tokens": 5, "n": 2}
    first, second = client.completions.create(**asked).choices
    assert first.text == second.text
    assert first.text.startswith(PROMPT)
    assert len(first.logprobs.tokens) == len(prompt) + 5 == len(second.logprobs.tokens)
    assert first.logprobs.text_offset[len(prompt)] == len(PROMPT)
    streamed = list(client.completions.create(**asked, stream=True))
    texts = ["".join(chunk.choices[0].text for chunk in streamed if chunk.choices[0].index == i) for i in (0, 1)]
    assert texts == [first.text, second.text]


def test_a_long_prompt_is_scored_across_its_chunks(client, tokenizer, model) -> None:
    prompt = tokenizer.encode(LONG)[:300]
    choice = client.completions.create(prompt=prompt, max_tokens=1, echo=True, logprobs=0, **GREEDY).choices[0]
    rows = all_logits(model, prompt)
    exact = rows[:-1].astype(np.float64)
    exact = exact[np.arange(299), prompt[1:]] - np.logaddexp.reduce(exact, axis=1)
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:300], exact, atol=2e-3)


def test_chat_logprobs(client) -> None:
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "logprobs": True, **GREEDY}
    found = client.chat.completions.create(**asked, top_logprobs=4)
    content = found.choices[0].logprobs.content
    assert "".join(each.token for each in content) == found.choices[0].message.content
    for each in content:
        assert bytes(each.bytes).decode() == each.token
        values = [top.logprob for top in each.top_logprobs]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert each.logprob == pytest.approx(values[0])  # greedy
        assert sum(map(math.exp, values)) <= 1
    streamed = client.chat.completions.create(**asked, stream=True)
    tokens = [
        each.token for chunk in streamed if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content
    ]
    assert tokens == [each.token for each in content]
    plain = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [each.top_logprobs for each in plain] == [[]] * 6


def test_unknown_model_is_not_found(client) -> None:
    for ask in (
        lambda: client.models.retrieve("gpt-9"),
        lambda: client.completions.create(model="gpt-9", prompt="x"),
        lambda: client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            ask()
        assert error.value.code == "model_not_found"
        assert error.value.type == "invalid_request_error"
        assert error.value.request_id


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"suffix": "end"}, "suffix"),
        ({"extra_body": {"best_of": 3}}, "best_of"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "response_format"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x"] * 20, "n": 128}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"extra_body": {"stop_token_ids": [5000]}}, "stop_token_ids"),
    ],
)
def test_wrong_completions_name_the_field(client, change, param) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"prompt": "x", **GREEDY, **change})
    assert error.value.param == param
    assert param in error.value.message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_wrong_chats_name_the_field(client, change, param) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"messages": [{"role": "user", "content": "x"}], **GREEDY, **change})
    assert error.value.param == param


def test_fields_that_change_nothing_are_ignored(client) -> None:
    extra = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "made_up": [1]}
    answer = client.chat.completions.create(
        messages=[{"role": "developer", "content": None}, {"role": "user", "content": "x", "name": "me"}],
        response_format={"type": "text"},
        max_tokens=2,
        extra_body={**extra, "stop": None, "n": None, "tools": [], "tool_choice": "auto"},
        **GREEDY,
    )
    assert answer.usage.completion_tokens == 2


def test_too_long_for_the_window(client) -> None:
    for ask, param in (
        (lambda: client.completions.create(prompt=[5] * 1024, **GREEDY), "prompt"),
        (lambda: client.completions.create(prompt=[5] * 1000, max_tokens=25, **GREEDY), "prompt"),
        (
            lambda: client.chat.completions.create(messages=[{"role": "user", "content": LONG * 4}], **GREEDY),
            "messages",
        ),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            ask()
        assert error.value.code == "context_length_exceeded"
        assert error.value.param == param
        assert error.value.message.find("maximum context length is 1024 tokens. However, you requested") > 0
        assert error.value.body["n_ctx"] == 1024
        assert error.value.body["n_prompt_tokens"] >= 1000
    answer = client.completions.create(prompt=[5] * 1000, max_tokens=24, extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.usage.total_tokens == 1024
    answer = client.completions.create(prompt=[5] * 1020, extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.usage.completion_tokens == 4  # the default gives way


def test_tokenize_and_back(server: Server, tokenizer) -> None:
    for text in (PROMPT, "", "naïve – 東京 \N{GRINNING FACE}"):
        asked = {"model": "novelist", "prompt": text, "add_special_tokens": False, "return_token_strs": True}
        answer = server.post("/tokenize", json=asked).json()
        assert answer["tokens"] == (tokenizer.encode(text) or [0])
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == 1024
        back = server.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"]
        assert back == (text or "<s>")
    chat = server.post("/tokenize", json={"messages": [{"role": "user", "content": PROMPT}]}).json()
    assert chat["tokens"] == tokenizer.encode(PROMPT)
    assert server.post("/tokenize", json={}).status_code == 400
    assert server.post("/detokenize", json={"tokens": [9999]}).json()["error"]["param"] == "tokens"


def test_raw_stream_format(server: Server) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
    answer = server.post("/v1/completions", json=asked, headers={"x-request-id": "mine-1"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "mine-1"
    *events, end = answer.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events)
