"""`penjing serve`: the OpenAI-compatible service."""

from __future__ import annotations

from typing import Annotated

import typer

from ._common import WEIGHT_CACHE


def serve(
    model: str = typer.Argument(..., metavar="MODEL", help="The folder of a model, compressed or not, or a .gguf."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 for all of them."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0 for a free one."),
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="PENJING_API_KEY", help="Key that clients must send; may be given several times."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call the model; may be given several times. The folder's name by default."),
    ] = None,
    max_model_len: int | None = typer.Option(None, min=1, help="Tokens of prompt and answer; what fits by default."),
    max_num_seqs: int = typer.Option(64, min=1, help="Sequences that compute at once."),
    max_num_batched_tokens: int = typer.Option(512, min=1, help="Tokens that are computed in one step."),
    max_num_queued_reqs: int = typer.Option(256, min=0, help="Sequences that may wait before 429; 0 for any number."),
    kv_cache_dtype: str = typer.Option("auto", help="float32, float16, bfloat16, int8 or int4; auto is float16."),
    enable_prefix_caching: bool | None = typer.Option(
        None, "--enable-prefix-caching/--no-enable-prefix-caching", help="Share what prompts begin with; on by default."
    ),
    scheduling_policy: str = typer.Option(
        "fcfs", help="fcfs, or priority: a request's priority counts, lower is earlier."
    ),
    speculative: str | None = typer.Option(
        None,
        "--speculative",
        "--draft",
        metavar="prompt|MODEL",
        help="Guess ahead from the prompt, or by a smaller copy of the model; same text.",
    ),
    num_speculative_tokens: int = typer.Option(5, min=1, help="Tokens that are guessed at once, at most."),
    memory_budget: str | None = typer.Option(
        None, metavar="SIZE", help="For weights, caches and all, e.g. 4GiB; nine tenths of what there is by default."
    ),
    threads: int | None = typer.Option(None, min=1, help="Threads; all cores by default."),
    weight_cache: bool = WEIGHT_CACHE,
    shutdown_timeout: float = typer.Option(30.0, min=0, help="Seconds that requests have to finish after SIGTERM."),
    chat_template: str | None = typer.Option(None, metavar="FILE", help="Jinja template instead of the model's own."),
) -> None:
    """Serve a model over OpenAI's interface, with streaming, until SIGTERM or Ctrl-C.

    Example: penjing serve examples/novelist --port 8000
    """
    import logging

    from ..errors import BadInput
    from ..serve.server import serve as run
    from ._common import parse_size, say_notes

    if scheduling_policy not in ("fcfs", "priority"):
        raise BadInput(f"--scheduling-policy={scheduling_policy!r}: give fcfs or priority")
    logging.basicConfig(level=logging.WARNING, format="penjing: %(message)s")
    logging.getLogger("penjing").setLevel(logging.INFO)
    say_notes(model)
    run(
        model,
        host=host,
        port=port,
        api_keys=api_key or (),
        served_model_names=served_model_name or (),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_queued_reqs=max_num_queued_reqs,
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=enable_prefix_caching,
        scheduling_policy="priority" if scheduling_policy == "priority" else "fcfs",
        speculative=speculative,
        num_speculative_tokens=num_speculative_tokens,
        memory_budget=parse_size(memory_budget, "--memory-budget") if memory_budget is not None else None,
        threads=threads,
        weight_cache=weight_cache,
        shutdown_timeout=shutdown_timeout,
        chat_template=chat_template,
    )
