"""What a run is put together from: its device, the order of images and convolutions in memory."""

from __future__ import annotations

import pytest
import torch

from fl_common import assembly
from fl_common.config import resolve

CASES = [
    ("auto", "bfloat16", "cuda", "lenet", True),
    ("auto", "float32", "cuda", "lenet", False),
    ("auto", "bfloat16", "cpu", "lenet", False),
    ("auto", "float32", "cpu", "lenet", True),
    ("auto", "float64", "cpu", "lenet", False),
    ("auto", "float32", "cpu", "resnet8", False),
    ("auto", "float32", "cpu", "tests.own_nets:Net", False),
    ("off", "float32", "cpu", "lenet", False),
    ("auto", "bfloat16", "cuda", "tests.own_nets:Net", False),
    ("on", "float32", "cpu", "tests.own_nets:Net", True),
    ("off", "bfloat16", "cuda", "lenet", False),
]


@pytest.mark.parametrize("order, dtype, device, model, expected", CASES)
def test_whose_channels_lie_innermost(order, dtype, device, model, expected):
    config = resolve({"data.source": "synthetic"})
    train = config.train.model_copy(update={"channels_last": order, "dtype": dtype})
    own = config.model.model_copy(update={"name": model})
    config = config.model_copy(update={"train": train, "model": own})
    assert assembly.innermost(config, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "cuda"),
        ({"engine.name": "grpc"}, "cuda"),
        ({"engine.name": "ray", "engine.client-gpus": 0.25}, "cuda"),
        ({"engine.name": "ray"}, "cpu"),
    ],
)
def test_auto_is_a_card_that_the_run_has_a_share_of(settings: dict, expected: str, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert assembly.training_device(resolve(settings)).type == expected
