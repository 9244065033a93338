"""Models and data of one's own, named "package.module:Name"."""

from __future__ import annotations

import pytest
import torch

from fl_common.data.sources import load

MODULE = '''
import numpy as np
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, shape, classes):
        super().__init__(nn.Linear(shape[0], 16), nn.ReLU(), nn.Linear(16, classes))

class Partly(nn.Module):
    """A frozen layer, one that is never used, and one that learns."""

    def __init__(self, shape, classes):
        super().__init__()
        self.frozen = nn.Linear(shape[0], 16).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        return self.fc(self.frozen(x).relu())

class Raising(nn.Module):
    def __init__(self, shape, classes):
        raise KeyError("no such layer")

class Masked(Net):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.insert(1, nn.BatchNorm1d(16))
        self.register_buffer("kept", torch.ones(16, dtype=torch.bool))

class Narrow(Net):
    def forward(self, x):
        return super().forward(x[:, :3] if self.training else x)

def load(path, seed):
    """Two classes told apart by the sign of the sum of five features."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 5)).astype(np.float32)
    y = (x.sum(1) > 0).astype(np.int64)
    return (x[:300], y[:300]), (x[300:], y[300:]), ("negative", "positive")

def broken(path, seed):
    return (np.zeros((3, 2)), np.zeros(3)), (np.zeros((3, 2)), np.zeros(3)), ("a", "b")

def from_one(path, seed):
    (x, y), test, classes = load(path, seed)
    return (x, y + 1), test, classes

def regression(path, seed):
    (x, y), test, classes = load(path, seed)
    return (x, x.sum(1)), test, classes

def nobody(path, seed):
    train, (x, y), classes = load(path, seed)
    return train, (x[:0], y[:0]), classes

def unseeded(path, seed):
    return load(path, None)

def raising(path, seed):
    raise OSError(f"no measurements in {path}")

def locked(path, seed):
    """As pandas gives them."""
    train, test, classes = load(path, seed)
    for array in (*train, *test):
        array.flags.writeable = False
    return train, test, classes

def views(path, seed):
    """Samples from the last to the first, labels as a column of a table."""
    (x, y), test, classes = load(path, seed)
    table = np.zeros(len(y), [("flag", np.uint8), ("label", np.int64)])
    table["label"] = y
    if not path.endswith("copied"):
        return (x[::-1].copy()[::-1], table["label"]), test, classes
    return (x, y), test, classes

def lacking(path, seed):
    return {}['column']

def empty(path, seed):
    pass

def unknown(path, seed):
    train, test, classes = load(path, seed)
    train[0][2, :3] = np.nan, np.inf, -np.inf
    return train, test, classes

def channels_last(path, seed):
    part = np.zeros((6, 8, 8, 3), np.uint8), np.zeros(6, np.int64)
    return part, part, ("a", "b")

def number_of_classes(path, seed):
    return *load(path, seed)[:2], 2

def wider_test(path, seed):
    train, (x, y), classes = load(path, seed)
    return train, (np.concatenate([x, x], 1), y), classes

def zeros(path, seed):
    shape = tuple(map(int, path.split("x")))
    part = np.zeros((6, *shape), np.uint8), np.zeros(6, np.int64)
    return part, part, ("a", "b")

def larger_tokens(path, seed):
    y = np.zeros(6, np.int64)
    return (np.zeros((6, 8), np.uint8), y), (np.full((6, 8), 300), y), ("a", "b")
'''
LACKING = "    return {}['column']"
LINES = {line: i for i, line in enumerate(MODULE.splitlines(), 1)}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_research.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("x = 1\ndef load()\n    pass\n")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("raise RuntimeError('not today')\n")
    (tmp_path / "my_lacking").mkdir()
    (tmp_path / "my_lacking" / "__init__.py").write_text("import scipi\n")
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
        (["model.name=my_reserch:Net"], "no module my_reserch can be imported"),
        (["data.source=my_reserch:load"], "no module my_reserch can be imported"),
        (["model.name=my_package.mine:Net"], '"my_package.mine:Net": RuntimeError: not today (/'),
        (["data.source=my_package.mine:load"], '"my_package.mine:load": RuntimeError: not today'),
        (["model.name=my_lacking.mine:Net"], "ModuleNotFoundError: No module named 'scipi' (/"),
        (["data.source=my_lacking.mine:load"], "ModuleNotFoundError: No module named 'scipi' (/"),
        (["data.source=my_lacking.:load"], "no module my_lacking. can be imported"),
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
        ("my_research:lacking", "data.source = my_research:lacking: KeyError: 'column' (/"),
        ("my_research:lacking", f"my_research.py:{LINES[LACKING]})"),
        ("my_research:empty", "returned NoneType"),
        ("my_research:empty", "it must return ((x, y), (x, y), classes)"),
        ("my_research:from_one", "labels from 1 to 2; of 2 classes they must lie in 0..1"),
        ("my_research:regression", "it must be int64 (300,), the number of each sample's class"),
        ("my_research:nobody", "test has no samples"),
        ("my_research:unseeded", "gives other samples each time it is called"),
        ("my_research:unknown", "3 of 1500 values of train x are NaN or infinite"),
        ("my_research:channels_last", "give (n, C, H, W)"),
        ("my_research:number_of_classes", "returned tuple ('int' object is not iterable); it must"),
        ("my_research:wider_test", "train x is float32 (300, 5), test x float32 (100, 10); give"),
        ("my_research:larger_tokens", "train x is uint8 (6, 8), test x int64 (6, 8); give samples"),
        ("my_broken:load", "data.source = my_broken:load: SyntaxError: expected ':' (/"),
        ("my_broken:load", "my_broken.py:2)"),
    ],
)
def test_data_that_are_not_as_they_must_be(mine, source, words, runner):
    result = runner(f"data.source={source}", "model.name=mlp", "data.path=/measurements")
    assert result.code == 3
    assert words in result.summary["error"]


