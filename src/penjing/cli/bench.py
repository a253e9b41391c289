"""`penjing bench`: how fast a model is on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ._common import WEIGHT_CACHE

if TYPE_CHECKING:
    from ..engine.bench import Benchmark


def bench(
    model: str = typer.Argument(..., metavar="MODEL", help="The folder of a model, compressed or not, or a .gguf."),
    threads: int | None = typer.Option(None, min=1, help="Threads; all cores by default."),
    runs: int = typer.Option(5, min=1, help="Runs of each measurement; the median counts."),
    decode_tokens: int = typer.Option(64, min=2, help="Tokens that each stream writes."),
    contexts: str | None = typer.Option(
        None, metavar="N,…", help="Decode one stream after prompts of these lengths as well, e.g. 100,4000."
    ),
    kv_cache_dtype: str = typer.Option("auto", help="float32, float16, bfloat16, int8 or int4; auto is float16."),
    memory_budget: str | None = typer.Option(None, metavar="SIZE", help="For weights, caches and all, e.g. 4GiB."),
    weight_cache: bool = WEIGHT_CACHE,
    json_output: bool = typer.Option(False, "--json", help="One JSON object."),
) -> None:
    """Prefill and decode speed through the engine, and the share of the memory's bandwidth that decoding reaches.

    Example: penjing bench examples/novelist --threads 2
    """
    import json

    from ..engine.bench import bench as measure
    from ._common import parse_size, progress_bar, say_notes

    say_notes(model)
    with progress_bar("measuring") as progress:
        result = measure(
            model,
            threads=threads,
            runs=runs,
            decode_tokens=decode_tokens,
            contexts=_lengths(contexts),
            kv_cache_dtype=kv_cache_dtype,
            memory_budget=parse_size(memory_budget, "--memory-budget") if memory_budget is not None else None,
            weight_cache=weight_cache,
            progress=progress,
        )
    if json_output:
        print(json.dumps(result.to_dict()))
    else:
        _print_table(result)


def _lengths(written: str | None) -> list[int]:
    from ..errors import BadInput

    try:
        return [int(each) for each in written.split(",")] if written else []
    except ValueError:
        raise BadInput(f"--contexts={written!r}: give numbers of tokens, e.g. 100,4000") from None


def _print_table(result: Benchmark) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "tokens/s", "least – most")
    rows = {f"prefill, {result.prefill_tokens} tokens": result.prefill}
    rows |= {f"decode, {streams} stream{'s' * (streams > 1)}": each for streams, each in result.decode.items()}
    rows |= {f"decode after {length:,} tokens": each for length, each in result.decode_at_context.items()}
    for name, each in rows.items():
        table.add_row(name, f"{each.median:.1f}", f"{each.low:.1f} – {each.high:.1f}")
    console = Console()
    console.print(table)
    mib = 1 << 20
    source = " from the weight cache" if result.from_cache else ""
    console.print(
        f"Medians of {result.runs} runs with {result.threads} threads. Weights {result.weights_bytes / mib:,.1f} MiB, "
        f"loaded in {result.load_seconds:.2f} s{source}; peak memory {result.peak_rss_bytes / mib:,.0f} MiB.\n"
        f"Decoding one stream reads {result.bandwidth_fraction:.0%} of the {result.bandwidth_gbps:g} GB/s "
        "that memory gives.",
        soft_wrap=True,
    )
