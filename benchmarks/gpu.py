"""What FlatFed does on a GPU: `python -m benchmarks.gpu`.

(a) the workload of `benchmarks.overhead`, (b) ResNet-18 on CIFAR shapes, (c) the costs of
regularizers, (d) FedPart's partial rounds, (e) Ray's clients that share a card.  Without a card
it says so and exits with 2; `--device cpu --small` runs everything in a tiny form, to see that it
runs.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import threading
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bare, fedpart, regularizers
from benchmarks.cohort import Cohort
from benchmarks.overhead import Silent
from fl_client import app as client
from fl_client.trainer import batches
from fl_common import wire
from fl_common.config import resolve
from fl_server import app as server
from fl_server.cli import main as run
from fl_server.inprocess import InProcessGrid
from fl_server.recorder import Recorder
from strategies.fedpart import FedPartParams, Schedule

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fl_common.config import Scalar

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "V100": 125}
"""Dense bfloat16 (V100: float16) by a word of the card's name, as its maker has it."""
BARS = {"lenet": 8.0, "cnn": 3.0}
ROUND_BAR, IDLE_BAR = 1.6, 0.10
PUBLISHED = "FL-Simulator on a V100: FedAvg 15.86 s, FedSpeed 29.48 s"


@dataclass(frozen=True)
class Bench:
    """Where and how large."""

    device: str
    small: bool
    peak: float
    """Of the card [TFLOP/s]; 0: not known."""
    folder: Path
    console: Console

    def add(self, table: Table, *cells: str) -> None:
        """A row, which is told at once: a part takes a while."""
        table.add_row(*cells)
        told = zip((column.header for column in table.columns), cells, strict=True)
        print("; ".join(f"{name} {cell}".strip() for name, cell in told), file=sys.stderr)

    @property
    def card(self) -> bool:
        return self.device != "cpu"

    def settings(self, values: dict[str, Scalar]) -> dict[str, Scalar]:
        """The settings of every part, and `values`."""
        base = {
            "data.source": "synthetic",
            "data.partition": "iid",
            "data.augment": "none",
            "train.device": self.device,
            "train.deterministic": not self.card,
            "eval.every": 1000,
            "clients.number": 1000,
            "run.pictures": False,
        }
        # Evaluation on the server's test set would take longer than all else.
        small = {"data.max-samples": 12, "clients.number": 8, "eval.on": "clients"}
        return base | (small if self.small else {}) | values

    def run_seconds(self, values: dict[str, Scalar], name: str, rounds: int) -> float:
        """The median round of `flatfed run`, server and all, after the first one [s]."""
        return median(self.run_rounds(values, name, rounds)[1:])

    def run_rounds(self, values: dict[str, Scalar], name: str, rounds: int) -> list[float]:
        """The rounds of `flatfed run`, server and all; the first one warms up [s]."""
        place = {"run.output-dir": str(self.folder), "run.name": name, "run.rounds": 2 + rounds}
        settings = [f"{key}={value}" for key, value in (values | place).items()]
        with redirect_stdout(io.StringIO()) as printed:
            if run(["run", *settings]):
                raise RuntimeError(printed.getvalue())
        rows = (self.folder / name / "history.jsonl").read_text().splitlines()
        return [json.loads(row)["seconds"] for row in rows[:-1]]  # the last one evaluates


