"""`penjing chat`: talk to a model in the terminal, or through a pipe."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from ._common import WEIGHT_CACHE

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..serve.prompts import Prompts

HELP = "/reset forgets the conversation, /exit ends it, Ctrl-C interrupts an answer."


def chat(
    model: str = typer.Argument(..., metavar="MODEL", help="The folder of a model, compressed or not, or a .gguf."),
    system: str | None = typer.Option(None, help="What the model is told before the conversation."),
    temperature: float = typer.Option(0.7, min=0, max=2, help="0 for the likeliest answer."),
    top_p: float = typer.Option(0.95, min=0, max=1),
    max_tokens: int = typer.Option(256, min=1, help="Longest answer."),
    seed: int | None = typer.Option(None, help="For answers that can be repeated."),
    kv_cache_dtype: str = typer.Option("auto", help="float32, float16, bfloat16, int8 or int4; auto is float16."),
    memory_budget: str | None = typer.Option(None, metavar="SIZE", help="For weights and cache, e.g. 4GiB."),
    speculative: str | None = typer.Option(
        None,
        "--speculative",
        "--draft",
        metavar="prompt|MODEL",
        help="Guess ahead from the prompt, or by a smaller copy of the model; same text.",
    ),
    num_speculative_tokens: int = typer.Option(5, min=1, help="Tokens that are guessed at once, at most."),
    threads: int | None = typer.Option(None, min=1, help="Threads; all cores by default."),
    weight_cache: bool = WEIGHT_CACHE,
    chat_template: str | None = typer.Option(None, metavar="FILE", help="Jinja template instead of the model's own."),
    json_output: bool = typer.Option(False, "--json", help="One JSON object: the conversation, when it is over."),
) -> None:
    """Talk to a model; one line is one message. A base model continues what was said so far.

    Example: echo "It was a dark night" | penjing chat examples/novelist --temperature 0
    """
    import json
    from pathlib import Path

    from ..engine.messages import Load, SamplingParams
    from ..engine.process import load
    from ..models.tokenizer import Tokenizer
    from ..serve.prompts import Prompts
    from ._common import parse_size, say_notes

    settings = Load(
        folder=model,
        max_num_seqs=1,
        memory_budget=parse_size(memory_budget, "--memory-budget") if memory_budget is not None else None,
        kv_cache_dtype=kv_cache_dtype,
        speculative=speculative,
        num_speculative_tokens=num_speculative_tokens,
        threads=threads,
        weight_cache=weight_cache,
    )
    say_notes(model)
    engine, _ = load(settings)
    bos = engine.model.config.bos_token_id
    prompts = Prompts(Tokenizer(model), bos, Path(chat_template) if chat_template else None)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=secrets.randbits(63) if seed is None else seed,
    )
    conversation = Conversation(engine, prompts, params, system)
    _say("penjing: " + ("chat with" if prompts.has_template else "no chat template, so plain continuation by"), model)
    if sys.stdin.isatty():
        _say(HELP)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
            _say("forgotten")
        elif line:
            _answer(conversation, line, quiet=json_output)
    if json_output:
        print(json.dumps({"model": model, "messages": conversation.messages}, ensure_ascii=False))


class Conversation:
    """What was said so far, and the model that goes on."""

    def __init__(self, engine: Engine, prompts: Prompts, params: Any, system: str | None) -> None:
        self._engine, self._prompts, self._params = engine, prompts, params
        self._system = system
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def ask(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. What was shown of it is remembered, also when it is interrupted."""
        import msgspec

        from ..engine.messages import Request
        from ..errors import PenjingError
        from ..serve.text import Choice

        self.messages.append({"role": "user", "content": text})
        prompt, left = self._prompt()
        params = msgspec.structs.replace(self._params, max_tokens=left, choice=len(self.messages))
        choice = Choice(0, self._prompts.tokenizer, prompt)
        answer = ""
        try:
            for event in self._engine.run(Request("chat", prompt, params)):
                if event.error:
                    raise PenjingError(event.error)
                piece = choice.take(event).text
                answer += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": answer})

    def _prompt(self) -> tuple[list[int], int]:
        """Tokens of the conversation and how many may follow; the oldest messages are dropped when it is too long."""
        from ..errors import BadInput

        window = self._engine.limits.max_model_len
        while True:
            prompt = self._tokens()
            if len(prompt) < window:
                return prompt, min(self._params.max_tokens, window - len(prompt))
            oldest = 1 if self.messages[0]["role"] == "system" else 0
            if len(self.messages) - oldest < 2:
                self.messages.pop()
                raise BadInput(f"the message is {len(prompt)} tokens; the window is {window}")
            del self.messages[oldest]

    def _tokens(self) -> list[int]:
        if self._prompts.has_template:
            return self._prompts.chat(self.messages)
        return self._prompts.text("".join(message["content"] for message in self.messages))


def _answer(conversation: Conversation, line: str, *, quiet: bool) -> None:
    from ..errors import BadInput

    try:
        for piece in conversation.ask(line):
            if not quiet:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        _say(" (interrupted)")
    except BadInput as error:
        _say(f"penjing: {error}")
    if not quiet:
        print(flush=True)


def _lines() -> Iterator[str]:
    """Lines that the user types, or that come through the pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            _say("")
            return


def _say(*words: str) -> None:
    print(*words, file=sys.stderr, flush=True)
