"""Recorded passes give the bits of those that are not.

Without a GPU the recording is a tape of torch's operations, played on the same tensors, as a replay
does: what is held in place, what is copied, and when a pass is recorded is ours.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fl_client import client
from fl_client.graphs import Graphs, Recorded, records
from fl_common import wire
from fl_common.config import Train
from fl_common.data.transforms import Recipe, crop, flip
from tests.fl_client.test_cohort import Federation, difference

if TYPE_CHECKING:
    from collections.abc import Sequence

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Tape(TorchDispatchMode):
    """Notes every operation of forward and backward passes, with the tensors that it had."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a GPU would be waited for"
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        """The same operations on the same tensors."""
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                given = {place(tensor) for tensor in tensors((args, kwargs))}
                for new, old in zip(tensors(func(*args, **kwargs)), tensors(out), strict=True):
                    if new is not old and place(old) not in given:  # no view, nor in place
                        old.copy_(new)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def place(tensor: torch.Tensor) -> int:
    plain = tensor.layout == torch.strided
    return tensor.untyped_storage().data_ptr() if plain else id(tensor)


class Taped(Graphs):
    """On a CPU."""

    recorded = 0

    def record(self, gradient, inputs: Sequence[torch.Tensor]) -> Recorded:
        self.recorded += 1
        held = [torch.empty_like(tensor).copy_(tensor) for tensor in inputs]
        draws = torch.get_rng_state()  # to record runs nothing
        buffers = [b.clone() for b in self.net.buffers()]
        with Tape() as tape:
            loss, grads = gradient(*held)
        torch.set_rng_state(draws)
        for b, before in zip(self.net.buffers(), buffers, strict=True):
            b.copy_(before)
        return Recorded(held, tape.play, loss, grads)


class Instances(torch.nn.Sequential):
    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        norm = torch.nn.InstanceNorm2d(shape[0], track_running_stats=True)
        super().__init__(norm, torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), classes))


METHODS = {
    "plain": {},
    "sam": {"regularizers": "sam"},
    "fedspeed": {"strategy__name": "fedspeed"},
    "man": {"regularizers": "man"},
    "clipped momentum": {"train__momentum": 0.9, "train__clip_norm": 0.5},
    "adam": {"train__optimizer": "adam"},
    "BatchNorm": {"model__norm": "batch", "regularizers": "sam"},
}
ONE_BY_ONE = {
    "mixup": {"regularizers": "mixup,sam", "mixup__gamma": 1.0},
    "moon": {"regularizers": "moon", "model__head": "moon"},
    "moon of partial rounds": {
        "regularizers": "mixup,moon,sam",
        "strategy__name": "fedpart",
        "mixup__gamma": 1.0,
        "model__head": "moon",
        "model__norm": "batch",
    },
    "stochastic depth": {
        "regularizers": "stochastic-depth",
        "stochastic_depth__p_l": 0.5,
        "model__name": "resnet8",
        "shape": (3, 16, 16),
    },
    "InstanceNorm": {
        "model__name": f"{__name__}:Instances",
        "model__norm": "batch",  # the default
        "regularizers": "sam",
    },
}
DROPOUT = {"dropout": {"model__name": "cnn", "model__norm": "batch", "shape": (3, 10, 10)}}
WAYS = [
    *((method, way) for method in METHODS for way in ("alone", "together")),
    *((method, "alone") for method in ONE_BY_ONE),
]


def replies(federation: Federation, graphs: Graphs | None, way: str, rounds: int, **more):
    """Of the last of some rounds."""
    states, found = federation.states(), []
    for t in range(1, rounds + 1):
        messages = federation.messages(t, base=t - 1, **more)
        federation.clients.begin(0, messages[0], federation.states()[0])  # makes the network
        federation.clients.graphs = graphs
        if graphs:
            graphs.net = federation.clients.net
        found = getattr(federation, way)(messages, states)
        assert not federation.clients.together.said
    return found


@pytest.mark.parametrize("method, way", WAYS)
def test_bits_are_those_of_a_pass_that_is_not_recorded(monkeypatch, method: str, way: str):
    """Over rounds of clients with unequal batches, so that shapes alternate."""
    settings = {
        "train__dtype": "float32",
        "model__norm": "group",
        "recipe": Recipe((0.5,), (0.5,), train=(crop, flip)),
        **(METHODS | ONE_BY_ONE)[method],
    }
    expected = replies(Federation(monkeypatch, **settings), None, way, rounds=3)
    graphs = Taped()
    found = replies(Federation(monkeypatch, **settings), graphs, way, rounds=3)
    assert graphs.recorded > 1
    assert not graphs.refused
    assert all(difference(a, b) == 0 for a, b in zip(expected, found, strict=True))


