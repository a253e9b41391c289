"""`penjing evaluate`: loss on held-out text, and the change against the original."""

from __future__ import annotations

import typer


def evaluate(
    model: str = typer.Argument(..., metavar="MODEL", help="The folder of a model, compressed or not, or a .gguf."),
    data: str = typer.Option(..., help="Held-out text: a .txt file, or .jsonl with a text in 'text' of each line."),
    against: str | None = typer.Option(None, metavar="BASE", help="The model that MODEL was made from."),
    context_length: int | None = typer.Option(None, help="Tokens in a window; 512, or what the model can take."),
    stride: int | None = typer.Option(None, help="Tokens from one window to the next; the context length by default."),
    max_tokens: int | None = typer.Option(None, help="Use only so many tokens from the beginning of the data."),
    threads: int | None = typer.Option(None, help="Threads; all cores by default."),
    json_output: bool = typer.Option(False, "--json", help="One JSON object."),
) -> None:
    """Loss, perplexity, KL and top-1 agreement on held-out text, with 95 % intervals.

    Example: penjing evaluate out --data evaluation.txt --against examples/novelist
    """
    import json

    from ..evaluate import evaluate as measure
    from ._common import progress_bar, say_notes

    say_notes(model)
    with progress_bar("evaluating") as progress:
        result = measure(
            model,
            data,
            against,
            context_length=context_length,
            stride=stride,
            max_tokens=max_tokens,
            threads=threads,
            progress=progress,
        )
    print(json.dumps(result.to_dict()) if json_output else result)
