"""What a run is put together from: the order of images and convolutions in memory."""

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