def test_partial_rounds_have_passes_of_their_own(monkeypatch):
    graphs, settings = Taped(), {"strategy__name": "fedpart", "train__dtype": "float32"}
    for group in ("conv2", "fc"):
        one = Federation(monkeypatch, sizes=(16, 16), **settings)
        expected = replies(one, None, "alone", rounds=2, **{wire.ACTIVE: [group]})
        two = Federation(monkeypatch, sizes=(16, 16), **settings)
        graphs = Taped()
        found = replies(two, graphs, "alone", rounds=2, **{wire.ACTIVE: [group]})
        assert graphs.recorded == 1
        assert all(difference(a, b) == 0 for a, b in zip(expected, found, strict=True))


def test_passes_that_differ_from_step_to_step_are_not_recorded(monkeypatch):
    graphs = Taped()
    federation = Federation(
        monkeypatch, regularizers="gradaug", model__name="resnet8", shape=(3, 16, 16)
    )
    replies(federation, graphs, "alone", rounds=2)
    assert not graphs.passes


@pytest.mark.parametrize("way", ["alone", "together"])
def test_what_cannot_be_recorded_is_run(monkeypatch, caplog, way: str):
    """From the start of the round, dropout's draws included."""

    class Refusing(Graphs):
        def record(self, gradient, inputs):
            _, grads = gradient(*inputs)
            for p, grad in zip(self.net.parameters(), grads, strict=True):
                p.grad = grad if way == "alone" else None  # as a recording that breaks off
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    settings = {"model__name": "cnn", "shape": (3, 10, 10)}
    expected = replies(Federation(monkeypatch, **settings), None, way, rounds=2)
    graphs = Refusing()
    with caplog.at_level(logging.WARNING):
        found = replies(Federation(monkeypatch, **settings), graphs, way, rounds=2)
    assert graphs.refused == "operation not permitted"
    assert caplog.text.count("passes are not recorded") == 1
    assert all(difference(a, b) == 0 for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("way", ["alone", "together"])
def test_a_network_that_replaces_its_buffers(monkeypatch, way: str):
    """A recorded pass would go on with the old ones.  Clients' stacked ones stay where they are."""
    settings = {"model__name": "tests.fl_client.test_cohort:Replacing", "sizes": (40, 40)}
    expected = replies(Federation(monkeypatch, **settings), None, way, rounds=2)
    graphs = Taped()
    found = replies(Federation(monkeypatch, **settings), graphs, way, rounds=2)
    assert bool(graphs.refused) == (way == "alone") != bool(graphs.recorded)
    assert all(difference(a, b) == 0 for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dropped", [False, True])
def test_recorded_passes_make_room(monkeypatch, caplog, dropped: bool):
    """Where a pass of another shape finds no memory beside them, the client's round begins anew
    without; where it finds none anyway, the client fails and says so."""
    settings = {"sizes": (20, 13), "model__name": "cnn", "shape": (3, 10, 10)}
    expected = replies(Federation(monkeypatch, **settings), None, "alone", rounds=2)
    graphs, real = Taped(), client.local_round

    def full(*args, **more):
        if graphs.bytes or not dropped:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")
        return real(*args, **more)

    federation = Federation(monkeypatch, **settings)
    replies(federation, graphs, "alone", rounds=1)
    assert graphs.recorded
    monkeypatch.setattr(client, "local_round", full)
    if not dropped:
        with pytest.raises(torch.OutOfMemoryError):
            replies(federation, graphs, "alone", rounds=1)
        return
    found = replies(federation, graphs, "alone", rounds=2)
    assert graphs.refused == "CUDA out of memory. Tried to"
    assert caplog.text.count("passes are not recorded") == 1
    assert all(difference(a, b) == 0 for a, b in zip(expected, found, strict=True))


def test_whose_passes_are_recorded():
    card, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert records(Train(), "lenet", card)
    assert not records(Train(), "lenet", cpu)
    assert not records(Train(), "package.module:Net", card)
    assert records(Train(graphs="on"), "package.module:Net", card)
    assert not records(Train(graphs="off"), "lenet", card)


@GPU
@pytest.mark.parametrize("method, way", [*WAYS, ("dropout", "alone"), ("dropout", "together")])
def test_bits_on_a_card(monkeypatch, method: str, way: str):
    settings = {
        "train__dtype": "float32",
        "train__device": "cuda",
        "train__deterministic": False,
        "model__norm": "group",
        "recipe": Recipe((0.5,), (0.5,), train=(crop, flip)),
        **(METHODS | ONE_BY_ONE | DROPOUT)[method],
    }
    monkeypatch.setattr(client, "prepare_process", lambda *args: None)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    expected = replies(Federation(monkeypatch, **settings), None, way, rounds=3)
    graphs = Graphs()
    found = replies(Federation(monkeypatch, **settings), graphs, way, rounds=3)
    assert any(graphs.passes.values())
    assert not graphs.refused
    assert all(difference(a, b) == 0 for a, b in zip(expected, found, strict=True))
