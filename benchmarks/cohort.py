"""Clients trained one by one or all at once, on the CPU: `python -m benchmarks.cohort`.

Clients answer the same messages both ways, in turn, in one process with one thread: from the
message in to the reply out, without the server.  A ratio is the median over the turns of (one by
one) / (at once), in processor time.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import TYPE_CHECKING

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import torch
from flwr.app import ConfigRecord, RecordDict
from rich.console import Console
from rich.table import Table

from fl_client.client import Clients
from fl_common import assembly, wire
from fl_common.config import resolve
from fl_common.layout import concatenate, on, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_common.config import Scalar

CASES = {
    "lenet, as in overhead": {"model.name": "lenet"},
    "cnn, as in overhead": {"model.name": "cnn"},
    "digits-cnn, BatchNorm": {"model.name": "digits-cnn", "data.source": "digits"},
    "digits-cnn, GroupNorm": {
        "model.name": "digits-cnn", "data.source": "digits", "model.norm": "group",
    },
    "mlp on digits": {"model.name": "mlp", "data.source": "digits"},
}  # fmt: skip
"""Of batches of 10 samples, one epoch; 50 samples a client, or 17 or 18 of the digits."""


class Cohort:
    """The first `count` clients of a configuration, and a message to each of them."""

    def __init__(self, values: dict[str, Scalar], count: int) -> None:
        self.config, self.count = resolve({"data.partition": "iid", **values}), count
        self.clients = Clients(self.config)
        data, cpu = self.clients.data, torch.device("cpu")
        shape = assembly.input_shape(self.config, data)
        net = assembly.new_model(self.config, len(data.classes), shape, cpu)
        self.groups = assembly.groups_of(self.config, net, shape)
        vectors = {kind: concatenate(t.values()) for kind, t in tensors_of(net).items()}
        vectors = on(self.clients.device, vectors)  # as the in-process engine has them
        self.down, self.samples = wire.pack(vectors), len(data.train)
        self.states = [RecordDict() for _ in range(count)]
        self.played = 0

    def messages(self, **more: object) -> list[tuple[int, RecordDict, RecordDict]]:
        """The messages of the next round, to clients that took part in all rounds before it."""
        self.played += 1
        told = {
            "server-round": self.played,
            wire.SAMPLES: self.samples,
            wire.EXPERIMENT: "benchmark",
            wire.MEMORY_ROUND: self.played - 1,
            wire.CHECKPOINTS: [self.played - 1],
            **more,
        }
        content = RecordDict({wire.ARRAYS: self.down, wire.CONFIG: ConfigRecord(told)})
        return [(i, content, state) for i, state in enumerate(self.states)]

    def alone(self, **more: object) -> float:
        """A round one by one [s]."""
        messages = self.messages(**more)
        return self.seconds(lambda: [self.clients.train(*message) for message in messages])

    def together(self) -> float:
        """A round at once [s].  Raises RuntimeError if anyone was trained alone."""
        messages = self.messages()
        seconds = self.seconds(lambda: self.clients.train_together(messages, self.count))
        if self.clients.together.said:
            raise RuntimeError("; ".join(self.clients.together.said))
        return seconds

    def seconds(self, act: Callable[[], object]) -> float:
        """Processor time; on a GPU, by the clock."""
        if self.clients.device.type == "cpu":
            started = time.process_time()
            act()
            return time.process_time() - started
        torch.cuda.synchronize()
        started = time.perf_counter()
        act()
        torch.cuda.synchronize()
        return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9, help="turns per case")
    parser.add_argument("--sizes", default="10,50", help="clients at once, comma-separated")
    args = parser.parse_args()
    determinism.prepare_process()
    table = Table(title="one by one over at once, CPU seconds of a round of K clients")
    for column in ("model", "K", "one by one s", "at once s", "ratio"):
        table.add_column(column, justify="right")
    for name, settings in CASES.items():
        for count in map(int, args.sizes.split(",")):
            values = {
                "data.source": "synthetic",
                "clients.number": 100 if "data.source" in settings else 1000,
                "data.augment": "none",
                "train.batch-size": 10,
                "train.device": "cpu",
                **settings,
            }
            cohort = Cohort(values, count)
            alone, together = [], []
            for _ in range(1 + args.turns):  # the first warms both up
                alone.append(cohort.alone())
                together.append(cohort.together())
            ratio = median(a / b for a, b in zip(alone[1:], together[1:], strict=True))
            table.add_row(
                name, str(count), f"{median(alone[1:]):.3f}", f"{median(together[1:]):.3f}",
                f"{ratio:.2f}",
            )  # fmt: skip
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