def overhead(bench: Bench) -> int:
    """(a): whole runs one by one, without recorded passes and with them, and at once; and the bare
    steps of the same clients."""
    count, rounds = (4, 1) if bench.small else (50, 6)
    table = _table(
        f"(a) {count} clients, batches of 10: seconds per round; ratios are those of one by one, "
        "not recorded",
        "model", "one by one", "recorded", "at once", "rounds/min", "ratio", "bar",
        "over recorded", "bare loop", "over bare", "warm-up, recorded", "warm-up, at once",
    )  # fmt: skip
    missed = 0
    for model, bar in BARS.items():
        values = bench.settings(
            {"model.name": model, "clients.per-round": count, "train.batch-size": 10,
             "engine.workers": "1"}
        )  # fmt: skip
        ways = {
            "plain": {"engine.cohort": "1", "train.graphs": "off"},
            "recorded": {"engine.cohort": "1"},
            "at-once": {"engine.cohort": str(count)},
        }
        times = [
            bench.run_rounds(values | way, f"{model}-{name}", rounds) for name, way in ways.items()
        ]
        plain, recorded, at_once = (median(each[1:]) for each in times)
        _, *warm_up = (each[0] - median(each[1:]) for each in times)
        loop = _bare_seconds(model, Cohort(values, count), rounds)
        missed += bench.card and plain / at_once < bar
        bench.add(
            table,
            model, f"{plain:.4f}", f"{recorded:.4f}", f"{at_once:.4f}", f"{60 / at_once:.0f}",
            f"{plain / at_once:.2f}", f"{bar:.0f}", f"{recorded / at_once:.2f}", f"{loop:.4f}",
            f"{loop / at_once:.2f}", *(f"{seconds:.1f}" for seconds in warm_up),
        )  # fmt: skip
    bench.console.print(table)
    return missed


def _bare_seconds(model: str, cohort: Cohort, rounds: int) -> float:
    """A round's steps without clients, weights to copy or averages [s]."""
    train, device = cohort.config.train, cohort.clients.device
    loop = bare.Bare(getattr(bare, model)().to(device), train.lr)
    ready = [
        batch
        for i in range(cohort.count)
        for batch in batches(cohort.clients.local_data(i), train, (0, 1, i))
    ]
    return median([cohort.seconds(lambda: loop.steps(ready)) for _ in range(2 + rounds)][2:])


def resnet(bench: Bench) -> int:
    """(b): whole rounds, and what a profile says of one, server and all."""
    model, count, rounds = ("resnet8", 2, 1) if bench.small else ("resnet18", 10, 3)
    values = bench.settings(
        {"model.name": model, "model.norm": "group", "clients.number": 8 if bench.small else 100,
         "clients.per-round": count, "train.batch-size": 10 if bench.small else 50,
         "train.epochs": 1 if bench.small else 5, "train.dtype": "bfloat16",
         "data.augment": "crop-flip", "engine.workers": "1"}
    )  # fmt: skip
    table = _table(
        f"(b) {model}, {count} of {values['clients.number']} clients, batches of "
        f"{values['train.batch-size']}, "
        f"{values['train.epochs']} epochs, bfloat16 ({PUBLISHED})",
        "", "s/round", "bar", "MFU %", "GPU idle %", "bar", "to the card, bytes", "launches",
    )  # fmt: skip
    met, card = False, bench.card
    for at_once in (1, count):
        setting = {"engine.cohort": str(at_once)}
        seconds = bench.run_seconds(values | setting, f"{model}-{at_once}", rounds)
        found = profiled(bench, values | setting | {"train.epochs": 1 if bench.small else 2})
        cohort = Cohort(values, count)
        cohort.alone()
        rate = _flops(cohort) / seconds / 1e12
        mfu = f"{100 * rate / bench.peak:.1f}" if bench.peak else "-"
        met |= seconds <= ROUND_BAR and found["idle"] <= IDLE_BAR and not found["to_device"]
        bench.add(
            table,
            f"{at_once} at once", f"{seconds:.3f}", f"{ROUND_BAR}", mfu,
            f"{100 * found['idle']:.1f}" if card else "-", f"{100 * IDLE_BAR:.0f}",
            f"{found['to_device']:.0f}" if card else "-", f"{found['launches']}" if card else "-",
        )  # fmt: skip
    bench.console.print(table)
    bench.console.print(
        "idle, bytes and launches: of the second round of a run with two local epochs, from the "
        "first work of the GPU to the last, the server's part with it"
    )
    return card and not met


def _flops(cohort: Cohort) -> float:
    """Floating-point operations of a round's forward and backward passes, by the plain network."""
    config, clients = cohort.config, cohort.clients
    data = clients.local_data(0)
    x, _ = next(batches(data, config.train, (0, 1, 0)))
    net = clients.net.train()
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    net.zero_grad(set_to_none=True)
    samples = sum(len(clients.local_data(i).y) for i in range(cohort.count))
    return counter.get_total_flops() / len(x) * samples * config.train.epochs


