"""What a round between processes costs with next to no work: `python -m benchmarks.roundtrip`.

Nodes on loopback, stock `flower-supernode` and `flatfed node`, the same server: seconds per round
(median) and CPU seconds per round of all processes (SuperLink, SuperNodes, the apps they start).
The first round, which installs the app, does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from fl_common.processes import free_port
from fl_server.federation import Federation
from fl_server.flower_run import BIN

BARS_S = {("flatfed node", 2): 2.5}
ROUNDS = 6
TIMEOUT_S = 300.0
TICKS = os.sysconf("SC_CLK_TCK")
NO_WORK = [
    "data.source=digits",
    "data.partition=iid",
    "model.name=digits-cnn",
    "train.batch-size=100000",
    "train.device=cpu",
    "eval.every=1000",
]


class Stock(Federation):
    """The same federation with Flower's own SuperNodes."""

    def node_command(self, partition: int, data_path: str = "") -> list[str]:
        config = f"partition-id={partition} num-partitions={self.clients}"
        options = ["--insecure", "--superlink", self.fleet, "--port", str(free_port())]
        return ["flower-supernode", *options, "--node-config", config]


def cpu_seconds(roots: set[int]) -> float:
    """User and system time of `roots` and of all that descends from them, dead or alive.

    A process that was waited for is in its parent's account, one that was not is still listed.
    """
    rows: dict[int, tuple[int, int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        rows[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    family = set(roots)
    while new := {p for p, (parent, _) in rows.items() if parent in family} - family:
        family |= new
    return sum(rows[p][1] for p in family & rows.keys()) / TICKS


def measure(kind: type[Federation], nodes: int) -> tuple[float, float]:
    """Wall and CPU seconds of one round."""
    with tempfile.TemporaryDirectory(prefix="flatfed-") as folder:
        federation = kind(Path(folder, "up"), nodes, insecure=True)
        federation.start()
        try:
            settings = [f"clients.number={nodes}", f"run.rounds={ROUNDS}", *NO_WORK]
            place = [f"run.output-dir={folder}", "run.name=run"]
            engine = ["engine.name=grpc", "engine.connection=up"]
            run = subprocess.Popen(
                [BIN / "flatfed", "run", *engine, *place, *settings],
                env={**os.environ, "FLWR_HOME": f"{folder}/up/flower"},
                stdout=subprocess.DEVNULL,
            )
            history, roots = Path(folder, "run", "history.jsonl"), set(federation.processes)
            first = _when_rows(history, 1, run, roots)
            last = _when_rows(history, ROUNDS, run, roots)
            run.wait(TIMEOUT_S)
            rows = [json.loads(line) for line in history.open()]
        finally:
            federation.stop()
    return median(row["seconds"] for row in rows[1:]), (last - first) / (ROUNDS - 1)


def _when_rows(history: Path, count: int, run: subprocess.Popen, roots: set[int]) -> float:
    """The CPU seconds used at the moment in which the history gets its `count`th row."""
    deadline = time.monotonic() + TIMEOUT_S
    while not history.exists() or history.read_bytes().count(b"\n") < count:
        if run.poll() not in (None, 0) or time.monotonic() > deadline:
            run.kill()
            raise RuntimeError(f"the run did not come to round {count}")
        time.sleep(0.02)
    return cpu_seconds(roots)


def main() -> int:
    table = Table(title="A round with no work, on loopback")
    for column in ("nodes", "SuperNode", "s / round", "CPU s / round", "bar s"):
        table.add_column(column, justify="right")
    missed = 0
    for nodes in (2, 4):
        for name, kind in (("flower-supernode", Stock), ("flatfed node", Federation)):
            seconds, cpu = measure(kind, nodes)
            bar = BARS_S.get((name, nodes))
            missed += bar is not None and seconds > bar
            table.add_row(str(nodes), name, f"{seconds:.2f}", f"{cpu:.2f}", f"{bar or ''}")
    Console().print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
