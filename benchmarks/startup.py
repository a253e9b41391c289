"""How long the program takes to start: `penjing --help` (target 0.3 s) and `import penjing` (target 0.2 s).

Prints the median of some runs of each, with the time of a bare interpreter for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import penjing": ["-c", "import penjing"],
    "penjing --help": ["-m", "penjing", "--help"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    for name, arguments in COMMANDS.items():
        print(f"{name:16} {statistics.median(seconds(arguments) for _ in range(runs)):.3f} s")


if __name__ == "__main__":
    main()
