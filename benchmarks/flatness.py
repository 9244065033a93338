"""What Hessian-vector products and lambda_max cost: `python -m benchmarks.flatness`.

One thread, batches of 128 random images of CIFAR shape.  A ratio is the median over the turns of
(product) / (gradient, same turn), in processor time.  lambda_max: of resnet8 over 1,024 images,
from a random start vector to a residual of 1 % of it, which bounds its error.  Memory: the highest
sum of tensors that one product holds beyond what there was before it.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import TYPE_CHECKING

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from fl_common.models.catalogue import build
from fl_flatness.products import Curvature, cut
from fl_flatness.spectrum import Lanczos, eigenpairs

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, CLASSES, SHAPE, VECTORS = 128, 10, (3, 32, 32), 8
PRODUCT_BAR, BLOCK_BAR, SECONDS_BAR, MEMORY_BAR = 3.1, 2.4, 60.0, 1.01


def curvature_of(model: str, n: int) -> Curvature:
    """The curvature of a new network's loss over `n` random images."""
    torch.manual_seed(0)
    net = build(model, classes=CLASSES, shape=SHAPE)
    x, y = torch.randn(n, *SHAPE), torch.randint(CLASSES, (n,))
    return Curvature(net, cut(x, y, BATCH))


def seconds(call: Callable[[], object]) -> float:
    """Processor time."""
    started = time.process_time()
    call()
    return time.process_time() - started


def ratios(model: str, turns: int) -> tuple[float, float, float]:
    """Gradient [s]; a product, and one of `VECTORS`, in gradients."""
    curvature = curvature_of(model, BATCH)
    v = torch.randn(VECTORS, curvature.d)
    calls = (
        curvature.gradient,
        lambda: curvature.product(v[0]),
        lambda: curvature.products(v),
    )
    for call in calls:
        call()
    rows = [[seconds(call) for call in calls] for _ in range(turns)]
    gradient, one, many = zip(*rows, strict=True)
    return (
        median(gradient),
        median(a / b for a, b in zip(one, gradient, strict=True)),
        median(a / b / VECTORS for a, b in zip(many, gradient, strict=True)),
    )


def peak_bytes(n: int) -> int:
    """The most that a product with resnet8 over `n` images holds at once."""
    curvature = curvature_of("resnet8", n)
    v = torch.randn(curvature.d)
    curvature.product(v)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        curvature.product(v)
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=11, help="turns per ratio")
    parser.add_argument("--threads", type=int, default=1, help="torch threads for lambda_max")
    args = parser.parse_args()
    determinism.prepare_process()
    console, missed = Console(width=110), 0
    table = Table(title=f"Hessian-vector products, batch {BATCH}, {args.turns} turns")
    for column in ("model", "gradient ms", "product", "bar", f"per vector of {VECTORS}", "bar"):
        table.add_column(column, justify="right")
    for model in ("cnn", "resnet8"):
        gradient, one, many = ratios(model, args.turns)
        missed += (one > PRODUCT_BAR) + (many > BLOCK_BAR)
        table.add_row(
            model, f"{1000 * gradient:.0f}", f"{one:.2f}", str(PRODUCT_BAR), f"{many:.2f}",
            str(BLOCK_BAR),
        )  # fmt: skip
    console.print(table)

    small, large = peak_bytes(256), peak_bytes(1024)
    missed += large > MEMORY_BAR * small
    console.print(
        f"peak of a product, resnet8: {small / 2**20:.1f} MiB for 256 images, "
        f"{large / 2**20:.1f} MiB for 1,024 (bar: {MEMORY_BAR} times)"
    )

    torch.set_num_threads(args.threads)
    lanczos = Lanczos(curvature_of("resnet8", 1024), 0)
    wall, cpu = time.perf_counter(), time.process_time()
    found = eigenpairs(lanczos, tolerance=1e-2)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    missed += wall > SECONDS_BAR or not found.converged
    console.print(
        f"lambda_max, resnet8, 1,024 images: {found.values[0]:.4f}, residual "
        f"{100 * found.residuals[0]:.2f} %, {len(lanczos.basis)} products, {wall:.1f} s wall, "
        f"{cpu:.1f} s CPU, {args.threads} thread(s) (bar: {SECONDS_BAR:.0f} s wall)"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
