"""The documents say what is so: links lead somewhere, commands and flags exist, the README's commands are run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer

from calibrate_models import make, text
from penjing import methods
from penjing.cli import COMMANDS, app, main
from penjing.formats.affine import Grid
from penjing.methods import apply

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
FENCE = re.compile(r"^(?P<mark><!-- run -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    kind: str
    body: str
    runs: bool


def blocks(page: Path) -> list[Block]:
    return [Block(m["kind"], m["body"], bool(m["mark"])) for m in FENCE.finditer(page.read_text())]


def commands(body: str) -> Iterator[list[str]]:
    """The words of each `penjing …` in a block, continuation lines joined, comments and shell around it dropped."""
    for line in body.replace("\\\n", " ").splitlines():
        if match := re.match(r"(?:\$ )?penjing (.*)", line):
            yield shlex.split(match[1].split("#")[0].rstrip("& "))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"", prose)
    local = [(a or b).partition("#")[0] for a, b in targets if not (a or b).startswith(("http", "#"))]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_flags_exist(page: Path) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in (words for block in blocks(page) for words in commands(block.body)):
        if words[0] in ("COMMAND", "--help", "--version"):
            continue
        assert words[0] in COMMANDS, f"penjing {words[0]} is not a command"
        options = {
            name for parameter in known[words[0]].params for name in [*parameter.opts, *parameter.secondary_opts]
        }
        unknown = {word.partition("=")[0] for word in words if word.startswith("-")} - options - {"--help", "--debug"}
        assert not unknown, f"penjing {words[0]} has no {unknown}"


def test_both_languages_show_the_same_commands() -> None:
    english, chinese = (
        [list(commands(block.body)) for block in blocks(ROOT / name)] for name in ("README.md", "README.zh-CN.md")
    )
    assert english == chinese


def test_the_programs_help_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [name for name in COMMANDS if f"penjing {name}" not in readme]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the README's commands can run: the examples, and `penjing` and `python` of this environment."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "bin").mkdir()
    for name, words in {"penjing": "-m penjing", "python": ""}.items():
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        program.chmod(0o755)
    return folder


def loosely(text: str) -> list[str]:
    """Lines without their numbers, ruling and spacing, which differ from machine to machine."""
    return [re.sub(r"[\d.,]+|[^\S\n]+|[─━╭╮╰╯│┃┏┓┗┛┡┩┳┻╇┴┬├┤┼┕┑]+", "", line) for line in text.splitlines()]


def runnable(page: Path) -> list[tuple[Block, str]]:
    """The marked blocks, each with what it should print: of Python, the block of text that follows it."""
    found = blocks(page)
    after = [block.body if block.kind == "text" else "" for block in [*found[1:], Block("", "", False)]]
    return [(block, text) for block, text in zip(found, after, strict=True) if block.runs]


def script(block: Block) -> tuple[str, str]:
    """A shell script that does what the block shows, and what the block says it prints."""
    if block.kind == "python":
        return f"python - <<'END'\n{block.body}END", ""
    pieces = [
        piece.partition("\n") for piece in re.split(r"^\$ ", block.body.replace("\\\n", ""), flags=re.MULTILINE)[1:]
    ]
    return "\n".join(command for command, _, _ in pieces), "".join(output for _, _, output in pieces)


@pytest.mark.parametrize(("block", "text"), runnable(ROOT / "README.md"), ids=lambda part: str(part)[:30])
def test_the_readme_shows_what_happens(block: Block, text: str, checkout: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands, output = script(block._replace(body=block.body.replace("8000", port)))
    ending = "trap 'kill $(jobs -p) 2>/dev/null || true; wait || true' EXIT\nset -e\n"
    path = f"{checkout / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"}
    answer = subprocess.run(
        ["bash", "-c", ending + commands], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    said = loosely(answer.stdout)
    missing = [line for line in loosely(output + text) if line and "…" not in line and line not in said]
    assert not missing, answer.stdout


@contextmanager
def worked_example(page: str, name: str) -> Iterator[types.ModuleType]:
    """The method that a page shows, as a module beside the other methods."""
    source = (ROOT / page).read_text().partition("<!-- method -->\n```python\n")[2].partition("```")[0]
    module = types.ModuleType(f"penjing.methods.{name}")
    module.__package__ = "penjing.methods"
    sys.modules[module.__name__] = module
    try:
        exec(source, module.__dict__)
        yield module
    finally:
        del sys.modules[module.__name__]


def test_the_method_of_contributing_works() -> None:
    """It does what its docstring says."""
    with worked_example("CONTRIBUTING.md", "pow2") as module:
        steps_are_powers_of_two(module)


def steps_are_powers_of_two(module: types.ModuleType) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    weight[3] = 0
    grid = Grid(bits=4, group_size=32)
    fitted = module.solve(weight, {}, module.Config(grid))
    assert np.all(np.log2(fitted.scale) % 1 == 0)
    assert np.all(np.abs(fitted.decode() - weight) <= np.repeat(fitted.scale, 32, axis=1) / 2 * (1 + 1e-6))


def test_the_method_of_the_page_goes_through_the_compressor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file and one line in a table: the flag, calibration and pruning, against the paper's formula row by row."""
    make(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(text())
    monkeypatch.setitem(methods.PRUNERS, "ria", "ria")
    seen: list[tuple[Any, Any, Any]] = []
    with worked_example("docs/methods.md", "ria") as module:
        solve = module.solve  # type: ignore[attr-defined]

        def noted(weight: Any, statistics: Any, config: Any) -> Any:
            seen.append((weight, statistics["input_norm"], solve(weight, statistics, config)))
            return seen[-1][2]

        monkeypatch.setattr(module, "solve", noted, raising=False)
        words = ["compress", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--prune-method", "ria"]
        rows = ["--calibration", str(tmp_path / "text.txt"), "--samples", "8", "--sequence-length", "24"]
        with pytest.raises(SystemExit) as ended:
            main([*words, "--sparsity", "0.5", *rows])
    assert ended.value.code == 0
    assert len(seen) == 21
    for weight, norm, pruned in seen:
        size = np.abs(weight)
        for i, row in enumerate(size):
            score = [(w / size[:, j].sum() + w / row.sum()) * norm[j] ** 0.5 for j, w in enumerate(row)]
            kept = sorted(range(len(row)), key=lambda j: score[j])[round(0.5 * len(row)) :]
            assert set(np.flatnonzero(pruned[i])) == set(kept)
            assert (pruned[i][kept] == weight[i][kept]).all()


TABLES = {
    "quantizer": methods.QUANTIZERS,
    "pruner": methods.PRUNERS,
    "transform": methods.TRANSFORMS,
    "both in one solve": methods.JOINT,
}


def rows_of(page: str, columns: int) -> list[list[str]]:
    """The cells of the tables with so many columns in a page."""
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("|") and "---" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if len(row) == columns]


def test_the_table_of_methods_is_the_programs() -> None:
    """Every method is there, with what it needs and the options that it takes."""
    found, settings = rows_of("docs/methods.md", 7)[1:], dict(rows_of("docs/methods.md", 2)[1:])
    named = {name: row for row in found for name in re.findall(r"`(\w+)`", row[0])}
    kinds = {name: (kind, module) for kind, table in TABLES.items() for name, module in table.items()}
    assert named.keys() == kinds.keys()
    for name, (kind, file) in kinds.items():
        module = importlib.import_module(f"penjing.methods.{file}")
        assert (named[name][1], named[name][3]) == (kind, "yes" if module.NEEDS else "no"), name
        own = {each.name: each.default for each in fields(module.Config) if each.name not in apply.FIELDS}
        shown = re.findall(r"`(\w+)` \(([^)]+)\)", settings.get(f"`{name}`", ""))
        assert {option: json.loads(default) for option, default in shown} == own, name
