"""What FedPart's partial rounds save in computing: `python -m benchmarks.fedpart`.

Local steps of resnet8, batch 32 of CIFAR shape, one thread, the engine's own local round, each
group in turn with a full round in the same process.  The bar is for the mean step over a cycle, its
full rounds included, over a full step.  The paper counts 55/75 = 0.73.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import torch
from rich.console import Console
from rich.table import Table

from fl_client.optimizers import Adam
from fl_client.trainer import LocalData, local_round
from fl_common import assembly
from fl_common.config import resolve
from fl_common.local import Affine
from strategies.fedpart import FedPartParams, Schedule

BAR = 0.67
BATCH, CLASSES, SHAPE = 32, 10, (3, 32, 32)


class Model:
    """A network and its data; a round trains some of its groups."""

    def __init__(self, steps: int) -> None:
        settings = {"model.name": "resnet8", "train.batch-size": BATCH, "strategy.name": "fedpart"}
        self.config = resolve({"data.source": "synthetic", **settings})
        self.net = assembly.new_model(self.config, CLASSES, SHAPE, torch.device("cpu"))
        self.groups = assembly.groups_of(self.config, self.net, SHAPE)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(steps * BATCH, *SHAPE, generator=generator)
        y = torch.randint(CLASSES, (len(x),), generator=generator)
        self.data = LocalData(x, y, lambda batch: batch)
        self.start = [p.detach().clone() for p in self.net.parameters()]

    def seconds(self, active: tuple[str, ...]) -> float:
        """Processor time of a local round."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.net.parameters()), self.start)
        started = time.process_time()
        with self.groups.only(self.net, active):
            local_round(
                self.net, self.data, [], Affine(), Adam(), self.config.train,
                seed=0, server_round=1, partition=0,
            )  # fmt: skip
        return time.process_time() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9, help="turns per group")
    parser.add_argument("--steps", type=int, default=8, help="steps per round")
    args = parser.parse_args()
    determinism.prepare_process()
    model = Model(args.steps)
    names = model.groups.names
    schedule = Schedule(FedPartParams(), names, seed=0)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    full: list[float] = []
    model.seconds(names)
    for _ in range(args.turns):
        for name in names:
            full.append(model.seconds(names))
            ratios[name].append(model.seconds((name,)) / full[-1])
    table = Table(
        title=f"fedpart: step time over a full step of {1e3 * median(full) / args.steps:.1f} ms"
    )
    table.add_column("active group")
    table.add_column("ratio", justify="right")
    cost = {(name,): median(found) for name, found in ratios.items()} | {names: 1.0}
    for name in names:
        table.add_row(name, f"{cost[name,]:.3f}")
    played = [schedule.active(1 + t) for t in range(schedule.cycle)]
    cycle = sum(cost[active] for active in played) / len(played)
    table.add_row(f"a cycle of {len(played)} rounds (bar {BAR})", f"{cycle:.3f}", style="bold")
    Console(width=110).print(table)
    return int(cycle > BAR)


if __name__ == "__main__":
    sys.exit(main())
