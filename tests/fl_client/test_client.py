"""Clients of one process leave nothing to each other."""

from __future__ import annotations

import pytest
import torch
from flwr.app import RecordDict

from strategies.base import ClientRule
from tests.fl_client.test_cohort import Federation, difference, vectors


@pytest.mark.parametrize("regularizer", ["", "sam"])
def test_a_client_that_failed_leaves_nothing(monkeypatch, regularizer: str):
    """Its backward pass ends half-way, as where a card is full: some gradients are there."""
    settings = {"regularizers": regularizer, "model__norm": "batch"}
    federation = Federation(monkeypatch, **settings)
    message, states = federation.messages()[0], federation.states()
    expected = Federation(monkeypatch, **settings).clients.train(0, message, states[0])
    clients = federation.clients
    clients.train(2, message, states[1])  # makes the network

    def full(parameter):
        raise MemoryError

    handle = clients.net.conv2.weight.register_post_accumulate_grad_hook(full)
    with pytest.raises(MemoryError):
        clients.train(1, message, states[2])
    handle.remove()
    assert difference(clients.train(0, message, states[3]), expected) == 0.0


class Resting(torch.nn.Sequential):
    """Puts a part of itself into evaluation mode."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        nn = torch.nn
        super().__init__(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes))
        self[1].eval()


def test_all_of_a_network_trains_in_training_mode(monkeypatch):
    """Before its first evaluation as after it: else a run that is continued in another process
    would reach another model."""
    federation = Federation(monkeypatch, model__name=f"{__name__}:Resting", eval__on="clients")
    message, state = federation.messages()[0], RecordDict()
    before = federation.clients.train(0, message, state)
    federation.clients.evaluate(0, message, state)
    assert difference(federation.clients.train(0, message, state), before) == 0
    assert vectors(before)["arrays/counters"] > 0


def test_what_an_optimizer_keeps_comes_back_in_its_order(monkeypatch):
    """Of more than ten tensors."""
    federation = Federation(
        monkeypatch, (8,), model__name="moon-cnn", shape=(3, 16, 16),
        train__momentum=0.9, train__keep_optimizer=True,
    )  # fmt: skip
    clients = federation.clients
    clients.train(0, *federation.messages(), *federation.states())  # makes the network
    params = list(clients.net.parameters())
    assert len(params) > 10
    velocity = [torch.full_like(p, i) for i, p in enumerate(params)]
    back = clients.kept(clients._optimizer_state({"velocity": velocity}))
    assert all(map(torch.equal, back["velocity"], velocity))


def test_a_method_knows_the_round(monkeypatch, runner):
    seen = []
    monkeypatch.setattr(
        ClientRule, "correction", lambda self, *_: seen.append(self.work.server_round)
    )
    assert runner("clients.number=2", "run.rounds=3").code == 0
    assert seen == [1, 1, 2, 2, 3, 3]


def test_a_rule_may_reckon_with_its_work_at_once(monkeypatch, runner):
    """Wherever one is made, also where only its memory is asked for."""

    def made(self, params, work):
        self.params, self.work, self.share = params, work, 1 / (work.steps * work.server_round)

    monkeypatch.setattr(ClientRule, "__init__", made)
    assert runner("clients.number=2", "run.rounds=1").code == 0
