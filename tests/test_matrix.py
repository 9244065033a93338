"""Every strategy with every regularizer and every meaningful pair of them, on two models and in
two precisions: two rounds through the engine, everything finite, dtypes kept.  Flower's strategies
are with one regularizer at most; every cell has a handful of other settings that are not defaults.

`make test-matrix` plays all cells; here a cover of them, in which every two of (strategy,
regularizer, regularizer, model, precision) that can meet do meet, Flower's strategies counting as
one, and each of them once.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fl_client import app as client
from fl_common import assembly
from fl_common.config import ConfigError, methods, resolve
from fl_server import app as server
from fl_server.inprocess import InProcessGrid
from fl_server.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MODELS, DTYPES = ("resnet8", "lenet64"), ("float32", "bfloat16")
CLIENTS, SIDE = 3, 16
UNEQUAL = {"data.partition": "dirichlet", "data.alpha": 5.0, "data.min-size": 3, "run.seed": 26}
"""4, 10 and 7 samples, or 3, 8 and 6 where some are held out: unlike numbers of steps, and no batch
of one sample, which BatchNorm refuses."""
FLOWERS = "flwr:"
PARAMS = {
    "flwr:Bulyan": "num_malicious_nodes=0",
    "flwr:FedProx": "proximal_mu=0.1",
    "flwr:Krum": "num_malicious_nodes=0",
    "flwr:QFedAvg": "client_learning_rate=0.01",
}
OPTIONS: dict[str, dict[str, object]] = {
    "local": {"fedpart.bn-stats": "local"},
    "frozen": {"fedpart.bn-frozen": "eval"},
    "kept": {"train.momentum": 0.9, "train.keep-optimizer": True},
    "adam": {"train.optimizer": "adam", "train.weight-decay": 0.01},
    "clipped": {"train.clip-norm": 0.5, "train.lr-decay": 0.5},
    "channels-last": {"train.channels-last": "on"},
    "norms": {"eval.grad-norm": True},
    "on-clients": {"eval.on": "clients"},
    "on-both": {"eval.on": "both"},
    "means": {"eval.models": "sel,all"},
    "full": {"sync.mode": "full"},
    "disk": {"client.state-dir": "/"},
    "no-ledger": {"server.ledger": False},
    "replies": {"clients.min-replies": 2, "clients.sampling": "bernoulli"},
}
"""Settings that are not defaults, by what a cell's name has of them."""
EACH = 4
"""How many of them a cell has, where so many go together."""


