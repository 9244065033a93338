"""Time and memory of local steps with a method, over plain SGD, measured in turns in one process.

Batches of 50 ready-made samples of CIFAR shape, one thread, the engine's own local round, allocator
as in a run.  A ratio is the median over the turns of (with the method) / (plain, same turn).
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import torch
from rich.console import Console
from rich.table import Table

from fl_client.optimizers import SGD
from fl_client.trainer import LocalData, local_round
from fl_common import assembly, wire
from fl_common.config import resolve
from fl_common.layout import PARAMS, Layout, concatenate, tensors_of
from fl_common.local import blank_memory, correction_of, local_methods, new_memory, owned
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_common.config import Scalar

BATCH, CLASSES, SHAPE = 50, 10, (3, 32, 32)


@dataclass(frozen=True)
class Case:
    """A model and the settings of a method, with the bar that its step time must keep."""

    label: str
    model: str
    bar: float | None
    settings: dict[str, Scalar]


class Round:
    """A local round of `steps` steps with some settings, to be played again and again."""

    def __init__(self, model: str, settings: dict[str, Scalar], steps: int) -> None:
        base = {"data.source": "synthetic", "model.name": model, "train.batch-size": BATCH}
        self.config = resolve({**base, **settings})
        generator = torch.Generator().manual_seed(0)
        n = steps * BATCH
        x = torch.randn(n, *SHAPE, generator=generator)
        self.data = LocalData(x, torch.randint(CLASSES, (n,), generator=generator), self._see)
        self.steps, self.seen, self.held = steps, 0, 0
        self.net = assembly.new_model(self.config, CLASSES, SHAPE, torch.device("cpu"))
        tensors = tensors_of(self.net)
        self.sent = {kind: concatenate(t.values()) for kind, t in tensors.items()}
        self.tensors = {kind: list(t.values()) for kind, t in tensors.items()}
        self.layout = Layout.of(self.net)
        self.sent |= {name: 1e-3 * torch.randn_like(self.sent[PARAMS]) for name in ("c", "m")}

    def play(self, *, count: bool = False) -> float:
        """One round; its processor time [s].  With `count`, `held` is the tensors' bytes in the
        middle of the round."""
        with torch.no_grad():
            for kind, tensors in self.tensors.items():
                torch._foreach_copy_(tensors, self.layout.split(kind, self.sent[kind]))
        self.seen = 0 if count else -self.steps
        methods = local_methods(self.config, {wire.SAMPLES: 1000}, 1, 100)
        # What a client remembers that has taken part before.
        model = {kind: self.sent[kind] for kind in self.tensors}
        memory = new_memory(methods, blank_memory(methods, self.sent), self.sent, model)
        regularizers = [method for method in methods if isinstance(method, Regularizer)]
        started = time.process_time()
        try:
            for regularizer in regularizers:
                regularizer.begin(self.net, self.sent, owned(memory, regularizer.name))
            correction = correction_of(methods, self.sent, memory)
            local_round(
                self.net, self.data, methods, correction, SGD(), self.config.train,
                seed=0, server_round=1, partition=0,
            )  # fmt: skip
        finally:
            for regularizer in regularizers:
                regularizer.finish()
        return time.process_time() - started

    def _see(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        if self.seen == self.steps:
            self.held = tensor_bytes()
        return x


def tensor_bytes() -> int:
    """Bytes of all CPU storages that live tensors hold."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def compare(title: str, cases: Sequence[Case], turns: int, steps: int) -> int:
    """Measure all cases, print the table; gives the number of bars that were missed."""
    determinism.prepare_process()
    table = Table(title=f"{title}: step time over plain SGD, batch {BATCH}, {turns} turns")
    for column in ("model", "method", "plain ms", "ratio", "bar", "extra memory, models"):
        table.add_column(column, justify="right")
    missed = 0
    for model in dict.fromkeys(case.model for case in cases):
        mine = [case for case in cases if case.model == model]
        for case in mine:
            plain_settings = {k: v for k, v in case.settings.items() if k.startswith("model.")}
            plain = Round(model, plain_settings, steps)
            other = Round(model, case.settings, steps)
            for warm in (plain, other):
                warm.play(count=True)
            ratios, base = [], []
            for _ in range(turns):
                base.append(plain.play())
                ratios.append(other.play() / base[-1])
            size = 4 * len(plain.sent[PARAMS])
            ratio, extra = median(ratios), (other.held - plain.held) / size
            missed += case.bar is not None and ratio > case.bar
            table.add_row(
                model, case.label, f"{1000 * median(base) / steps:.1f}", f"{ratio:.3f}",
                "" if case.bar is None else f"{case.bar:.2f}", f"{extra:.1f}",
            )  # fmt: skip
    Console(width=110).print(table)
    return missed
