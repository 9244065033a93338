"""Flower's own strategies with our clients."""

from __future__ import annotations

import inspect
import logging

import numpy as np
import pytest
import torch
from flwr import serverapp

from fl_common.config import resolve
from strategies.flower import NAMES
from tests import toy

BASE = ["clients.number=4", "run.rounds=2", "train.device=cpu"]
NEEDS = {
    "QFedAvg": "client_learning_rate=0.1",
    "FedProx": "proximal_mu=0.1",
    "Krum": "num_malicious_nodes=0",
    "MultiKrum": "num_malicious_nodes=1,num_nodes_to_select=2",
}


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_with_batchnorm_and_counters(name, runner):
    result = runner(
        *BASE, "model.norm=batch", f"strategy.name=flwr:{name}",
        f"strategy.params={NEEDS.get(name, '')}",
    )  # fmt: skip
    assert result.code == 0
    assert result.history[-1]["replies"] == [0, 1, 2, 3]
    assert any(key.endswith("num_batches_tracked") for key in result.model)
    for key, tensor in result.model.items():
        assert torch.isfinite(tensor).all(), key
        counter = key.endswith("num_batches_tracked")
        assert tensor.dtype == (torch.int64 if counter else torch.float32)
        if key.endswith("running_var"):
            assert (tensor >= 0).all(), "a server optimizer must not step on statistics"


def test_all_of_flowers_that_average_arrays_are_known():
    strategies = {
        name
        for name, cls in vars(serverapp.strategy).items()
        if inspect.isclass(cls) and issubclass(cls, serverapp.strategy.FedAvg)
    }
    without_arrays = {name for name in strategies if "Xgb" in name}
    assert set(NAMES) == strategies - without_arrays


def test_flowers_fedavg_is_ours_to_rounding(runner):
    ours, flowers = runner(*BASE), runner(*BASE, "strategy.name=flwr:FedAvg")
    for key, tensor in ours.model.items():
        torch.testing.assert_close(flowers.model[key], tensor, rtol=1e-4, atol=1e-5)


def test_flowers_fedprox_is_ours_to_rounding(runner):
    ours = runner(*BASE, "strategy.name=fedprox", "fedprox.mu=0.7")
    flowers = runner(*BASE, "strategy.name=flwr:FedProx", "strategy.params=proximal_mu=0.7")
    plain = runner(*BASE)
    for key, tensor in ours.model.items():
        torch.testing.assert_close(flowers.model[key], tensor, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(plain.model[k], t, atol=1e-4) for k, t in ours.model.items())


