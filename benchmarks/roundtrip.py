"""What a round between processes costs with next to no work: `python -m benchmarks.roundtrip`.

Nodes on loopback, stock `flower-supernode` and `flatfed node`, the same server: seconds per round
(median) and CPU seconds per message of all processes (`flatfed run`, SuperLink, SuperNodes, the
apps they start).  The first round, which installs the app, does not count.  Then the bytes of a
node's TCP connection, over those of the model that they carry.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from fl_common.sockets import free_port
from fl_server.federation import Federation
from fl_server.flower_run import BIN

ROUNDS = 6
TIMEOUT_S = 300.0
TICKS = os.sysconf("SC_CLK_TCK")
BAR_OVERHEAD = 0.01
"""Bytes on the wire over the model's, at most, for one of 45 MB."""
NO_WORK = [
    "data.source=digits",
    "data.partition=iid",
    "train.batch-size=100000",
    "train.device=cpu",
    "eval.every=1000",
]
WIDE = """
import torch

class Wide(torch.nn.Sequential):
    def __init__(self, shape, classes):
        hidden = 11_250_000 // (64 + classes)  # 45 MB
        super().__init__(
            torch.nn.Flatten(), torch.nn.Linear(64, hidden), torch.nn.Linear(hidden, classes)
        )
"""


class Stock(Federation):
    """The same federation with Flower's own SuperNodes."""

    def node_command(self, partition: int, data_path: str = "") -> list[str]:
        config = f"partition-id={partition} num-partitions={self.clients}"
        options = ["--insecure", "--superlink", self.fleet, "--port", str(free_port())]
        return ["flower-supernode", *options, "--node-config", config]


class Watched(Federation):
    """Its nodes reach the SuperLink through a proxy that counts."""

    def node_command(self, partition: int, data_path: str = "") -> list[str]:
        if not partition:
            self.proxy = CountingProxy(self.fleet)
        command = super().node_command(partition, data_path)
        return [self.proxy.address if item == self.fleet else item for item in command]


class CountingProxy:
    """Passes connections on to `target`, and counts what goes up to it and down from it."""

    def __init__(self, target: str) -> None:
        self.target, self.bytes, self.address = target.rsplit(":", 1), {"up": 0, "down": 0}, ""
        started = threading.Event()
        threading.Thread(target=asyncio.run, args=[self._serve(started)], daemon=True).start()
        started.wait()

    async def _serve(self, started: threading.Event) -> None:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await server.serve_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            link_reader, link_writer = await asyncio.open_connection(*self.target)
        except OSError:  # the SuperLink has ended
            return writer.close()
        up, down = self._pump(reader, link_writer, "up"), self._pump(link_reader, writer, "down")
        await asyncio.gather(up, down)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                self.bytes[way] += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


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


def submit(folder: Path, name: str, *settings: str) -> subprocess.Popen[bytes]:
    """A run on the federation of `folder`, with its results there."""
    place = [f"run.output-dir={folder}", f"run.name={name}", "run.pictures=false"]
    return subprocess.Popen(
        [BIN / "flatfed", "run", "engine.name=grpc", "engine.connection=up", *place, *settings],
        env={**os.environ, "FLWR_HOME": f"{folder}/up/flower", "PYTHONPATH": str(folder)},
        stdout=subprocess.DEVNULL,
    )


def measure(kind: type[Federation], options: list[str], nodes: int) -> tuple[float, float]:
    """Wall seconds of one round, CPU seconds of one message."""
    with tempfile.TemporaryDirectory(prefix="flatfed-") as name:
        folder = Path(name)
        federation = kind(folder / "up", nodes, insecure=True)
        federation.start(node_options=options)
        try:
            settings = [f"clients.number={nodes}", f"run.rounds={ROUNDS}", *NO_WORK]
            run = submit(folder, "run", *settings)
            history, roots = folder / "run" / "history.jsonl", {*federation.processes, run.pid}
            first = _when_rows(history, 1, run, roots)
            last = _when_rows(history, ROUNDS, run, roots)
            run.wait(TIMEOUT_S)
            rows = [json.loads(line) for line in history.open()]
        finally:
            federation.stop()
    return median(row["seconds"] for row in rows[1:]), (last - first) / (ROUNDS - 1) / nodes


def _when_rows(history: Path, count: int, run: subprocess.Popen, roots: set[int]) -> float:
    """The CPU seconds used at the moment in which the history gets its `count`th row."""
    deadline = time.monotonic() + TIMEOUT_S
    while not history.exists() or history.read_bytes().count(b"\n") < count:
        if run.poll() not in (None, 0) or time.monotonic() > deadline:
            run.kill()
            raise RuntimeError(f"the run did not come to round {count}")
        time.sleep(0.02)
    return cpu_seconds(roots)


def overhead() -> dict[str, float]:
    """Bytes of a TCP connection over those of the payload, less 1, up and down, in rounds of a
    model of 45 MB.  What a run transfers once (Flower's bundle of the app) is not in it."""
    counted = []
    with tempfile.TemporaryDirectory(prefix="flatfed-") as name:
        folder = Path(name)
        (folder / "wide.py").write_text(WIDE)
        os.environ["PYTHONPATH"] = name
        federation = Watched(folder / "up", 1, insecure=True)
        federation.start(node_options=["--worker"])
        try:
            for rounds in (1, 3):
                run = submit(
                    folder, f"run{rounds}", "clients.number=1", f"run.rounds={rounds}", *NO_WORK,
                    "model.name=wide:Wide", "data.max-samples=20",
                )  # fmt: skip
                before = dict(federation.proxy.bytes)
                if run.wait(TIMEOUT_S):
                    raise RuntimeError("the run of the large model failed")
                after = federation.proxy.bytes
                counted.append({way: after[way] - before[way] for way in before})
            history = folder / "run3" / "history.jsonl"
            rows = [json.loads(line) for line in history.open()][1:]
        finally:
            federation.stop()
            del os.environ["PYTHONPATH"]
    return {
        way: (counted[1][way] - counted[0][way]) / sum(row[f"bytes_{way}"] for row in rows) - 1
        for way in ("up", "down")
    }


KINDS: dict[str, tuple[type[Federation], list[str]]] = {
    "flower-supernode": (Stock, []),
    "flatfed node": (Federation, []),
    "flatfed node --worker": (Federation, ["--worker"]),
}
BARS = {("flatfed node", 2): (2.5, None), ("flatfed node --worker", 2): (2.0, 1.2)}
"""Seconds a round, CPU seconds a message."""


def main() -> int:
    table = Table(title="A round with no work, on loopback")
    for column in ("nodes", "SuperNode", "s / round", "bar", "CPU s / message", "bar"):
        table.add_column(column, justify="right")
    missed = 0
    for nodes in (2, 4):
        for name, (kind, options) in KINDS.items():
            found = measure(kind, options, nodes)
            bars = BARS.get((name, nodes), (None, None))
            missed += sum(bar is not None and x > bar for x, bar in zip(found, bars, strict=True))
            pairs = zip(found, bars, strict=True)
            cells = [cell for x, bar in pairs for cell in (f"{x:.2f}", f"{bar or ''}")]
            table.add_row(str(nodes), name, *cells)
    Console().print(table)
    for way, share in overhead().items():
        missed += share > BAR_OVERHEAD
        print(f"45 MB {way}: {share:.3%} more on the wire (bar {BAR_OVERHEAD:.0%})")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
