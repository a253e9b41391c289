"""The requests of OpenAI's interface, as they are accepted: types, ranges, and what is refused by name.

Fields that are not named here are ignored, as OpenAI's clients expect; fields that are named because they would change
the answer and cannot be obeyed are refused. ``null`` is "not given" everywhere.
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from ..engine.messages import (
    Alternatives,
    Bias,
    Count,
    Fraction,
    Penalty,
    Priority,
    RepetitionPenalty,
    SamplingParams,
    Seed,
    Temperature,
    TokenId,
    TopK,
)
from .errors import bad_request, unsupported

Stop: TypeAlias = str | Annotated[list[str], Meta(max_length=4)]
Choices: TypeAlias = Annotated[int, Meta(ge=1, le=128)]
MAX_SEQUENCES = 1024  # prompts × n of one request


class StreamOptions(Struct):
    include_usage: bool = False


class ResponseFormat(Struct):
    type: str


class SamplingRequest(Struct, kw_only=True):
    """What chat and completions have in common; the last group are extensions that vLLM has as well."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Bias] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    n: Choices | None = None
    response_format: ResponseFormat | None = None

    top_k: TopK | None = None
    min_p: Fraction | None = None
    repetition_penalty: RepetitionPenalty | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    priority: Priority | None = None
    cache_salt: str | None = None
    stop_token_ids: list[TokenId] | None = None
    add_special_tokens: bool | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    best_of: Choices | None = None
    use_beam_search: bool | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None

    def check(self) -> None:
        """Raise for what the types cannot say."""
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"):
            if getattr(self, name) is not None:
                raise unsupported(name, "structured output is not supported by this server")
        if self.response_format and self.response_format.type != "text":
            raise unsupported("response_format", "only {'type': 'text'} is supported by this server")
        if self.use_beam_search:
            raise unsupported("use_beam_search", "beam search is not supported by this server")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "only best_of equal to n is supported by this server")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only allowed when stream is true", "stream_options")
        if "" in self.stops:
            raise bad_request("stop: an empty string would end every text", "stop")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def params(
        self, max_tokens: int, *, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> list[SamplingParams]:
        """One for each of the n choices; they differ in what they draw."""
        given = {
            name: value
            for name in SamplingParams.__struct_fields__
            if (value := getattr(self, name, None)) is not None and name not in ("max_tokens", "seed", "logprobs")
        }
        if self.stop_token_ids is not None:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        seed = secrets.randbits(63) if self.seed is None else self.seed
        common: dict[str, Any] = {
            "max_tokens": max_tokens,
            "seed": seed,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        }
        return [SamplingParams(**given, **common, choice=index) for index in range(self.n or 1)]


class CompletionRequest(SamplingRequest, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Alternatives | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise unsupported("suffix", "inserting text before a suffix is not supported by this server")
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens=0 leaves nothing to answer; it goes with echo only", "max_tokens")
        if (sequences := len(self.prompts) * (self.n or 1)) > MAX_SEQUENCES:
            message = f"prompts × n are {sequences} sequences; {MAX_SEQUENCES} fit into a request: send several"
            raise bad_request(message, "prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """A text or token ids each."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise bad_request("prompt: an empty list has nothing to complete", "prompt")
        if all(isinstance(each, int) for each in self.prompt):
            return [[each for each in self.prompt if isinstance(each, int)]]
        if any(not isinstance(each, type(self.prompt[0])) or isinstance(each, int) for each in self.prompt):
            raise bad_request("prompt: give a text, texts, token ids or lists of token ids, not a mixture", "prompt")
        return [each for each in self.prompt if not isinstance(each, int)]


class ContentPart(Struct):
    type: str
    text: str | None = None


class Message(Struct, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """For a chat template: the content as one text, the role "developer" by its older name."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        values["role"] = "system" if self.role == "developer" else self.role
        values["content"] = self.text()
        return values

    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise unsupported("messages", f"a content part of type {part.type!r}; this server reads text only")
        return "".join(part.text or "" for part in self.content)


class ChatRequest(SamplingRequest, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True

    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None

    def check(self) -> None:
        super().check()
        if self.tools:
            raise unsupported("tools", "tool calls are not supported by this server")
        if self.functions:
            raise unsupported("functions", "function calls are not supported by this server")
        if self.tool_choice not in (None, "none", "auto"):
            raise unsupported("tool_choice", "tool calls are not supported by this server")
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.limit == 0:
            raise bad_request("max_completion_tokens=0 leaves nothing to answer", "max_completion_tokens")

    @property
    def limit(self) -> int | None:
        """The newer name goes before the older one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Struct, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


AnyRequest = TypeVar("AnyRequest", CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)


def parse(body: bytes, kind: type[AnyRequest]) -> tuple[AnyRequest, set[str]]:
    """A request, and the names of fields that are ignored; raises APIError 400 that names the wrong field."""
    try:
        request = msgspec.json.decode(body, type=kind)
        names = set(msgspec.json.decode(body, type=dict[str, msgspec.Raw]))
    except msgspec.ValidationError as error:
        message = str(error)
        field = re.search(r"\$\.(\w+)", message) or re.search(r"required field `(\w+)`", message)
        raise bad_request(message.replace("$.", ""), field.group(1) if field else None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}") from None
    return request, names - set(kind.__struct_fields__)
