"""`penjing inspect`: what a model folder holds, from config.json and tensor headers alone."""

from __future__ import annotations

import typer


def inspect(
    model: str = typer.Argument(..., metavar="MODEL", help="The folder of a model, compressed or not, or a .gguf."),
    json_output: bool = typer.Option(False, "--json", help="One JSON object."),
) -> None:
    """Family, parameters, sizes by role, how it is compressed. Reads config.json and headers, no weights.

    Example: penjing inspect examples/novelist
    """
    import dataclasses
    import json

    from ..checkpoint.describe import describe
    from ._common import say_notes

    say_notes(model)
    summary = describe(model)
    print(json.dumps(dataclasses.asdict(summary)) if json_output else summary)