class SecondRound(Silent):
    """Stands in for the progress display: profiles the round after the first."""

    def __init__(self) -> None:
        on_card = torch.cuda.is_available()  # what the host does would be most of the file
        activities = [ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]
        self.profile, self.rounds = profile(activities=activities), 0

    def row(self, row: dict[str, Any]) -> None:
        self.rounds += 1
        if self.rounds == 1:
            self.profile.start()
        elif self.rounds == 2:
            self.profile.stop()


def profiled(bench: Bench, values: dict[str, Scalar]) -> dict[str, float]:
    watch, config = SecondRound(), resolve(values | {"run.rounds": 3})
    recorder = Recorder(bench.folder / f"profile-{config.engine.cohort}")
    recorder.begin(config, config.flat(), "inprocess")
    grid = InProcessGrid(client.app, config.clients.number, config.flat(), 1, config.engine.cohort)
    try:
        server.federate(grid, config, recorder, watch)
    finally:
        client.release()
    path = bench.folder / "trace.json"
    watch.profile.export_chrome_trace(str(path))
    return of_trace(json.loads(path.read_text())["traceEvents"])


def of_trace(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Of a profile: `idle`, the share of the time from the first to the last work of the GPU in
    which it had none; `to_device`, bytes copied there; `launches`, kernels."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    work = sorted(
        (event for event in events if event.get("cat") in kinds), key=lambda event: event["ts"]
    )
    busy, end = 0.0, work[0]["ts"] if work else 0.0
    for event in work:  # streams may overlap
        stop = event["ts"] + event["dur"]
        busy += max(0.0, stop - max(end, event["ts"]))
        end = max(end, stop)
    whole = end - work[0]["ts"] if work else 0.0
    return {
        "idle": 1 - busy / whole if whole else 0.0,
        "to_device": sum(e["args"]["bytes"] for e in work if "HtoD" in e["name"]),
        "launches": sum(event["cat"] == "kernel" for event in work),
    }


def costs(bench: Bench) -> int:
    """(c): a client's round with a regularizer over one without, one client at a time."""
    turns = 2 if bench.small else 3
    table = _table(
        f"(c) a client's round over plain SGD, batches of 50, {turns} turns; bars are the CPU's",
        "model", "method", "plain ms", "ratio", "bar",
    )  # fmt: skip
    cases = regularizers.CASES[:1] if bench.small else regularizers.CASES
    for case in cases:
        base = {"model.name": case.model, "train.batch-size": 50}
        base = bench.settings(base | ({} if bench.small else {"clients.number": 100}))
        own = {key: value for key, value in case.settings.items() if key.startswith("model.")}
        plain, other = Cohort(base | own, 1), Cohort(base | case.settings, 1)
        for warm in (plain, other):
            warm.alone()
        seconds = [(plain.alone(), other.alone()) for _ in range(turns)]
        bench.add(
            table,
            case.model, case.label, f"{1000 * median(p for p, _ in seconds):.1f}",
            f"{median(o / p for p, o in seconds):.2f}", f"{case.bar:.2f}" if case.bar else "",
        )  # fmt: skip
    bench.console.print(table)
    return 0


