"""What makes an eager step on a CPU faster, and what does not: `python -m benchmarks.eager`.

Batches of CIFAR shape, one thread, the allocator as in a run.  In turns: the step as everybody
writes it; with the fused optimizer; also with large maps pooled by oneDNN (the trainer does both);
the former with channels innermost (`train.channels-last=on`); that compiled by `torch.compile`;
and compiled in the usual order.  A ratio is the median over the turns of processor time over the
plain step's; warm-up is the compiled step's first call.
"""

from __future__ import annotations

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # or the second call's warm-up is shorter

import argparse
import shutil
import sys
import time
import warnings
from statistics import median
from typing import TYPE_CHECKING

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from fl_common.models.catalogue import MODELS, build
from fl_common.models.layers import MaxPool2d

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = (
    ("lenet", 10),
    ("cnn", 10),
    ("lenet64", 50),
    ("tiny-convnet", 50),
    ("resnet8", 50),
    ("resnet20", 50),
)
"""Models and batch sizes."""
WAYS = (
    "plain",
    "fused optimizer",
    "and oneDNN's pooling",
    "or channels last",
    "and compiled",
    "compiled alone",
)


def model_of(name: str, onednn: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    net = build(
        name,
        classes=10,
        shape=(3, 32, 32),
        norm="group" if MODELS[name].norms else "batch",
        head="none",
    )
    for module in net.modules():
        if isinstance(module, MaxPool2d) and not onednn:
            module.LARGE = sys.maxsize
    return net


def step_of(way: str, name: str, size: int) -> Callable[[], None]:
    last = way in ("or channels last", "and compiled")
    order = torch.channels_last if last else torch.contiguous_format
    net = model_of(name, way == "and oneDNN's pooling").train().to(memory_format=order)
    x = torch.rand(size, 3, 32, 32).contiguous(memory_format=order)
    y = torch.randint(10, (size,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, fused=way != "plain")
    forward = torch.compile(net) if "compiled" in way else net

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(forward(x), y).backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None], steps: int = 1) -> float:
    started = time.process_time()
    for _ in range(steps):
        step()
    return time.process_time() - started


def case(text: str) -> tuple[str, int]:
    name, _, size = text.partition(":")
    if name not in MODELS or not size.isdecimal() or not int(size):
        raise argparse.ArgumentTypeError(f"{text}: give a model of the catalogue and a batch size")
    return name, int(size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "cases", nargs="*", type=case, default=CASES, metavar="MODEL:BATCH",
        help="models and batch sizes, instead of those of the table in docs/speed.md, e.g. "
        "moon-cnn:32",
    )  # fmt: skip
    parser.add_argument("--turns", type=int, default=7, help="turns per model (default: 7)")
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="about how long one way takes in a turn"
    )
    args = parser.parse_args()
    determinism.prepare_process()
    warnings.filterwarnings("ignore", module="torch._dynamo")  # that the caches are off
    if not shutil.which("g++"):
        print("torch.compile needs a compiler, g++, which is not here", file=sys.stderr)
        return 1
    table = Table(title="processor time of a step over the plain one's")
    for column in ("model", "batch", "plain ms", *WAYS[1:], "warm-up s"):
        table.add_column(column, justify="right")
    for name, size in args.cases:
        torch._dynamo.reset()  # or it compiles no more models after some
        steps = {way: step_of(way, name, size) for way in WAYS}
        for step in steps.values():
            started = time.perf_counter()
            step()
            warm_up = time.perf_counter() - started  # in the end the compiled one's
        count = max(1, round(args.seconds / timed(steps["plain"])))
        turns = [
            {way: timed(step, count) for way, step in steps.items()} for _ in range(args.turns)
        ]
        ratios = [f"{median(t[way] / t['plain'] for t in turns):.3f}" for way in WAYS[1:]]
        plain = 1000 * median(t["plain"] for t in turns) / count
        table.add_row(name, f"{size}", f"{plain:.2f}", *ratios, f"{warm_up:.0f}")
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
