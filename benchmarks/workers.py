"""What worker processes save: `python -m benchmarks.workers`.

The workload of `benchmarks.overhead` (1,000 clients x 50 samples, 50 a round, batch 10), by one
worker and by several in turns, in one run.  Wall time of a round, from one history row to the
next, checkpoint included; a ratio is that of the medians.  CPU seconds are those of the clients:
what they grow by is the price of cores that share caches and memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
from rich.console import Console
from rich.table import Table

from benchmarks.overhead import SETTINGS, Silent
from fl_client import app as client
from fl_common.config import resolve
from fl_server import app as server
from fl_server.inprocess import InProcessGrid
from fl_server.recorder import Recorder

if TYPE_CHECKING:
    from fl_common.config import CoreConfig

BARS = {"lenet": 0.60, "cnn": 0.55}
"""For two workers on two cores."""


class Watch(Silent):
    """Stands in for the progress display: wall and CPU seconds of every round but the first."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.last = 0.0

    def row(self, row: dict[str, Any]) -> None:
        now = time.perf_counter()
        if self.last:
            self.wall.append(now - self.last)
            self.cpu.append(row["client_cpu_s"])
        self.last = now


def play(config: CoreConfig, workers: int, folder: Path, watch: Watch) -> str:
    """One run; gives its model's sha256."""
    recorder = Recorder(folder)
    recorder.begin(config, config.flat(), "inprocess")
    grid = InProcessGrid(client.app, config.clients.number, config.flat(), workers)
    watch.last = 0.0
    try:
        server.federate(grid, config, recorder, watch)
    finally:
        grid.close()
        client.release()
    return recorder.summary["model_sha256"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="against one (default: 2)")
    parser.add_argument("--turns", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--rounds", type=int, default=4, help="measured in a turn (default: 4)")
    args = parser.parse_args()
    determinism.prepare_process()
    table = Table(title=f"wall seconds a round, {args.workers} workers over one")
    for column in ("model", "one", f"{args.workers}", "ratio", "bar", "CPU s one", "CPU s several"):
        table.add_column(column, justify="right")
    missed = 0
    with tempfile.TemporaryDirectory() as place:
        for model, bar in BARS.items():
            settings = {"model.name": model, "run.rounds": args.rounds + 1, "run.pictures": False}
            config = resolve(SETTINGS | settings)
            one, several, digests = Watch(), Watch(), set()
            for turn in range(args.turns):
                for workers, watch in ((1, one), (args.workers, several)):
                    folder = Path(place) / f"{model}-{turn}-{workers}"
                    digests.add(play(config, workers, folder, watch))
            if len(digests) > 1:
                print(f"{model}: other bits with {args.workers} workers", file=sys.stderr)
                return 1
            ratio = median(several.wall) / median(one.wall)
            missed += args.workers == 2 and ratio > bar
            table.add_row(
                model, f"{median(one.wall):.3f}", f"{median(several.wall):.3f}", f"{ratio:.3f}",
                f"{bar:.2f}" if args.workers == 2 else "", f"{median(one.cpu):.3f}",
                f"{median(several.cpu):.3f}",
            )  # fmt: skip
    Console(width=100).print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