def initial_model():
    import my_research
    import torch

    from fl_common.determinism import seed_of

    torch.manual_seed(seed_of("init", 0))
    return my_research.Partly(shape=(5,), classes=2).state_dict()


@pytest.mark.parametrize("method", [[], ["strategy.name=fedprox"], ["regularizers=proximal"]])
def test_frozen_and_unused_parameters(method, mine, runner):
    result = runner(
        "model.name=my_research:Partly",
        "data.source=my_research:load",
        "clients.number=2",
        "data.partition=iid",
        "run.rounds=3",
        "train.momentum=0.9",
        *method,
    )
    assert result.code == 0
    before = initial_model()
    after = result.model
    for name in ("frozen.weight", "frozen.bias", "unused.weight", "unused.bias"):
        assert (after[name] == before[name]).all(), name
    assert (after["fc.weight"] != before["fc.weight"]).any()


def test_a_fingerprint_knows_the_shape(mine):
    shapes = ("16", "1x2x8", "1x8x2", "1x4x4")
    found = {load("my_research:zeros", shape).fingerprint for shape in shapes}
    assert len(found) == len(shapes)


def test_a_model_that_cannot_be_made(mine, runner):
    result = runner("model.name=my_research:Raising", "data.source=my_research:load")
    assert result.code == 3
    line = LINES['        raise KeyError("no such layer")']
    told = result.summary["error"]
    assert told.startswith("model.name = my_research:Raising: KeyError: 'no such layer' (/")
    assert told.endswith(f"my_research.py:{line})")


def test_buffers_of_several_dtypes(mine, runner, capsys):
    result = runner("model.name=my_research:Masked", "data.source=my_research:load")
    assert result.code == 3
    assert result.summary["error"] == (
        "model.name = my_research:Masked: its integer buffers are not of one dtype: kept is "
        "torch.bool, 1.num_batches_tracked is torch.int64; give them one, or persistent=False to "
        "those that never change"
    )
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["engine.workers=1", "engine.workers=2", "engine.cohort=3"])
def test_a_model_that_fails_in_training(engine, mine, runner):
    runner.always = ["run.pictures=false", engine]
    settings = ("model.name=my_research:Narrow", "data.source=my_research:load", "clients.number=3")
    result = runner(*settings)
    assert result.code == 3
    line = LINES["        return super().forward(x[:, :3] if self.training else x)"]
    assert "clients 0, 1, 2: RuntimeError: mat1 and mat2" in result.summary["error"]
    assert result.summary["error"].endswith(f"my_research.py:{line})")


def test_arrays_that_are_not_to_be_written(mine, runner, recwarn):
    torch.set_warn_always(True)
    result = runner("data.source=my_research:locked", "model.name=mlp")
    torch.set_warn_always(False)
    assert result.code == 0
    assert not [w for w in recwarn if "not writable" in str(w.message)]


def test_views_that_torch_does_not_take(mine, runner):
    settings = ("data.source=my_research:views", "model.name=mlp", "clients.number=2")
    results = [runner(*settings, f"data.path={path}") for path in ("", "copied")]
    assert [result.code for result in results] == [0, 0]
    assert results[0].summary["data_sha256"] == results[1].summary["data_sha256"]
    assert results[0].summary["model_sha256"] == results[1].summary["model_sha256"]
