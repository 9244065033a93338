"""All bfloat16 copies of weights at once: the bits of autocast's own, in fewer operations."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch.profiler import profile

from fl_client import trainer
from fl_client.halves import copies
from fl_common import wire
from fl_common.config import Train
from fl_common.models.layers import Chain
from tests.fl_client.test_cohort import Federation, difference

CASES = {
    "digits-cnn": {"model__name": "digits-cnn"},
    "BatchNorm": {"model__name": "digits-cnn", "model__norm": "batch"},
    "resnet18": {"model__name": "resnet18", "model__norm": "group", "shape": (3, 8, 8)},
    "dropout": {"model__name": "cnn"},
    "linear layers": {"model__name": "mlp"},
    "channels last": {"train__channels_last": "on"},
    "sam": {"regularizers": "sam"},
    "man": {"regularizers": "man"},
    "mixup": {"regularizers": "mixup"},
    "clipped momentum": {"train__momentum": 0.9, "train__clip_norm": 0.5},
    "scaffold": {"strategy__name": "scaffold"},
    "passes again": {"regularizers": "gradaug", "model__name": "resnet8", "shape": (3, 16, 16)},
}


def federation(patch: pytest.MonkeyPatch, **settings) -> Federation:
    return Federation(patch, (10, 6), train__dtype="bfloat16", **settings)


@pytest.mark.parametrize("case", CASES)
def test_bits_are_autocasts(case, monkeypatch):
    clients = federation(monkeypatch, **CASES[case])
    with_halves = clients.alone(clients.messages(), clients.states())
    used, halved = [], trainer.halved
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "halved", lambda *a: used.extend(halved(*a)) or {})
        without = clients.alone(clients.messages(), clients.states())
    assert bool(used) == (case != "passes again")
    for one, other in zip(with_halves, without, strict=True):
        assert difference(one, other) == 0


@pytest.mark.parametrize("group", [0, 2, -1])
def test_bits_of_partial_rounds_are_autocasts(group, monkeypatch):
    settings = {"strategy__name": "fedpart", "model__name": "resnet8", "shape": (3, 8, 8)}
    clients = federation(monkeypatch, **settings, run__rounds=100)
    active = {wire.ACTIVE: [("stem.conv", "stages.1.0.conv1", "fc")[group]]}
    one = clients.alone(clients.messages(**active), clients.states())
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "halved", lambda *_: {})
        other = clients.alone(clients.messages(**active), clients.states())
    assert max(map(difference, one, other)) == 0


def test_no_gradient_of_a_frozen_weight_is_computed():
    params = {name: torch.randn(3, requires_grad=name != "frozen") for name in ("one", "frozen")}
    found = copies(params)
    assert {name: half.requires_grad for name, half in found.items()} == {
        "one": True,
        "frozen": False,
    }
    (found["one"] * found["frozen"]).sum().backward()
    assert params["one"].grad.dtype == torch.float32
    assert params["frozen"].grad is None


def test_no_weight_is_copied_by_itself(monkeypatch):
    clients = federation(monkeypatch, model__name="resnet18", model__norm="group", shape=(3, 8, 8))

    def casts() -> int:
        with profile() as made:
            clients.clients.train(0, clients.messages()[0], clients.states()[0])
        return sum(event.count for event in made.key_averages() if event.key == "aten::_to_copy")

    few = casts()
    monkeypatch.setattr(trainer, "halved", lambda *_: {})
    weights = sum(p.dim() > 1 for p in clients.clients.net.parameters()) + 1  # fc's bias
    steps = 4
    assert casts() - few == 2 * steps * weights


def test_a_network_of_ones_own_is_left_alone():
    settings, known = Train(dtype="bfloat16"), Chain([("fc", torch.nn.Linear(3, 2))])
    own = torch.nn.Sequential(OrderedDict(fc=torch.nn.Linear(3, 2)))
    assert list(trainer.halved(known, settings, [])) == ["fc.weight", "fc.bias"]
    assert trainer.halved(own, settings, []) == {}
    assert trainer.halved(known, Train(), []) == {}
