"""Models and data of one's own, named "package.module:Name"."""

from __future__ import annotations

import pytest

MODULE = '''
import numpy as np
from torch import nn

class Net(nn.Sequential):
    def __init__(self, shape, classes):
        super().__init__(nn.Linear(shape[0], 16), nn.ReLU(), nn.Linear(16, classes))

def load(path, seed):
    """Two classes told apart by the sign of the sum of five features."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 5)).astype(np.float32)
    y = (x.sum(1) > 0).astype(np.int64)
    return (x[:300], y[:300]), (x[300:], y[300:]), ("negative", "positive")

def broken(path, seed):
    return (np.zeros((3, 2)), np.zeros(3)), (np.zeros((3, 2)), np.zeros(3)), ("a", "b")

def raising(path, seed):
    raise OSError(f"no measurements in {path}")
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_research.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_own_model_on_own_data(mine, runner):
    result = runner(
        "model.name=my_research:Net", "data.source=my_research:load", "data.partition=iid",
        "clients.number=3", "run.rounds=10", "train.epochs=3",
    )  # fmt: skip
    assert result.code == 0
    assert result.summary["accuracy"] > 0.9
    assert result.model["0.weight"].shape == (16, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.name=my_reserch:Net"], "no module 'my_reserch' can be imported"),
        (["data.source=my_reserch:load"], "no module my_reserch can be imported"),
        (["model.name=my_research:Net", "model.norm=group"], "chooses its own norm layers"),
        (["data.source=my_research:load", "data.augment=moon"], "has default, none, crop-flip"),
    ],
)
def test_mistakes_that_show_before_a_run(mine, settings, words, runner, capsys):
    assert runner(*settings).code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("my_research:nothing", "has no attribute 'nothing'"),
        ("my_research:broken", "it must be uint8 images (n, C, H, W) or float32 features"),
        ("my_research:raising", "no measurements in"),
    ],
)
def test_data_that_are_not_as_they_must_be(mine, source, words, runner):
    result = runner(f"data.source={source}", "model.name=mlp", "data.path=/measurements")
    assert result.code == 3
    assert words in result.summary["error"]
