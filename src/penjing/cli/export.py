"""`penjing export`: the same model in a format that other programs read."""

from __future__ import annotations

from pathlib import Path

import typer


def export(
    model: str = typer.Argument(..., metavar="MODEL", help="The folder of a model, compressed or not, or a .gguf."),
    output: Path = typer.Option(
        ..., "-o", "--output", metavar="OUT", help="Folder for the result, empty or new; a new file for gguf."
    ),
    format: str = typer.Option("compressed-tensors", help="compressed-tensors: for vLLM and transformers; gguf."),
    type: str = typer.Option("auto", help="Of gguf: auto (as stored), f16, bf16, f32, q8_0, q5_0, q4_0, q4_1, q4_k …"),
    json_output: bool = typer.Option(False, "--json", help="One JSON object."),
) -> None:
    """Write a model in another format; compressed-tensors turns bitmask storage into the form that everything reads.

    gguf is a file that llama.cpp runs.

    Example: penjing export out -o out.gguf --format gguf
    """
    import dataclasses
    import json

    from ..export import export as run

    result = run(model, output, format, type)
    print(json.dumps(dataclasses.asdict(result)) if json_output else result)
