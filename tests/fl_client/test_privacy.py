"""Local differential privacy: Flower's LocalDpMod on the ClientApp, for FedAvg and its kin.

A round of one client, with and without: the difference of the two models that FedAvg makes is the
noise, and what clipping took away.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from safetensors.torch import load_file

from fl_client.app import private, release
from fl_common.config import ConfigError, methods, resolve
from fl_server.cli import main
from strategies.base import ClientRule
from strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from tests.conftest import Runner

PLAIN = ["clients.number=1", "run.rounds=1", "model.norm=group", "train.device=cpu"]


def params(result) -> torch.Tensor:
    assert result.code == 0
    return torch.cat([result.model[name].flatten() for name in sorted(result.model)]).double()


def start(runner) -> torch.Tensor:
    """w: with this learning rate no parameter moves."""
    return params(runner(*PLAIN, "train.lr=1e-30"))


def test_the_update_is_clipped(runner):
    w, theta = start(runner), params(runner(*PLAIN))
    clip, free = 0.25, torch.linalg.vector_norm(theta - w)
    assert free > 2 * clip  # else there is nothing to clip
    # An epsilon so large that the noise is lost in float32: sigma = 2 C sqrt(2 ln 1.25e5) / 1e12.
    options = [f"client.dp-clip={clip}", "client.dp-epsilon=1e12"]
    clipped = params(runner(*PLAIN, *options))
    torch.testing.assert_close(clipped - w, (theta - w) * clip / free, rtol=0, atol=1e-6)
    # A bound that is not reached changes nothing.
    loose = params(runner(*PLAIN, f"client.dp-clip={2 * free}", "client.dp-epsilon=1e12"))
    torch.testing.assert_close(loose, theta, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "strategy", ["fedavg", "flwr:FedAvg", "fedprox", "fednova", "fedsam", "fedasam"]
)
def test_the_noise_is_added_and_the_guards_accept_it(runner, strategy: str):
    settings = [*PLAIN, f"strategy.name={strategy}", "client.dp-clip=0.25"]
    silent = params(runner(*settings, "client.dp-epsilon=1e12"))
    result = runner(*settings, "client.dp-epsilon=2", "client.dp-delta=1e-3")
    assert result.history[0]["replies"] == [0]
    noise = params(result) - silent
    sigma = 2 * 0.25 * math.sqrt(2 * math.log(1.25 / 1e-3)) / 2
    d = noise.numel()
    assert d == 10026
    # Standard errors of the sample's deviation and mean: sigma / sqrt(2 d), sigma / sqrt(d).
    assert abs(noise.std().item() / sigma - 1) < 6 / math.sqrt(2 * d)
    assert abs(noise.mean().item()) < 6 * sigma / math.sqrt(d)


def test_forked_clients_do_not_draw_the_same_noise():
    """NumPy's generator is as the parent's in every fork; here it is put back in its place."""
    import numpy as np

    content = {"arrays": ArrayRecord({"params": torch.zeros(100)}), "config": ConfigRecord()}
    message = Message(RecordDict(content), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    node = {"dp-clip": 1.0, "dp-epsilon": 1.0, "dp-delta": 1e-5}
    context = Context(1, 1, node, RecordDict(), {"client.dp-clip": 0.0})
    state, seen = np.random.get_state(), []  # noqa: NPY002
    for _ in range(2):
        np.random.set_state(state)  # noqa: NPY002
        arrays = ArrayRecord({"params": torch.ones(100)})
        reply = {"arrays": arrays, "metrics": MetricRecord({"loss": 1.0})}
        done = private(message, context, lambda m, c: Message(RecordDict(reply), reply_to=m))  # noqa: B023
        seen.append(done.content["arrays"]["params"].numpy())
        assert done.content["metrics"] == {"loss": 1.0}
    assert (seen[0] != seen[1]).all()


def test_the_nodes_own_setting_wins():
    """A server cannot switch off what the node asks for; without it nothing is touched."""
    content = {"arrays": ArrayRecord({"params": torch.zeros(4)}), "config": ConfigRecord()}
    message = Message(RecordDict(content), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    update = torch.tensor([3.0, 0.0, 4.0, 0.0])  # of norm 5
    run = {"client.dp-clip": 0.0, "client.dp-epsilon": 1e12, "client.dp-delta": 1e-5}
    quiet = {"dp-clip": 2.5, "dp-epsilon": 1e12}
    for node, expected in ((quiet, update / 2), ({}, update), ({"dp-clip": 2.5}, None)):
        done = private(
            message,
            Context(1, 1, node, RecordDict(), run),
            lambda m, c: Message(
                RecordDict({"arrays": ArrayRecord({"params": update.clone()})}), reply_to=m
            ),
        )
        got = torch.from_numpy(done.content["arrays"]["params"].numpy())
        if expected is None:  # epsilon is the node's too, which is 1 unless it says otherwise
            assert (got - update / 2).abs().max() > 0.1  # of standard deviation 24
        else:
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_what_would_stay_without_noise_is_refused(runner, capsys, monkeypatch):
    settings = ["clients.number=1", "run.rounds=1", "client.dp-clip=1"]
    with monkeypatch.context() as patch:  # as for a model on data of unknown shape
        patch.setattr("fl_common.models.catalogue.skeleton", lambda config: None)
        assert runner(*settings).code == 3  # BatchNorm
    assert "'stats', 'counters')] would leave this client without noise" in capsys.readouterr().out
    with pytest.raises(ConfigError) as error:
        resolve(
            {
                "client.dp-clip": 1.0,
                "strategy.name": "scaffold",
                "eval.on": "both",
                "eval.grad-norm": True,
                "flatness.match": "paper",
                "flatness.every": 1,
            }
        )
    assert [line.partition(";")[0].partition(": ")[2] for line in error.value.errors] == [
        "strategy scaffold sends or remembers more than a model, which would get no noise",
        "eval.grad-norm would be sent without noise",
        "flatness.match would be sent without noise",
        "statistics of BatchNorm would leave a client without noise",
        'with eval.on = "both", messages leave out the model that a client has',
    ]
    with pytest.raises(ConfigError, match=r"client.dp-epsilon = 0.5: has no effect"):
        resolve({"client.dp-epsilon": 0.5})


def refuses(strategy: str) -> bool:
    try:
        resolve({"client.dp-clip": 1.0, "model.norm": "group", "strategy.name": strategy})
    except ConfigError as error:
        return f"{strategy} sends or remembers more than a model" in str(error)
    return False


def test_a_strategy_is_refused_by_what_it_says_of_itself(monkeypatch):
    known = methods("strategies")
    assert [name for name in known if refuses(name)] == [
        "feddc", "feddyn", "fedpart", "fedspeed", "mofedsam", "scaffold",
    ]  # fmt: skip
    monkeypatch.setitem(known, "mine", type("Mine", (FedAvg,), {}))
    assert not refuses("mine")
    for part in ({"keeps": ("H",)}, {"Rule": type("Rule", (ClientRule,), {"memory": ("h",)})}):
        monkeypatch.setitem(known, "mine", type("Mine", (FedAvg,), part))
        assert refuses("mine")


MEMORY = [*PLAIN, "regularizers=moon", "model.head=moon", "client.dp-clip=1"]


def test_a_client_that_lost_its_memory_is_given_back_what_it_had_sent(runner):
    """The clients of a run that goes on in another process remember nothing."""
    result = runner(*MEMORY, "client.dp-epsilon=1e6")
    assert result.code == 0
    release()
    assert main(["resume", str(result.folder), "run.rounds=3"]) == 0
    assert [row["replies"] for row in result.history] == [[0]] * 3
    (given,) = result.summary["memory_given_back"]
    assert (given["round"], given["client"]) == (2, 0)


def test_the_servers_ledger_has_noise(runner, tmp_path):
    """Of one client: what it sent is the new model; it remembers another."""
    result = runner(*MEMORY, f"client.state-dir={tmp_path / 'state'}")
    sent = params(result)
    ledger, own = (
        load_file(next(place.rglob("*.safetensors")))["moon.params"].double()
        for place in (result.folder / "ledger", tmp_path / "state")
    )
    assert torch.equal(ledger.sort().values, sent.sort().values)
    assert (own - ledger).std() > 1  # sigma = 2 sqrt(2 ln 1.25e5) = 9.7


def test_a_memory_that_is_given_back_stays_as_it_is():
    content = {
        "arrays": ArrayRecord({"params": torch.zeros(4)}),
        "config": ConfigRecord(),
        "memory": ArrayRecord({"moon.params": torch.ones(4)}),
    }
    message = Message(RecordDict(content), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    node = {"dp-clip": 2.5, "dp-epsilon": 1e12, "dp-delta": 1e-5}
    context = Context(1, 1, node, RecordDict(), {})
    update = torch.tensor([3.0, 0.0, 4.0, 0.0])  # of norm 5
    answers = [{"arrays": ArrayRecord({"params": update})}, {"metrics": MetricRecord({"a": 1})}]
    done, asks = (
        private(message, context, lambda m, c: Message(RecordDict(a), reply_to=m))  # noqa: B023
        for a in answers
    )
    got = torch.from_numpy(done.content["arrays"]["params"].numpy())
    torch.testing.assert_close(got, update / 2, rtol=0, atol=1e-6)
    assert list(done.content) == ["arrays"]
    assert asks.content == answers[1]
    assert list(message.content) == ["arrays", "config", "memory"]
    assert (message.content["memory"]["moon.params"].numpy() == 1).all()


def test_clients_that_evaluate(runner):
    settings = ["clients.number=2", "run.rounds=2", *PLAIN[2:], "client.dp-clip=1"]
    result = runner(*settings, "client.dp-epsilon=1e12", "eval.on=both", "sync.mode=full")
    assert result.code == 0
    assert [row["replies"] for row in result.history] == [[0, 1], [0, 1]]


def test_flower_does_not_tell_of_every_reply(runner: Runner) -> None:
    told = []
    handler = logging.Handler()
    handler.emit = told.append
    flower = logging.getLogger("flwr")
    flower.addHandler(handler)
    try:
        done = runner("client.dp-clip=1", "model.norm=group", "run.rounds=1")
    finally:
        flower.removeHandler(handler)
    assert done.code == 0
    assert not [record for record in told if "LocalDpMod" in record.getMessage()]
