"""What a driver and `benchmarks/engines.py` say to each other: a JSON object a line, on standard input and output.

    {"do": "load", "model": PATH, "threads": 2, …}      → {"seconds": …, "version": …, "weights": …, "activations": …,
                                                           "cache": …, "head": …}
    {"do": "prefill", "tokens": 512, "seed": 0}         → {"seconds": …}                 from request to first token
    {"do": "decode", "streams": 8, "tokens": 32, "context": 100, "seed": 0}
                                                        → {"seconds": …, "tokens": 256}  after every stream's first
    {"do": "quit"}

An answer with "error" ends nothing: the driver waits for the next line. Needs the standard library alone, since each
driver runs in its peer's own environment.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any

VOCABULARY = 32000


def prompt(length: int, seed: int, stream: int = 0) -> list[int]:
    """The same tokens for every engine; another seed or stream shares no beginning with them."""
    draw = random.Random(seed * 1000 + stream)
    return [draw.randrange(3, VOCABULARY) for _ in range(length)]


def serve(commands: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer commands until "quit" or the end of input.

    What a library prints goes to standard error: only answers are on standard output.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        if name == "quit":
            return
        try:
            answer = commands[name](**request)
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[-1]}"}
        answers.write(json.dumps(answer) + "\n")
