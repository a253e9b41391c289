"""The program `penjing`: one file a command, each importing what it needs only when it runs.

Every command has ``--json`` (one object on standard output; progress and logs on standard error) and ends with
0 done, 1 failed on the way, 2 bad usage or bad input: one line, and a traceback only with ``--debug``.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn, cast

import typer

from ..errors import PenjingError

# The commands, in the order of the road; each is the function of that name in the module of that name.
COMMANDS = ("inspect", "compress", "evaluate", "serve", "chat", "bench", "export", "doctor")

# Click's base error; typer carries click inside itself since 0.20 or so, so it is found by name.
ClickException = cast(
    type[typer.BadParameter], next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
)

app = typer.Typer(
    name="penjing",
    help="Compress a large model, prove what was lost, and serve it on the machine you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"penjing {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", is_eager=True, callback=_print_version
    ),
) -> None:
    pass


for _name in COMMANDS:
    app.command(_name)(getattr(importlib.import_module(f".{_name}", __name__), _name))


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the program and exit with its status; ``argv`` defaults to the process's own arguments."""
    # Before numpy is loaded: its BLAS's threads else spin for 20 ms after each product, and take a core from our own
    # kernels' between them: GPTQ takes 0.87 of the time so, on two cores.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "12")
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        status = app(arguments, prog_name="penjing", standalone_mode=False)
    except (PenjingError, ClickException) as error:
        if debug:
            raise
        message = str(error) if isinstance(error, PenjingError) else error.format_message()
        _stop(message, error.exit_code)
    except OSError as error:  # a full disk, a port in use, no permission
        if debug:
            raise
        _stop(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except (KeyboardInterrupt, typer.Abort):
        _stop("interrupted", 1)
    if status == 130:  # typer's own way to say Ctrl-C
        _stop("interrupted", 1)
    sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str, status: int) -> NoReturn:
    if message:  # `penjing` alone has printed its help and has nothing to add
        print(f"penjing: {message}", file=sys.stderr)
    sys.exit(status)