def tiny(path: str, seed: int):
    """Three clients' worth of random images, 16 px."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (7 * CLIENTS + 8, 3, SIDE, SIDE), dtype=np.uint8)
    y = np.arange(len(x)) % 4
    return (x[8:], y[8:]), (x[:8], y[:8]), ("a", "b", "c", "d")


@dataclass(frozen=True)
class Cell:
    strategy: str
    regularizers: tuple[str, ...]
    model: str
    dtype: str
    options: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, object]:
        chosen = {
            "strategy.name": self.strategy,
            "regularizers": ",".join(self.regularizers),
            "model.name": self.model,
            "train.dtype": self.dtype,
            "data.source": "tests.test_matrix:tiny",
            **UNEQUAL,
            "clients.number": CLIENTS,
            "clients.per-round": 2,
            "train.batch-size": 4,
            "train.lr": 0.01,
            "train.device": "cpu",
            "run.rounds": 2,
        }
        if self.strategy == "fedpart":  # a full round, and one that trains some group
            chosen |= {"fedpart.warm-up": 1, "fedpart.order": "random"}
        if self.strategy.startswith(FLOWERS):
            chosen |= {"strategy.params": PARAMS.get(self.strategy, "")}
        if self.strategy == "flwr:Bulyan":  # it wants three replies
            chosen |= {"clients.per-round": 3}
        for option in self.options:
            chosen |= OPTIONS[option]
        return chosen | ({"model.head": "moon"} if "moon" in self.regularizers else {})

    @property
    def pairs(self) -> set[frozenset[str]]:
        """What meets in it; the strategy, alone, among it."""
        strategy = FLOWERS if self.strategy.startswith(FLOWERS) else self.strategy
        words = (strategy, *self.regularizers, self.model, self.dtype)
        return {frozenset({self.strategy}), *map(frozenset, itertools.combinations(words, 2))}

    @property
    def cheap(self) -> tuple[int, bool]:
        """The more, the cheaper."""
        return -len(self.regularizers), self.model == "lenet64"

    def __str__(self) -> str:
        words = [self.strategy, *self.regularizers, self.model, self.dtype, *self.options]
        return "-".join(words)

    def with_options(self, order: Iterable[str]) -> Cell:
        """The cell with the first of these that are accepted and set nothing twice."""
        cell = self
        for option in order:
            twice = any(OPTIONS[option].keys() & OPTIONS[known].keys() for known in cell.options)
            more = replace(cell, options=(*cell.options, option))
            if len(cell.options) < EACH and not twice and is_accepted(more):
                cell = more
        return cell


def cells() -> list[Cell]:
    """All cells that the configuration accepts, which depends on no more than two words."""
    strategies, names = list(methods("strategies")), list(methods("regularizers"))

    def accepted(strategy: str, regularizers: tuple[str, ...], model: str) -> bool:
        return is_accepted(Cell(strategy, regularizers, model, "float32"))

    good = {(s, n) for s in strategies for n in names if accepted(s, (n,), "resnet8")}
    good |= {(n, m) for n in names for m in MODELS if accepted("fedavg", (n,), m)}
    pairs = itertools.combinations(names, 2)
    good |= {pair for pair in pairs if accepted("fedavg", pair, "resnet8")}
    chosen = [(), *((name,) for name in names), *itertools.combinations(names, 2)]
    return [
        Cell(strategy, regularizers, model, dtype)
        for strategy, regularizers, model in itertools.product(strategies, chosen, MODELS)
        if all((strategy, name) in good and (name, model) in good for name in regularizers)
        and (len(regularizers) < 2 or (regularizers in good and FLOWERS not in strategy))
        for dtype in DTYPES
    ]


def is_accepted(cell: Cell) -> bool:
    try:
        resolve(cell.settings)
    except ConfigError:
        return False
    return True


def cover(everything: list[Cell]) -> list[Cell]:
    """Some cells in which all pairs of all cells occur: greedily, the richest first, and of those
    that are as rich the cheapest."""
    left = set().union(*(cell.pairs for cell in everything))
    order = random.Random(0).sample(everything, len(everything))
    picked = []
    while left:
        best = max(order, key=lambda cell: (len(cell.pairs & left), *cell.cheap))
        picked.append(best)
        left -= best.pairs
    return picked


def with_options(picked: list[Cell]) -> Iterator[Cell]:
    """Each with those options that its methods have met least."""
    met: Counter[tuple[str, str]] = Counter()
    for plain in picked:
        words = (plain.strategy.partition(":")[0], *plain.regularizers)
        cell = plain.with_options(sorted(OPTIONS, key=lambda o: sum(met[o, w] for w in words)))
        met.update(itertools.product(cell.options, words))
        yield cell


ALL = cells()


@pytest.fixture(autouse=True)
def _only_the_rounds(monkeypatch):
    """What is not looked at here: pictures, and waiting for the disk."""
    monkeypatch.setattr(Recorder, "_draw", lambda self: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    yield
    client.release()


class Silent:
    def note(self, text: str) -> None: ...
    def asked(self, phase: str, number: int) -> None: ...
    def reply(self) -> None: ...
    def row(self, row: dict) -> None: ...
    def stop(self) -> None: ...


def play(cell: Cell, folder: Path) -> None:
    place = {"client.state-dir": str(folder / "state")} if "disk" in cell.options else {}
    config = resolve(cell.settings | place)
    recorder = Recorder(folder)
    recorder.begin(config, config.flat(), "inprocess")
    grid = InProcessGrid(client.app, CLIENTS, config.flat())
    server.federate(grid, config, recorder, Silent())
    rows = [json.loads(line) for line in (folder / "history.jsonl").open()]
    assert [row["failed"] | row["rejected"] for row in rows] == [{}, {}]
    assert all(math.isfinite(row[key]) for row in rows for key in ("client_loss", "loss"))
    start = assembly.new_model(config, 4, (3, SIDE, SIDE), torch.device("cpu"))
    end = load_file(folder / "model.safetensors")
    assert {k: v.dtype for k, v in end.items()} == {
        k: v.dtype for k, v in start.state_dict().items()
    }
    assert all(torch.isfinite(v).all() for v in end.values())
    moved = [not torch.equal(v, end[k]) for k, v in start.named_parameters()]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("cell", [*with_options(cover(ALL))], ids=str)
def test_a_cover_of_the_matrix(cell: Cell, tmp_path: Path):
    play(cell, tmp_path / "run")


@pytest.mark.matrix
@pytest.mark.parametrize("cell", ALL, ids=str)
def test_the_whole_matrix(cell: Cell, tmp_path: Path):
    order = random.Random(str(cell)).sample(list(OPTIONS), len(OPTIONS))
    play(cell.with_options(order), tmp_path / "run")


def test_the_matrix_is_the_one_of_the_page():
    """What docs/methods.md calls refused is refused, and nothing else is; alike of Flower's."""
    known = methods("regularizers")
    for strategy, cls in methods("strategies").items():
        for name in known:
            part = any(name in known[p].refuses or name == p for p in cls.regularizers)
            refused = name in cls.refuses or part
            assert refused != any(
                (c.strategy, c.regularizers) == (strategy, (name,)) for c in ALL
            ), (strategy, name)
