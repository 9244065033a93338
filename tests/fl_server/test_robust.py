"""Two of ten clients turn their updates round: robust means hold, the plain one does not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import fl_client.app
from fl_common import wire

FLIPPERS = (3, 7)
S = 4.2
"""They send w - S (theta - w).  Clients are alike, so the plain mean of ten moves by
(8 - 2 S) / 10 = -0.04 of an honest update: uphill.  A median of ten, or a mean without the two
lowest and the two highest, moves by that of honest clients."""
SETTINGS = [
    "clients.number=10",
    "data.partition=iid",
    "model.name=mlp",
    "run.rounds=15",
    "train.epochs=8",
    "train.batch-size=200",  # all samples of a client: honest clients differ by their data alone
    "train.lr=0.3",
    "train.clip-norm=1",  # the ascent stays finite
    "eval.every=15",
    "train.device=cpu",
]


def flip(patch: pytest.MonkeyPatch) -> None:
    honest = fl_client.app.app

    def app(message, context):
        w = message.content.get(wire.ARRAYS)
        sent = wire.unpack(w)["params"].clone() if w else None
        reply = honest(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] in (
            FLIPPERS
        ):
            record = reply.content[wire.ARRAYS]
            theta = wire.unpack(record)["params"]
            record["params"] = wire.TensorArray(sent - S * (theta - sent))
        return reply

    patch.setattr(fl_client.app, "app", app)


def test_robust_means_hold_where_the_plain_one_fails(runner, monkeypatch):
    def accuracy(*strategy: str) -> float:
        result = runner(*SETTINGS, *strategy)
        assert result.code == 0
        assert all(row["replies"] == list(range(10)) for row in result.history)
        return result.summary["accuracy"]

    clean = accuracy("strategy.name=fedavg")
    flip(monkeypatch)
    assert accuracy("strategy.name=fedavg") < clean - 0.20
    for robust in (
        ["strategy.name=flwr:FedMedian"],
        ["strategy.name=flwr:FedTrimmedAvg", "strategy.params=beta=0.2"],
    ):
        assert accuracy(*robust) > clean - 0.02


def poison(patch: pytest.MonkeyPatch) -> None:
    """Client 3 sends honest parameters, but absurd statistics."""
    honest = fl_client.app.app

    def app(message, context):
        reply = honest(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 3:
            record = reply.content["buffers"]
            record["stats"] = wire.TensorArray(wire.unpack(record)["stats"] * 0 - 1e4)
        return reply

    patch.setattr(fl_client.app, "app", app)


@pytest.mark.parametrize(
    ("name", "params"),
    [("FedMedian", ""), ("FedTrimmedAvg", "beta=0.2"), ("Krum", "num_malicious_nodes=1"),
     ("Bulyan", "num_malicious_nodes=1"), ("FedAvg", "")],
)  # fmt: skip
def test_statistics_are_judged_too(runner, monkeypatch, name: str, params: str):
    """With BatchNorm they are as much of the model as its parameters."""
    poison(monkeypatch)
    settings = ["clients.number=8", "data.partition=iid", "run.rounds=2", "train.device=cpu"]
    run = runner(*settings, f"strategy.name=flwr:{name}", f"strategy.params={params}")
    assert run.code == 0 and all(row["replies"] == list(range(8)) for row in run.history)
    model = load_file(run.folder / "model.safetensors")
    statistics = [tensor for key, tensor in model.items() if "running" in key]
    assert statistics and all(tensor.dtype == torch.float32 for tensor in statistics)
    worst = max(float(tensor.abs().max()) for tensor in statistics)
    assert worst > 1000 if name == "FedAvg" else worst < 100
