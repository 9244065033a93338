"""Every strategy with every regularizer and every meaningful pair of them, on two models and in
two precisions: two rounds through the engine, everything finite, dtypes kept.

`make test-matrix` plays all cells; here a cover of them, in which every two of (strategy,
regularizer, regularizer, model, precision) that can meet do meet.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

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

MODELS, DTYPES = ("resnet8", "lenet64"), ("float32", "bfloat16")
CLIENTS, SIDE = 3, 16


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

    @property
    def settings(self) -> dict[str, object]:
        chosen = {
            "strategy.name": self.strategy,
            "regularizers": ",".join(self.regularizers),
            "model.name": self.model,
            "train.dtype": self.dtype,
            "data.source": "tests.test_matrix:tiny",
            "data.partition": "iid",
            "clients.number": CLIENTS,
            "clients.per-round": 2,
            "train.batch-size": 4,
            "train.lr": 0.01,
            "train.device": "cpu",
            "run.rounds": 2,
        }
        if self.strategy == "fedpart":  # a full round, and one that trains some group
            chosen |= {"fedpart.warm-up": 1, "fedpart.order": "random"}
        return chosen | ({"model.head": "moon"} if "moon" in self.regularizers else {})

    @property
    def pairs(self) -> set[frozenset[str]]:
        return set(map(frozenset, itertools.combinations(
            (self.strategy, *self.regularizers, self.model, self.dtype), 2
        )))  # fmt: skip

    def __str__(self) -> str:
        return "-".join([self.strategy, *self.regularizers, self.model, self.dtype])


def cells() -> list[Cell]:
    """All cells that the configuration accepts, which depends on no more than two words."""
    strategies = [name for name in methods("strategies") if ":" not in name]
    names = list(methods("regularizers"))
    good = {(s, n) for s in strategies for n in names if is_accepted(s, (n,), "resnet8")}
    good |= {(n, m) for n in names for m in MODELS if is_accepted("fedavg", (n,), m)}
    pairs = itertools.combinations(names, 2)
    good |= {pair for pair in pairs if is_accepted("fedavg", pair, "resnet8")}
    chosen = [(), *((name,) for name in names), *itertools.combinations(names, 2)]
    return [
        Cell(strategy, regularizers, model, dtype)
        for strategy, regularizers, model in itertools.product(strategies, chosen, MODELS)
        if all((strategy, name) in good and (name, model) in good for name in regularizers)
        and (len(regularizers) < 2 or regularizers in good)
        for dtype in DTYPES
    ]


def is_accepted(strategy: str, regularizers: tuple[str, ...], model: str) -> bool:
    try:
        resolve(Cell(strategy, regularizers, model, "float32").settings)
    except ConfigError:
        return False
    return True


def cover(everything: list[Cell]) -> list[Cell]:
    """Some cells in which all pairs of all cells occur: greedily, the richest first."""
    left = set().union(*(cell.pairs for cell in everything))
    order = random.Random(0).sample(everything, len(everything))
    picked = []
    while left:
        best = max(order, key=lambda cell: len(cell.pairs & left))
        picked.append(best)
        left -= best.pairs
    return picked


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
    config = resolve(cell.settings)
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


@pytest.mark.parametrize("cell", cover(ALL), ids=str)
def test_a_cover_of_the_matrix(cell: Cell, tmp_path: Path):
    play(cell, tmp_path / "run")


@pytest.mark.matrix
@pytest.mark.parametrize("cell", ALL, ids=str)
def test_the_whole_matrix(cell: Cell, tmp_path: Path):
    play(cell, tmp_path / "run")


def test_the_matrix_is_the_one_of_the_page():
    """What docs/methods.md calls refused is refused, and nothing else is."""
    known = methods("regularizers")
    for strategy, cls in methods("strategies").items():
        if ":" in strategy:
            continue
        for name in known:
            part = any(name in known[p].refuses or name == p for p in cls.regularizers)
            refused = name in cls.refuses or part
            assert refused != any(
                (c.strategy, c.regularizers) == (strategy, (name,)) for c in ALL
            ), (strategy, name)
