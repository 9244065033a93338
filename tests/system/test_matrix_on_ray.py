"""Methods together, on Flower's simulation: the same bits as in one process."""

from __future__ import annotations

import pytest

CELLS = {
    "scaffold, man": ["strategy.name=scaffold", "regularizers=man"],
    "feddyn, fedalign": ["strategy.name=feddyn", "regularizers=fedalign", "model.name=cnn"],
    "feddc, moon": ["strategy.name=feddc", "regularizers=moon", "model.head=moon"],
    "fedspeed, mixup": ["strategy.name=fedspeed", "regularizers=mixup"],
    "fedsam, proximal": ["strategy.name=fedsam", "regularizers=proximal"],
    "fedasam, man, mixup": ["strategy.name=fedasam", "regularizers=man,mixup"],
    "mofedsam, stochastic depth": [
        "strategy.name=mofedsam",
        "regularizers=stochastic-depth",
        "model.name=resnet8",
    ],
    "fednova, gradaug": ["strategy.name=fednova", "regularizers=gradaug", "model.name=resnet8"],
}


@pytest.mark.long
@pytest.mark.parametrize("name", CELLS)
def test_a_cell_is_the_same_on_ray(name: str, runner):
    settings = [
        "clients.number=4", "clients.per-round=2", "run.rounds=3", "train.device=cpu",
        "train.lr=0.02", *CELLS[name],
    ]  # fmt: skip
    here, there = (runner(*settings, f"engine.name={engine}") for engine in ("inprocess", "ray"))
    assert here.code == there.code == 0
    assert here.summary["model_sha256"] == there.summary["model_sha256"]
    assert here.history_less_times == there.history_less_times
