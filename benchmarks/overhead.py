"""What the in-process engine costs over the bare SGD steps: `python -m benchmarks.overhead`.

1,000 clients of 50 samples of CIFAR shape, 50 of them a round, batch 10, one epoch, lr 0.1.  The
engine runs as `flatfed run` does; after each of its rounds, in the same process, with the same
allocator settings and one thread, the bare loop of `bare.py` takes that round's batches, ready
made.  A ratio is the median over the pairs.  For the record: the same run on Ray, and the peak
memory of a run without the bare loop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import bare
from fl_client import app as client
from fl_client.trainer import batches
from fl_common.config import from_text, resolve
from fl_server import app as server
from fl_server.inprocess import InProcessGrid
from fl_server.recorder import Recorder
from strategies.base import WeightedMean

if TYPE_CHECKING:
    from fl_common.config import CoreConfig

SETTINGS = {
    "data.source": "synthetic",
    "data.partition": "iid",
    "data.augment": "none",
    "clients.number": 1000,
    "clients.per-round": 50,
    "train.batch-size": 10,
    "train.epochs": 1,
    "train.lr": 0.1,
    "train.device": "cpu",
    "eval.every": 1000,
    "engine.workers": "1",
}
BARS = {"lenet": 1.10, "cnn": 1.05}
MORE = {"lenet": 5}
"""How many times as many pairs: in short rounds a busy moment of the machine weighs more."""
DATA_MIB = 60_000 * 3 * 32 * 32 / 2**20  # train and test


class Silent:
    """A progress display that shows nothing."""

    def note(self, text: str) -> None: ...
    def asked(self, phase: str, number: int) -> None: ...
    def reply(self) -> None: ...
    def row(self, row: dict[str, Any]) -> None: ...
    def stop(self) -> None: ...


class Pairs(Silent):
    """Stands in for the progress display: the engine tells of a round, the bare loop follows.

    The time of a step depends on the weights, so the bare steps of a client start from the same
    global model; copying it in and averaging, which a bare loop does not do, are not timed.
    """

    def __init__(self, config: CoreConfig, model: str) -> None:
        self.config = config
        torch.manual_seed(determinism.seed_of("init", config.run.seed))
        self.bare = bare.Bare(getattr(bare, model)(), config.train.lr)
        self.params = [p.detach() for p in self.bare.net.parameters()]
        self.w = [p.clone() for p in self.params]
        self.engine_s: list[float] = []
        self.bare_s: list[float] = []
        self.started = 0.0

    def note(self, text: str) -> None:
        self.started = time.process_time()

    def row(self, row: dict[str, Any]) -> None:
        self.engine_s.append(time.process_time() - self.started)
        means = [WeightedMean() for _ in self.w]
        seconds = 0.0
        for partition in row["cohort"]:
            torch._foreach_copy_(self.params, self.w)
            ready = self._batches(partition, row["round"])
            started = time.process_time()
            self.bare.steps(ready)
            seconds += time.process_time() - started
            for mean, p in zip(means, self.params, strict=True):
                mean.add(p, 1.0)
        self.w = [mean.value(torch.float32) for mean in means]
        self.bare_s.append(seconds)
        self.started = time.process_time()

    def _batches(self, partition: int, server_round: int) -> list[tuple[torch.Tensor, Any]]:
        data = client._resident[0][1].local_data(partition)
        key = (self.config.run.seed, server_round, partition)
        ready = batches(data, self.config.train, key)
        return [(x.contiguous(), y) for x, y in ready]  # in the usual order, whatever the engine's


def pairs(model: str, rounds: int, folder: Path, own: dict[str, Any]) -> Pairs:
    """Engine and bare loop in turn; the first pair warms both up and does not count."""
    values = {**SETTINGS, **own, "model.name": model, "run.rounds": rounds + 1}
    config = resolve(values)
    measured = Pairs(config, model)
    recorder = Recorder(folder)
    recorder.begin(config, config.flat(), "inprocess")
    grid = InProcessGrid(client.app, config.clients.number, config.flat())
    server.federate(grid, config, recorder, measured)
    del measured.engine_s[0], measured.bare_s[0]
    return measured


def separate_run(model: str, rounds: int, engine: str, folder: Path) -> tuple[dict, float]:
    """`flatfed run` in a process of its own: its history's median round, and peak memory [MiB]."""
    values = {**SETTINGS, "model.name": model, "run.rounds": rounds, "engine.name": engine}
    values |= {"run.output-dir": str(folder), "run.name": f"{model}-{engine}"}
    peak = separate_peak(values)
    rows = (folder / values["run.name"] / "history.jsonl").read_text().splitlines()
    seconds = median(json.loads(row)["seconds"] for row in rows[1:] or rows)
    cpu = median(json.loads(row)["client_cpu_s"] for row in rows[1:] or rows)
    return {"wall_s": seconds, "client_cpu_s": cpu}, peak


def separate_peak(values: dict[str, Any]) -> float:
    """Peak memory of `flatfed run` with these settings, in a process of its own [MiB]."""
    call = [sys.executable, "-c", _CHILD, *(f"{key}={value}" for key, value in values.items())]
    printed = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    return float(printed.splitlines()[-1]) / 1024


# Not getrusage's maximum, which includes the memory of the process that forked.
_CHILD = """
import sys
from pathlib import Path
from fl_server.cli import main
code = main(["run", *sys.argv[1:]])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
sys.exit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs",
        type=int,
        default=9,
        help="pairs to measure with cnn, at least 5; lenet has five times as many",
    )
    parser.add_argument("--no-ray", action="store_true", help="leave Ray out")
    parser.add_argument("values", nargs="*", metavar="key=value", help="settings of the pairs' "
        "engine, e.g. train.channels-last=on")  # fmt: skip
    args = parser.parse_args()
    settings = from_text(dict(value.split("=", 1) for value in args.values))
    determinism.prepare_process()
    table = Table(title="CPU seconds per round: engine over the bare loop")
    for column in ("model", "engine", "bare", "ratio", "bar", "wall s", "peak MiB", "bound MiB"):
        table.add_column(column, justify="right")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for model, bar in BARS.items():
            number = max(args.pairs, 5) * MORE.get(model, 1)
            result = pairs(model, number, Path(folder) / model, settings)
            ratio = median(e / b for e, b in zip(result.engine_s, result.bare_s, strict=True))
            own, peak = separate_run(model, 3, "inprocess", Path(folder))
            bound = DATA_MIB + 450 + 6 * _model_mib(model)
            missed += (ratio > bar) + (peak > bound)
            table.add_row(
                f"{model} in-process", f"{median(result.engine_s):.3f}",
                f"{median(result.bare_s):.3f}", f"{ratio:.3f}", f"{bar:.2f}",
                f"{own['wall_s']:.3f}", f"{peak:.0f}", f"{bound:.0f}",
            )  # fmt: skip
            if not args.no_ray:
                ray, _ = separate_run(model, 3, "ray", Path(folder))
                cpu = ray["client_cpu_s"]
                table.add_row(
                    f"{model} Ray, clients only", f"{cpu:.3f}", f"{median(result.bare_s):.3f}",
                    f"{cpu / median(result.bare_s):.3f}", "", f"{ray['wall_s']:.3f}", "", "",
                )  # fmt: skip
    Console(width=110).print(table)
    return 1 if missed else 0


def _model_mib(model: str) -> float:
    return sum(p.numel() for p in getattr(bare, model)().parameters()) * 4 / 2**20


if __name__ == "__main__":
    sys.exit(main())