def test_regularizers_work_beside_flowers(runner):
    settings = ["regularizers=man,proximal", "man.zeta=0.5", "proximal.mu=0.7"]
    ours = runner(*BASE, *settings)
    flowers = runner(*BASE, *settings, "strategy.name=flwr:FedAvg")
    assert flowers.code == 0
    for key, tensor in ours.model.items():
        torch.testing.assert_close(flowers.model[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["QFedAvg", "FedAvg"])
def test_what_clients_remember_is_not_what_flowers_compute_in(name, runner, tmp_path):
    """Flower's QFedAvg computes in the arrays that it gets, and in one process MOON remembers the
    very model that was sent."""
    settings = [
        "clients.number=2", "run.rounds=3", "train.device=cpu", "data.max-samples=32",
        "regularizers=moon", "model.head=moon", f"strategy.name=flwr:{name}",
        f"strategy.params={NEEDS.get(name, '')}",
    ]  # fmt: skip
    in_memory = runner(*settings)
    on_disk = runner(*settings, f"client.state-dir={tmp_path}/state")
    assert in_memory.summary["model_sha256"] == on_disk.summary["model_sha256"]


def test_gradient_norms_of_unequal_clients_are_told(runner):
    """As many numbers as steps, which differ from client to client."""
    settings = [*BASE, "eval.grad-norm=true", "train.batch-size=64"]
    ours, flowers = runner(*settings), runner(*settings, "strategy.name=flwr:FedAvg")
    assert flowers.code == 0
    for mine, theirs in zip(ours.history, flowers.history, strict=True):
        assert theirs["grad_norm"]["all"] == pytest.approx(mine["grad_norm"]["all"], rel=1e-3)


def test_fedadam_on_the_toy(runner, monkeypatch):
    """m = (1 - b1) delta, v = (1 - b2) delta^2, w += eta' m / (sqrt(v) + tau), by hand."""
    toy.install(monkeypatch)
    result = runner(
        *toy.SETTINGS, "run.rounds=2", "strategy.name=flwr:FedAdam",
        "strategy.params=eta=0.1,beta_1=0.9,beta_2=0.99,tau=0.001",
    )  # fmt: skip
    w, m, v = 0.0, 0.0, 0.0
    for server_round in (1, 2):
        delta = np.mean(-toy.LR * toy.A * (w - toy.B))
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        # Flower corrects the bias with the exponent round + 1.
        t = server_round + 1
        w += 0.1 * np.sqrt(1 - 0.99**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-3)
    assert float(result.model["theta"]) == pytest.approx(w, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["strategy.name=flwr:FedAdm"], "did you mean flwr:FedAdam?"),
        (["strategy.name=flwr:FedAdam", "strategy.params=eto=1"], "it has eta, eta_l, beta_1"),
        (
            ["strategy.name=flwr:FedAdam", "strategy.params=eta=big"],
            "eta = big is not a finite number",
        ),
        (["strategy.name=flwr:FedAdam", "strategy.params=eta"], "eta is not an argument"),
        (
            ["strategy.name=flwr:FedAdam", "strategy.params=fraction_train=0.5"],
            "is not an argument",
        ),
        (["strategy.name=flwr:FedAdam", "strategy.params=eta=NaN"], "is not a finite number"),
        (
            ["strategy.name=flwr:FedAdam", "strategy.params=eta=1,eta=2"],
            "eta is given twice; give it once",
        ),
        (["strategy.name=flwr:Krum", "strategy.params=num_malicious_nodes=1.5"], "not a whole"),
        (["strategy.name=flwr:Krum", "strategy.params=num_malicious_nodes=-1"], "not a whole"),
        (
            ["strategy.name=flwr:Bulyan", "strategy.params=num_malicious_nodes=2"],
            "flwr:Bulyan needs 11 clients in a round (4 * num_malicious_nodes + 3), not 10",
        ),
        (["strategy.name=flwr:FedProx", "regularizers=proximal"], "it is the same term twice"),
        (["fedprox.mu=5"], "has no effect without strategy.name=fedprox"),
        (["proximal.mu=5"], "has no effect without regularizers=proximal"),
        (["strategy.name=flwr:QFedAvg"], "flwr:QFedAvg needs client_learning_rate"),
        (["strategy.name=fedavg", "strategy.params=eta=1"], "fedavg has no keys; leave"),
        (["strategy.params=eta=1", "strategy.name=fedprox"], "fedprox has its own keys, fedprox.*"),
        (
            ["strategy.name=flwr:FedTrimmedAvg", "strategy.params=beta=0.2,q=1"],
            "q is not an argument",
        ),
    ],
)
def test_mistakes_are_told_before_anything_starts(settings, words, runner, capsys):
    result = runner(*settings)
    assert result.code == 2
    assert words in capsys.readouterr().err
    assert not result.folder.exists()


def test_checking_a_configuration_leaves_flowers_log_as_it_is(caplog):
    caplog.set_level("INFO", "flwr")
    resolve({"strategy.name": "flwr:FedAvg"})
    assert logging.getLogger("flwr").level == logging.INFO


def test_clients_evaluate_as_with_our_own_fedavg(runner):
    settings = [*BASE, "model.norm=batch", "eval.on=clients"]
    ours = runner(*settings, "strategy.name=fedavg")
    flowers = runner(*settings, "strategy.name=flwr:FedAvg")
    assert ours.code == flowers.code == 0
    for row, expected in zip(flowers.history, ours.history, strict=True):
        for key in ("client_accuracy", "accuracy", "loss"):
            assert row[key] == pytest.approx(expected[key], abs=0.01), key


def test_nobody_to_write_to_is_not_waited_for():
    from flwr.app import ConfigRecord

    from fl_common import wire
    from fl_server.roster import Cohort
    from strategies.base import METHODS

    strategy = METHODS["flwr:FedAvg"]()
    arrays = wire.pack({"params": torch.zeros(3)})
    assert strategy.configure_train(1, arrays, ConfigRecord(), Cohort(None, [])) == []


def test_each_client_is_told_of_its_own_memory(runner):
    """Momentum that clients keep, some of them absent from some rounds: Flower's FedAvg is ours.

    Flower puts one content into all messages; with the settings of one client in all of them,
    the others would begin from nothing, or from a round that they took no part in.
    """
    settings = [
        "clients.number=5", "clients.per-round=3", "run.rounds=6", "run.seed=5",
        "train.device=cpu", "train.momentum=0.9", "train.keep-optimizer=true", "train.lr=0.02",
        "model.norm=group",
    ]  # fmt: skip
    ours = runner(*settings, "strategy.name=fedavg")
    flowers = runner(*settings, "strategy.name=flwr:FedAvg")
    forgetful = runner(*[s for s in settings if "keep" not in s], "strategy.name=fedavg")
    assert ours.code == flowers.code == 0
    for key, tensor in ours.model.items():
        torch.testing.assert_close(flowers.model[key], tensor, rtol=1e-3, atol=1e-4)
    assert any(
        (forgetful.model[key] - tensor).abs().max() > 0.01 for key, tensor in ours.model.items()
    )


def test_momentless_sgd_has_nothing_to_keep(runner):
    kept = runner(*BASE, "train.keep-optimizer=true")
    assert kept.summary["model_sha256"] == runner(*BASE).summary["model_sha256"]
