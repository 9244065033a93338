"""What registered clients that do not take part cost: `python -m benchmarks.scale`.

SCAFFOLD with ten clients a round, of 10 and of 1,000 that hold 50 samples of CIFAR shape each.  The
two federations play a few rounds in turn; a ratio is that of a turn's median rounds, in processor
seconds.  Memory, with a state directory: what SCAFFOLD adds to the peak of a process of its own,
and what lies on the disk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.overhead import Silent, separate_peak
from fl_client import app as client
from fl_common.config import resolve
from fl_server import app as server
from fl_server.inprocess import InProcessGrid
from fl_server.recorder import Recorder

SAMPLES, COHORT, BAR = 50, 10, 1.05
SIZES = (10, 1000)


def _data(clients: int, seed: int) -> tuple[Any, Any, tuple[str, ...]]:
    rng = np.random.default_rng(seed)
    n = clients * SAMPLES
    x = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    y = np.arange(n) % 10
    return (x, y), (x[:100], y[:100]), tuple("0123456789")


def data_10(path: str, seed: int) -> tuple[Any, Any, tuple[str, ...]]:
    return _data(10, seed)


def data_1000(path: str, seed: int) -> tuple[Any, Any, tuple[str, ...]]:
    return _data(1000, seed)


def settings(clients: int, rounds: int) -> dict[str, Any]:
    return {
        "data.source": f"benchmarks.scale:data_{clients}",
        "data.partition": "iid",
        "model.name": "lenet",
        "strategy.name": "scaffold",
        "clients.number": clients,
        "clients.per-round": COHORT,
        "train.batch-size": 10,
        "train.device": "cpu",
        "run.rounds": rounds,
        "eval.every": 1000,
    }


class Stopwatch(Silent):
    """Stands in for the progress display: processor seconds of every round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def note(self, text: str) -> None:
        self.started = time.process_time()

    def row(self, row: dict[str, Any]) -> None:
        now = time.process_time()
        self.seconds.append(now - self.started)
        self.started = now


def turn(clients: int, rounds: int, folder: Path) -> float:
    """The median round of a federation [s]; the first and the evaluated last do not count."""
    config = resolve(settings(clients, rounds + 2))
    recorder, watch = Recorder(folder), Stopwatch()
    recorder.begin(config, config.flat(), "inprocess")
    server.federate(InProcessGrid(client.app, clients, config.flat()), config, recorder, watch)
    return median(watch.seconds[1:-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5, help="turns of both federations")
    parser.add_argument("--rounds", type=int, default=20, help="rounds per turn")
    args = parser.parse_args()
    determinism.prepare_process()
    table = Table(title=f"SCAFFOLD, {COHORT} clients a round, of more and more")
    for column in ("clients", "round CPU s", "ratio", "bar", "peak over FedAvg MiB", "ledger MiB"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        times: dict[int, list[float]] = {size: [] for size in SIZES}
        for i in range(args.turns):
            for size in SIZES:
                times[size].append(turn(size, args.rounds, base / f"{size}-{i}"))
        ratios = [b / a for a, b in zip(*times.values(), strict=True)]
        for size in SIZES:
            values = {**settings(size, 20), "run.output-dir": name, "run.name": f"peak-{size}"}
            plain = {**values, "run.name": f"plain-{size}", "strategy.name": "fedavg"}
            values["client.state-dir"] = str(base / "state")
            peak = separate_peak(values) - separate_peak(plain)
            files = (base / f"peak-{size}" / "ledger").rglob("*.safetensors")
            disk = sum(file.stat().st_size for file in files) / 2**20
            is_last = size == SIZES[-1]
            table.add_row(
                f"{size}", f"{median(times[size]):.3f}",
                f"{median(ratios):.3f}" if is_last else "", f"{BAR}" if is_last else "",
                f"{peak:.0f}", f"{disk:.1f}",
            )  # fmt: skip
    Console(width=110).print(table)
    return 1 if median(ratios) > BAR else 0


if __name__ == "__main__":
    sys.exit(main())
