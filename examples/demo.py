"""The tour: compress a really trained model twice, measure what was lost, draw it, serve it, talk to it.

    python examples/demo.py            (or: make demo)

Everything goes through the program `penjing`, as a user would type it; each command is printed before it runs.
The results go to `out/demo` below the current folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

NOVELIST = Path(os.path.relpath(Path(__file__).parent / "novelist"))  # short enough to be read in a command
VARIANTS = {
    "int4": ["--bits", "4", "--group-size", "64"],
    "int4 + 50 % sparse": [
        *("--bits", "4", "--group-size", "64"),
        *("--prune-method", "l1", "--sparsity", "0.5", "--sparse-storage", "bitmask"),
    ],
}
TOKENS = 8192  # of the evaluation text: enough for a narrow interval, few enough for a minute
PROMPT = "It was a dark night, and the old man"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the results")
    output = parser.parse_args().output
    for library in ("matplotlib", "openai"):
        need(library)
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    original = penjing_json("inspect", NOVELIST)
    results = {name: shape_and_measure(name, flags, output) for name, flags in VARIANTS.items()}
    print_table(original, results)
    draw(original, results, output / "demo.png")
    with served(output / folder_of("int4")) as url:
        stream(url)
    print(f"\nDone in {time.monotonic() - start:.0f} s. Models and picture are in {output}.")


def shape_and_measure(name: str, flags: list[str], output: Path) -> dict[str, Any]:
    """Compress one variant and evaluate it against the original: the JSON of both commands together."""
    folder = output / folder_of(name)
    shutil.rmtree(folder, ignore_errors=True)
    compressed = penjing_json("compress", NOVELIST, "-o", folder, *flags)
    against = ["--data", NOVELIST / "evaluation.txt", "--against", NOVELIST, "--max-tokens", str(TOKENS)]
    return compressed | penjing_json("evaluate", folder, *against)


def folder_of(name: str) -> str:
    return name.replace(" + 50 % ", "-")


def penjing_json(*arguments: str | Path) -> dict[str, Any]:
    """Run one command of penjing and read its JSON."""
    words = [str(word) for word in arguments]
    print("$ penjing " + shlex.join(words), flush=True)
    answer = subprocess.run([*program(), *words, "--json"], capture_output=True, text=True)
    if answer.returncode:
        fail(f"penjing {words[0]} ended with {answer.returncode}: {last_line(answer.stderr)}")
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def program() -> list[str]:
    return [sys.executable, "-m", "penjing"]


def print_table(original: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table("", "MB", "bpw", "loss", "ΔL ± 95 %", "KL", "top-1", box=SIMPLE)
    first = next(iter(results.values()))
    table.add_row(
        "Novelist, bf16",
        f"{original['size_bytes'] / 1e6:.1f}",
        f"{original['bits_per_weight']:.2f}",
        f"{first['base_loss']:.3f}",
    )
    for name, result in results.items():
        low, high = result["loss_change_ci95"]
        table.add_row(
            name,
            f"{result['size_bytes'] / 1e6:.1f}",
            f"{result['bits_per_weight']:.2f}",
            f"{result['loss']:.3f}",
            f"{result['loss_change']:+.3f} ± {(high - low) / 2:.3f}",
            f"{result['kl']:.3f}",
            f"{result['top1_agreement']:.1%}",
        )
    print()
    Console().print(table)
    print(f"Measured on {first['tokens']:,} tokens of a novel that neither training nor compression saw.\n")


def draw(original: dict[str, Any], results: dict[str, dict[str, Any]], file: Path) -> None:
    from penjing.report.pictures import Variant, size_and_loss

    variants = [Variant("Novelist, bf16", original["size_bytes"])]
    for name, result in results.items():
        interval = tuple(result["loss_change_ci95"])
        variants.append(Variant(name, result["size_bytes"], result["loss_change"], interval))
    size_and_loss(variants, file)
    print(f"Picture: {file}\n")


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """A running `penjing serve`; it is asked to stop at the end, and must do so cleanly."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    print(f"$ penjing serve {model} --port {port}", flush=True)
    log = model.parent / "serve.log"
    with log.open("w") as sink:
        server = subprocess.Popen([*program(), "serve", str(model), "--port", str(port)], stdout=sink, stderr=sink)
    try:
        wait_until_healthy(url, server, log)
        yield url
        server.send_signal(signal.SIGTERM)
        if server.wait(timeout=20):
            fail(f"the server ended with {server.returncode}: {last_line(log.read_text())}")
        print("The server stopped cleanly.")
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None:
            fail(f"the server ended with {server.returncode}: {last_line(log.read_text())}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{url}/health"):
            return
        time.sleep(0.1)
    fail(f"the server was not healthy after {seconds:.0f} s: see {log}")


def stream(url: str) -> None:
    """A streamed completion through the official client of OpenAI."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    print(f"\n{PROMPT}", end="", flush=True)
    words = client.completions.create(model=model, prompt=PROMPT, max_tokens=60, temperature=0.7, seed=7, stream=True)
    for event in words:
        print(event.choices[0].text, end="", flush=True)
    print("\n")


def need(library: str) -> None:
    try:
        __import__(library)
    except ImportError:
        fail(f"{library} is missing: pip install {library}")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def fail(message: str) -> NoReturn:
    print(f"demo: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
