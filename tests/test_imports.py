"""The direction of imports: data flows one way, and nothing on the serving side imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import penjing

PACKAGE = Path(penjing.__file__).parent

# part → the parts it may import; everyone may import recipe, presets, errors and the version.
MAY_IMPORT = {
    "errors": set(),
    "recipe": {"formats"},
    "presets": set(),
    "formats": set(),
    "kernels": {"formats", "_native"},
    "methods": {"formats", "kernels"},
    "checkpoint": {"formats", "kernels"},
    "models": {"checkpoint", "formats", "kernels", "_native"},
    "modules": {"checkpoint", "formats", "kernels", "methods", "stats"},
    "hardware": {"kernels", "_native"},
    "stats": set(),
    "overlap": set(),
    "report": {"stats"},
    "evaluate": {"checkpoint", "formats", "hardware", "kernels", "models", "overlap", "stats"},
    "verify": {"checkpoint", "formats", "kernels", "models"},
    "footprint": {"calibrate", "checkpoint", "hardware", "methods", "shrink"},
    "shrink": {"calibrate", "checkpoint", "methods", "models"},
    "rotate": {"checkpoint", "methods", "models"},
    "distilled": {"calibrate", "checkpoint", "formats"},
    "shards": {"calibrate", "checkpoint", "formats", "methods"},
    "calibrate": {"checkpoint", "formats", "hardware", "kernels", "methods", "models"},
    "budget": {"calibrate", "checkpoint", "methods"},
    "job": {
        *{"budget", "calibrate", "checkpoint", "footprint", "methods", "models", "overlap", "rotate", "shrink"},
    },
    "compress": {
        *{"calibrate", "checkpoint", "evaluate", "footprint", "hardware", "job", "models", "overlap", "shards"},
        *{"distilled", "verify"},
    },
    "export": {"checkpoint", "formats", "models"},
    "engine": {"checkpoint", "formats", "hardware", "kernels", "models"},
    "serve": {"checkpoint", "engine", "hardware", "models"},
    "cli": {"*"},
    "__init__": {"*"},
    "__main__": {"cli"},
}
# Parts that use torch; the last is loaded for a model that needs it and for no other.
USES_TORCH = ("calibrate", "modules", "models/foreign")


def imports_of(file: Path) -> list[tuple[str, str]]:
    """(top-level package, part of penjing or '') for each import statement in a file."""
    found = []
    depth = len(file.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found += [("penjing", name) for name in names if name != "__version__"]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            top, _, rest = node.module.partition(".")
            found.append((top, rest.split(".")[0] if top == "penjing" else ""))
    return found


def test_imports_go_one_way() -> None:
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        allowed = MAY_IMPORT[part] | {"errors", "recipe", "presets", "__version__", part, ""}
        for top, target in imports_of(file):
            where = file.relative_to(PACKAGE)
            uses_torch = any(where.is_relative_to(each) for each in USES_TORCH)
            if top == "penjing" and "*" not in allowed and target not in allowed:
                wrong.append(f"{where} imports {target}")
            if top in {"torch", "transformers"} and not uses_torch:
                wrong.append(f"{where} imports {top}")
    assert not wrong, wrong


def test_the_serving_side_loads_no_torch() -> None:
    """Not even lazily, for a model that has a description."""
    novelist = PACKAGE.parents[1] / "examples" / "novelist"
    code = (
        "import sys, penjing.serve.server, penjing.engine.process, penjing.engine.bench\n"
        "import penjing.evaluate, penjing.compress\n"
        "from penjing import models\n"
        f"models.load_any({str(novelist)!r}), models.texts({str(novelist)!r})\n"
        "print([m for m in ('torch', 'transformers', 'penjing.models.foreign') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_import_penjing_brings_neither_torch_nor_numpy() -> None:
    code = "import sys, penjing; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    """Commands import what they need inside their functions, so that `penjing --help` stays quick."""
    heavy = ("torch", "transformers", "numpy", "tokenizers", "fastapi", "uvicorn", "onnx", "matplotlib", "pydantic")
    code = (
        "import sys, penjing.cli\n"
        "try:\n    penjing.cli.main(['--help'])\n"
        f"except SystemExit:\n    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stderr.strip() == "[]"
