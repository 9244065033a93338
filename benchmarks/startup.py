"""How long a person waits: `python -m benchmarks.startup`.

Wall and CPU seconds of whole commands, median of five; the first call, which may fill the cache,
does not count.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

BARS_S = {("--help",): 0.5, ("run", "run.rounds=1"): 6.0}
REPEATS = 5


def measure(arguments: tuple[str, ...]) -> tuple[float, float]:
    """Wall and CPU seconds of one `flatfed` call in an empty folder."""
    command = [str(Path(sys.executable).with_name("flatfed")), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return wall, cpu


def main() -> int:
    table = Table(title="Start-up")
    for column in ("command", "wall s", "CPU s", "bar s"):
        table.add_column(column, justify="right")
    missed = 0
    for arguments, bar in BARS_S.items():
        measure(arguments)
        walls, cpus = zip(*(measure(arguments) for _ in range(REPEATS)), strict=True)
        missed += median(walls) > bar
        table.add_row(
            f"flatfed {' '.join(arguments)}",
            f"{median(walls):.2f}",
            f"{median(cpus):.2f}",
            f"{bar}",
        )
    Console().print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
