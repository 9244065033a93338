"""What worker processes save: `python -m benchmarks.workers`.

The workload of `benchmarks.overhead` (1,000 clients x 50 samples, 50 a round, batch 10), by one
worker and by several, in runs that take turns round by round, each idle while another works: a
shared machine is as fast for the one as for the other.  A round's wall time goes from one history
row to the next, the checkpoint included; ratios are medians over the pairs.  CPU seconds are the
clients'.  The ceiling is what the cores themselves allow: the same number of bare steps (`bare.py`)
in as many processes, each with its share, over one process with all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import bare
from benchmarks.overhead import MORE, SETTINGS, Silent
from fl_client import app as client
from fl_common.config import resolve
from fl_common.results import HISTORY
from fl_server import app as server
from fl_server.inprocess import InProcessGrid
from fl_server.recorder import Recorder, read_summary

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_common.config import CoreConfig

BARS = {"lenet": 0.60, "cnn": 0.55}
"""For two workers on two cores."""
STEPS = 250
"""Of a round: 50 clients, 5 batches."""


class Turns(Recorder):
    """Waits after every row until it is this run's turn again."""

    turn: Callable[[], None]

    def row(self, row: dict[str, Any], *, done: bool = True) -> None:
        super().row(row, done=done)
        self.turn()


class Player:
    """A process that works when it is told to."""

    def __init__(self, work: Callable[[socket.socket], None]) -> None:
        self.connection, theirs = socket.socketpair()
        self.process = os.fork()
        if not self.process:
            self.connection.close()
            try:
                work(theirs)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        theirs.close()

    def begin(self) -> None:
        self.connection.sendall(b"!")

    def wait(self) -> None:
        if not self.connection.recv(1):
            sys.exit("a run of the benchmark ended early")

    def end(self) -> None:
        self.begin()
        os.waitpid(self.process, 0)


def federated(config: CoreConfig, workers: int, folder: Path) -> Callable[[socket.socket], None]:
    def work(connection: socket.socket) -> None:
        def turn() -> None:
            connection.sendall(b".")
            connection.recv(1)

        recorder = Turns(folder)
        recorder.turn = turn
        recorder.begin(config, config.flat(), "inprocess")
        grid = InProcessGrid(client.app, config.clients.number, config.flat(), workers)
        try:
            server.federate(grid, config, recorder, Silent())
        finally:
            grid.close()

    return work


def steps(model: str, number: int, seed: int) -> Callable[[socket.socket], None]:
    """`number` bare steps at every turn."""

    def work(connection: socket.socket) -> None:
        torch.manual_seed(seed)
        loop = bare.Bare(getattr(bare, model)(), SETTINGS["train.lr"])
        batches = [(torch.rand(10, 3, 32, 32), torch.randint(10, (10,))) for _ in range(5)]
        loop.steps(batches)
        while connection.recv(1):
            for i in range(number):
                loop.steps(batches[i % 5 : i % 5 + 1])
            connection.sendall(b".")

    return work


def timed(*players: Player) -> float:
    """Seconds until all of these, at work at the same time, have done one turn."""
    started = time.perf_counter()
    for player in players:
        player.begin()
    for player in players:
        player.wait()
    return time.perf_counter() - started


def compare(model: str, workers: int, pairs: int, place: Path) -> dict[str, Any]:
    """Wall and CPU seconds, and their ratios.  Exits if the models differ."""
    settings = {"model.name": model, "run.rounds": pairs + 1, "run.pictures": False}
    config = resolve(SETTINGS | settings)
    folders = {n: place / f"{model}-{n}" for n in (1, workers)}
    one, several = runs = [Player(federated(config, n, f)) for n, f in folders.items()]
    alone = Player(steps(model, STEPS, 0))
    shares = [Player(steps(model, STEPS // workers, i)) for i in range(workers)]
    for run in runs:
        run.wait()  # the first round warms up
    for share in shares:
        timed(share)
    turns = [[timed(one), timed(several), timed(alone), timed(*shares)] for _ in range(pairs)]
    for run in runs:
        run.end()
    for player in (alone, *shares):
        player.connection.shutdown(socket.SHUT_WR)
        os.waitpid(player.process, 0)
    if len({read_summary(folder)["model_sha256"] for folder in folders.values()}) > 1:
        sys.exit(f"{model}: other bits with {workers} workers")
    rows = [(folder / HISTORY).read_text().splitlines()[1:] for folder in folders.values()]
    cpu = [median(json.loads(row)["client_cpu_s"] for row in history) for history in rows]
    return {
        "model": model,
        "one_s": median(t[0] for t in turns),
        "several_s": median(t[1] for t in turns),
        "ratio": median(t[1] / t[0] for t in turns),
        "ceiling": median(t[3] / t[2] for t in turns),
        "one_cpu_s": cpu[0],
        "several_cpu_s": cpu[1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workers", type=int, default=2, help="workers to compare with one (default: 2)"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=9,
        help="turns with cnn; lenet, whose rounds are short, has five times as many (default: 9)",
    )
    args = parser.parse_args()
    determinism.prepare_process()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    table = Table(title=f"wall seconds a round, {args.workers} workers over one")
    columns = ("model", "one", f"{args.workers}", "ratio", "bar", "ceiling", "CPU s one")
    for column in (*columns, "CPU s several"):
        table.add_column(column, justify="right")
    missed = 0
    with tempfile.TemporaryDirectory() as place:
        for model, bar in BARS.items():
            pairs = args.pairs * MORE.get(model, 1)
            found = compare(model, args.workers, pairs, Path(place))
            missed += args.workers == 2 and found["ratio"] > bar
            table.add_row(
                model, f"{found['one_s']:.3f}", f"{found['several_s']:.3f}",
                f"{found['ratio']:.3f}", f"{bar:.2f}" if args.workers == 2 else "",
                f"{found['ceiling']:.3f}", f"{found['one_cpu_s']:.3f}",
                f"{found['several_cpu_s']:.3f}",
            )  # fmt: skip
    Console(width=100).print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