def partial_rounds(bench: Bench) -> int:
    """(d): a client's round that trains one group, over a full one; and one of a cohort's."""
    turns, count = (1, 2) if bench.small else (5, 40)
    values = bench.settings(
        {"model.name": "resnet8", "strategy.name": "fedpart", "train.batch-size": fedpart.BATCH,
         "train.optimizer": "adam", "train.lr": 0.001,
         "clients.number": 8 if bench.small else 100}
    )  # fmt: skip
    cohort = Cohort(values, 1)
    names = cohort.groups.names
    cohort.alone()
    cost = {names: 1.0}
    full: list[float] = []
    for name in names[:2] if bench.small else names:
        ratios = []
        for _ in range(turns):
            full.append(cohort.alone())
            ratios.append(cohort.alone(**{wire.ACTIVE: [name]}) / full[-1])
        cost[name,] = median(ratios)
    table = _table(
        f"(d) resnet8, a group's round over a full one of {1000 * median(full):.1f} ms; the bar is "
        "the CPU's",
        "active group", "ratio", "bar",
    )  # fmt: skip
    together = Cohort(values | {"engine.cohort": str(count)}, count)
    for _ in range(3):
        at_once = together.together() / count
    bench.add(table, f"all, {count} at once", f"{at_once / median(full):.3f}", "")
    for name in names:
        if (name,) in cost:
            bench.add(table, name, f"{cost[name,]:.3f}", "")
    if len(cost) > len(names):
        schedule = Schedule(FedPartParams(), names, seed=0)
        played = [cost[schedule.active(1 + t)] for t in range(schedule.cycle)]
        bench.add(table, "a cycle", f"{sum(played) / len(played):.3f}", f"{fedpart.BAR}")
    bench.console.print(table)
    return 0


@contextmanager
def peak_memory(bench: Bench) -> Iterator[list[float]]:
    """The most that all processes have of the card meanwhile, beyond what they had [GiB]."""
    found, over = [0.0], threading.Event()

    def used() -> float:
        free, whole = torch.cuda.mem_get_info(bench.device) if bench.card else (0, 0)
        return (whole - free) / 2**30

    def watch() -> None:
        while not over.wait(0.05):
            found[0] = max(found[0], used() - before)

    before = used()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def on_ray(bench: Bench) -> int:
    """(e): runs on Ray whose clients take shares of the card, and what memory that needs."""
    values = bench.settings(
        {"engine.name": "ray", "model.name": "resnet18", "model.norm": "group",
         "train.dtype": "bfloat16", "train.batch-size": 50, "clients.number": 40,
         "clients.per-round": 8}
    )  # fmt: skip
    if bench.small:
        values |= {"model.name": "resnet8", "train.dtype": "float32", "clients.number": 4}
        values |= {"clients.per-round": 2}
    table = _table(
        f"(e) {values['model.name']} on Ray, {values['clients.per-round']} of "
        f"{values['clients.number']} clients, batches of 50",
        "engine.client-gpus", "at once", "s/round", "on the card, GiB", "for each more, GiB",
    )  # fmt: skip
    alone = 0.0
    for share in (1.0, 0.25) if bench.card else (0.0,):
        with peak_memory(bench) as found:
            seconds = bench.run_seconds(
                values | {"engine.client-gpus": share}, f"ray-{share:g}", 1 if bench.small else 2
            )
        count = round(1 / share) if share else 0
        more = f"{(found[0] - alone) / (count - 1):.2f}" if count > 1 else ""
        alone = alone or found[0]
        memory = f"{found[0]:.2f}" if bench.card else "-"
        bench.add(table, f"{share:g}", f"{count or '-'}", f"{seconds:.2f}", memory, more)
    bench.console.print(table)
    return 0


PARTS = {"a": overhead, "b": resnet, "c": costs, "d": partial_rounds, "e": on_ray}


def peak_of(name: str) -> float:
    """A card's TFLOP/s; 0 if it is not in the table."""
    words = name.replace("-", " ").split()
    return next((float(peak) for key, peak in PEAK_TFLOPS.items() if key in words), 0.0)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:K, or cpu to try it out")
    parser.add_argument("--small", action="store_true", help="tiny cases, to see that it runs")
    parser.add_argument("--peak", type=float, help="the card's TFLOP/s in bfloat16")
    parser.add_argument("--only", default="abcde", help="parts to run, e.g. ab")
    args = parser.parse_args(arguments)
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no GPU that torch can use; --device cpu --small shows that the benchmark runs")
        return 2
    determinism.prepare_process(deterministic=args.device == "cpu")
    card = torch.cuda.get_device_name(args.device) if args.device != "cpu" else "cpu"
    peak = args.peak or peak_of(card)
    console = Console(width=120)
    told = f", {peak:g} TFLOP/s" if peak else ""
    console.print(f"{card}{told}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.device, args.small, peak, Path(folder), console)
        missed = sum(PARTS[letter](bench) for letter in args.only)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
