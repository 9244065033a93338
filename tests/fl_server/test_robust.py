"""Two of ten clients turn their updates round: robust means hold, the plain one does not."""

from __future__ import annotations

import pytest

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
