"""What a run leaves, and that it is right: files, sums, and models computed here by hand.

`BIAS` is a model whose logits are one vector b, whatever the sample. With a batch that holds a
whole partition the gradient of client i is softmax(b) - labels_i / n_i, where labels_i are the
label counts in clients.json: NumPy then gives the model of a whole federated run in a few lines.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import tracemalloc
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits

from fl_common.config import resolve
from fl_common.fingerprint import code_sha256
from fl_server import recorder
from fl_server.checkpoint import code_of
from fl_server.cli import main
from fl_server.recorder import Recorder

FLATFED = Path(sys.executable).with_name("flatfed")

# conv3 1-16, norm 16, conv3 16-32, norm 32, 512-10: the default model, parameters by hand
DIGITS_CNN = (9 * 16 + 16) + 2 * 16 + (16 * 9 * 32 + 32) + 2 * 32 + (512 * 10 + 10)
# and of its two BatchNorms mean and variance, and an int64 counter each
DIGITS_CNN_BYTES = DIGITS_CNN * 4 + 2 * (16 + 32) * 4 + 2 * 8

SMALL = ["clients.number=4", "clients.per-round=2", "run.rounds=2"]


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def strict(text: str) -> Any:
    """JSON as RFC 8259 has it: NaN and Infinity are no numbers."""

    def refuse(name: str):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def png(file: Path) -> np.ndarray:
    """Pixels of a picture that is a PNG and not blank."""
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) >= 100
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) >= 10
    return pixels


def label_picture(folder: Path) -> np.ndarray:
    others = [file for file in folder.glob("*.png") if file.name != "curves.png"]
    assert len(others) == 1, others
    return png(others[0])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a small run, to compare others with."""
    base = tmp_path_factory.mktemp("plain")
    assert main(["run", *SMALL, f"run.output-dir={base}", "run.name=plain"]) == 0
    return base / "plain"


def sha(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["model_sha256"]


def finite(model: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in model.values())


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`own_model(source)` is the `model.name` of class Net in that source."""
    names: list[str] = []

    def write(source: str) -> str:
        names.append(f"own_net_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv(
            "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        )
        return f"{names[-1]}:Net"

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("net", "why"),
    [
        ("Sequential(Flatten(), Linear(64, 3))", r"\(1, 3\) of one .* logits \(1, 10\)"),
        ("Linear(8, 10)", r"makes \(1, 1, 8, 10\) of"),
        ("Sequential(Flatten(), Linear(7, 10))", "RuntimeError: mat1"),
        ("Flatten()", "no parameter"),
    ],
)
def test_a_model_that_does_not_fit_the_data_ends_the_run_before_it_begins(
    runner, own_model, net: str, why: str
):
    source = f"from torch.nn import *\n\n\ndef Net(shape, classes):\n    return {net}\n"
    done = runner("run.rounds=1", f"model.name={own_model(source)}")
    assert done.code == 3
    assert re.search(f"^model.name = own_net_0:Net: .*{why}", done.summary["error"])
    assert not (done.folder / "history.jsonl").exists()


def test_every_file_and_every_key(runner, capsys):
    runner.always = []
    began, cpu = time.perf_counter(), time.process_time()
    done = runner("run.rounds=3", "clients.per-round=4", "regularizers=proximal", "run.seed=3")
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    said = capsys.readouterr().out
    assert done.code == 0

    # the place is printed at start and end
    place = [n for n, line in enumerate(said.splitlines()) if str(done.folder) in line]
    assert place[0] == 0
    assert place[-1] == len(said.splitlines()) - 1

    summary = strict((done.folder / "summary.json").read_text())
    rows = [strict(line) for line in (done.folder / "history.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["loss"] < math.inf
        assert 0 < row["client_loss"] < math.inf
        assert len(row["cohort"]) == 4
        assert 0 < row["seconds"] < wall
        assert row["bytes_up"] == row["bytes_down"] == DIGITS_CNN_BYTES * 4

    assert summary["strategy"] == "fedavg"
    assert summary["regularizers"] == ["proximal"]
    assert summary["engine"] == "inprocess"
    assert summary["seed"] == 3
    assert summary["rounds"] == 3
    assert summary["clients"] == 10
    assert summary["status"] == "completed"
    assert summary["accuracy"] == rows[-1]["accuracy"]
    assert summary["loss"] == rows[-1]["loss"]
    assert summary["best_accuracy"] == max(row["accuracy"] for row in rows)
    assert summary["bytes_up"] == summary["bytes_down"] == DIGITS_CNN_BYTES * 4 * 3
    assert sum(row["seconds"] for row in rows) - 0.01 <= summary["wall_s"] <= wall + 0.01
    assert 0 < summary["cpu_s"] <= cpu + 0.01
    assert re.fullmatch(r"cpu \(\d+ processors?, \S.*\)", summary["device"])
    assert summary["versions"]["flwr"] == version("flwr")
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["code"] == code_sha256()
    assert re.fullmatch("[0-9a-f]{64}", summary["model_sha256"])

    png(done.folder / "curves.png")
    label_picture(done.folder)
    shutil.rmtree(done.folder / "checkpoints")  # a suite's table still knows the code
    assert code_of(done.folder) == code_sha256()


def test_the_device_has_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    told = {"auto": "Card 0 (cuda:0)", "cuda:0": "Card 0 (cuda:0)", "cuda:1": "cuda:1",
            "cpu": "cpu (1 processor, EPYC)"}  # fmt: skip
    monkeypatch.setattr(recorder.machine, "processor", lambda: "EPYC")
    for name, device in told.items():  # there is no second card, which the roll call says
        config = resolve({"train.device": name})
        written = Recorder(tmp_path / name.replace(":", ""))
        written.begin(config, config.flat(), "inprocess")
        assert written.summary["device"] == device


def test_a_client_that_says_that_it_worked_for_ages_ends_nothing(tmp_path):
    """Two whose seconds are finite and whose sum is not."""
    config = resolve({})
    recorder = Recorder(tmp_path / "run")
    recorder.begin(config, config.flat(), "inprocess")
    row = {"accuracy": 0.5, "loss": 1.0, "bytes_up": 5, "bytes_down": 6, "cohort": [0, 1]}
    recorder.row(row | {"round": 1, "client_cpu_s": 1e308 + 1e308})
    recorder.row(row | {"round": 2, "client_cpu_s": 0.5})
    assert len((recorder.folder / "history.jsonl").read_text().splitlines()) == 2


def test_what_rounds_say_of_every_client_is_on_the_disk_alone(tmp_path):
    """Not in the memory of a run of thousands of rounds."""
    config = resolve({})
    recorder = Recorder(tmp_path / "run")
    recorder.begin(config, config.flat(), "inprocess")

    def play(first: int, last: int) -> None:
        for number in range(first, last):
            of_clients = {str(name): number + name / 7 for name in range(1000)}
            refused = {"7": f"no reply in round {number}"} if number == 3 else {}
            row = {"round": number, "cohort": list(range(1000)), "failed": refused}
            row |= {"accuracy": number / 100, "loss": 1.0, "bytes_up": 5, "bytes_down": 6}
            recorder.row(row | {"client_cpu_s": 0.5, "client_accuracy": of_clients})

    play(1, 11)
    tracemalloc.start()
    try:
        play(11, 31)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken < 20 * 4096
    stored = (recorder.folder / "history.jsonl").read_text().splitlines()
    assert [len(strict(line)["client_accuracy"]) for line in stored] == [1000] * 30
    assert "1 no answer" in recorder.shown() and "0.3000" in recorder.shown()
    recorder.clients_apart = lambda: True
    assert recorder.facts()["cpu_s"] >= 15


def test_best_accuracy_is_the_maximum(runner):
    """Clients of two classes each, one at a time: accuracy goes up and down."""
    settings = "data.partition=pathological", "clients.per-round=1", "run.rounds=4", "run.seed=4"
    done = runner(*settings)
    accuracies = [row["accuracy"] for row in done.history]
    assert max(accuracies) > accuracies[-1], "the case has power"
    assert done.summary["best_accuracy"] == max(accuracies)
    assert done.summary["accuracy"] == accuracies[-1]


def test_config_holds_every_key_resolved(runner, capsys):
    runner.always = []
    assert main(["config"]) == 0
    defaults = flat(tomllib.loads(capsys.readouterr().out))
    done = runner(*SMALL, "train.lr=0.05", "train.nesterov=true", "train.momentum=0.5")
    kept = flat(strict((done.folder / "config.json").read_text()))
    assert set(kept) == set(defaults)
    given = {
        "run.output-dir": str(done.folder.parent),
        "run.name": done.folder.name,
        "clients.number": 4,
        "clients.per-round": 2,
        "run.rounds": 2,
        "train.lr": 0.05,
        "train.nesterov": True,
        "train.momentum": 0.5,
    }
    assert kept == defaults | given
    assert {key: type(value) for key, value in kept.items()} == {
        key: type(value) for key, value in defaults.items()
    }


def test_a_run_repeats_from_its_config(runner):
    first = runner(*SMALL, "train.momentum=0.5", "run.seed=11", "data.alpha=0.1")
    runner.always = []
    kept = flat(json.loads((first.folder / "config.json").read_text()))
    settings = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in kept.items()
        if key not in ("run.name", "run.output-dir")
    ]
    second = runner(*settings)
    assert second.summary["model_sha256"] == first.summary["model_sha256"]


def test_model_sha256_recomputed(runner, own_model):
    """Per tensor, in name order: `name:dtype:(shape);`, dtype as NumPy spells it, then bytes."""
    for settings in (["clients.per-round=2"], [f"model.name={own_model(BATCH_NORM)}"]):
        done = runner("run.rounds=1", "clients.number=4", *settings)
        digest = hashlib.sha256()
        with safe_open(done.folder / "model.safetensors", "numpy") as file:
            for name in sorted(file.keys()):
                array = file.get_tensor(name)
                digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
                digest.update(array.tobytes())
        assert digest.hexdigest() == done.summary["model_sha256"]


def test_the_model_loads_into_the_network(runner, own_model):
    """model.safetensors has a state dict's own names and shapes, buffers included."""
    name = own_model(BATCH_NORM)
    done = runner(*SMALL, f"model.name={name}")
    module = __import__(name.partition(":")[0])
    net = module.Net((1, 8, 8), 10)
    net.load_state_dict(done.model, strict=True)
    assert done.model["body.1.num_batches_tracked"].dtype == torch.int64


BATCH_NORM = """
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes)
        )

    def forward(self, x):
        return self.body(x)
"""


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 4), ("float64", 8)])
def test_bytes_are_numel_times_itemsize_of_what_travels(runner, own_model, dtype, itemsize):
    """conv 4 x 9 + 4, norm 2 x 4, statistics 2 x 4, linear 144 x 10 + 10, an int64 counter."""
    done = runner(
        f"model.name={own_model(BATCH_NORM)}",
        f"train.dtype={dtype}",
        "clients.number=5",
        "clients.per-round=3",
        "run.rounds=2",
    )
    one = (40 + 8 + 8 + 1450) * itemsize + 8
    assert sum(t.numel() * t.element_size() for t in done.model.values()) == one
    assert [row["bytes_up"] for row in done.history] == [3 * one] * 2
    assert [row["bytes_down"] for row in done.history] == [3 * one] * 2
    assert done.summary["bytes_up"] == done.summary["bytes_down"] == 6 * one
    assert finite(done.model)


def test_pictures_show_their_run(plain, runner):
    runner.always = []
    other = runner(*SMALL, "train.epochs=3", "data.partition=iid").folder
    curves = [png(folder / "curves.png") for folder in (plain, other)]
    labels = [label_picture(folder) for folder in (plain, other)]
    assert curves[0].shape != curves[1].shape or (curves[0] != curves[1]).any()
    assert labels[0].shape != labels[1].shape or (labels[0] != labels[1]).any()


def test_empty_name_is_a_timestamp(tmp_path: Path, capsys):
    before = time.strftime("%Y%m%d-%H%M")
    for _ in range(2):
        assert main(["run", *SMALL, "run.pictures=false", f"run.output-dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    for folder in folders:
        digits = re.sub(r"\D", "", folder.name)
        assert len(digits) >= 14
        assert re.sub(r"\D", "", before) <= digits[:12] <= time.strftime("%Y%m%d%H%M")
        assert json.loads((folder / "config.json").read_text())["run.name"] == folder.name
        assert str(folder) in said


def test_empty_output_dir_is_results_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *SMALL, "run.pictures=false", "run.name=mine"]) == 0
    assert (tmp_path / "results" / "mine" / "summary.json").exists()


def test_relative_paths_are_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        for label in ("cat", "dog"):
            place = tmp_path / "images" / part / label
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    settings = ["data.source=folder", "data.path=images", "data.partition=iid", *SMALL]
    place = ["run.output-dir=out", "run.name=mine", "run.pictures=false"]
    assert main(["run", *settings, *place]) == 0
    kept = json.loads((tmp_path / "out" / "mine" / "config.json").read_text())
    assert kept["data.path"] == str(tmp_path / "images")
    assert kept["run.output-dir"] == str(tmp_path / "out")


def test_equal_seeds_give_equal_models(runner):
    first, again, other = (runner(*SMALL, f"run.seed={seed}") for seed in (4, 4, 5))
    assert first.summary["model_sha256"] == again.summary["model_sha256"]
    assert first.history_less_times == again.history_less_times
    model, repeated = ((r.folder / "model.safetensors").read_bytes() for r in (first, again))
    assert model == repeated
    assert first.summary["model_sha256"] != other.summary["model_sha256"]


def test_a_longer_run_begins_like_a_shorter_one(runner):
    """The draws of a round depend on (seed, round), not on how many rounds there will be."""
    short = runner("clients.per-round=3", "run.rounds=3")
    long = runner("clients.per-round=3", "run.rounds=6")
    assert long.history_less_times[:3] == short.history_less_times


def test_fixed_cohorts(runner):
    done = runner("clients.per-round=3", "run.rounds=12", "eval.every=100")
    cohorts = [row["cohort"] for row in done.history]
    for cohort in cohorts:
        assert cohort == sorted(set(cohort))
        assert len(cohort) == 3
        assert set(cohort) <= set(range(10))
    assert len({tuple(cohort) for cohort in cohorts}) >= 8
    assert {client for cohort in cohorts for client in cohort} == set(range(10))
    expected = DIGITS_CNN_BYTES * 3
    assert {(row["bytes_up"], row["bytes_down"]) for row in done.history} == {(expected, expected)}


def test_bernoulli_cohorts_vary_and_are_never_empty(runner):
    """Each of 10 clients with probability 0.1: one cohort in three is drawn again."""
    done = runner(
        "clients.sampling=bernoulli", "clients.per-round=1", "run.rounds=40", "eval.every=100"
    )
    assert done.code == 0
    cohorts = [row["cohort"] for row in done.history]
    sizes = [len(cohort) for cohort in cohorts]
    assert len(sizes) == 40
    assert min(sizes) == 1
    assert max(sizes) >= 2
    # The mean of a binomial(10, 0.1) that is not 0: 1 / (1 - 0.9^10) = 1.54; deviation 0.76.
    assert abs(sum(sizes) / 40 - 1.54) < 4 * 0.76 / math.sqrt(40)
    for row in done.history:
        assert row["cohort"] == sorted(set(row["cohort"]))
        assert row["bytes_up"] == DIGITS_CNN_BYTES * len(row["cohort"])
    assert done.summary["bytes_up"] == DIGITS_CNN_BYTES * sum(sizes)


def test_a_cohort_may_be_smaller_than_the_replies_that_are_asked_for(runner):
    done = runner(
        "clients.sampling=bernoulli", "clients.per-round=2", "clients.min-replies=2",
        "clients.deadline-s=2", "data.max-samples=8", "run.rounds=8", "eval.every=8",
    )  # fmt: skip
    assert done.code == 0
    assert min(len(row["cohort"]) for row in done.history) == 1
    assert all(row["client_loss"] is not None for row in done.history)


@pytest.mark.parametrize(
    ("sampling", "per_round"), [("fixed", 0), ("bernoulli", 0), ("bernoulli", 4)]
)
def test_a_cohort_of_all(runner, sampling: str, per_round: int):
    settings = [f"clients.sampling={sampling}", f"clients.per-round={per_round}"]
    done = runner("clients.number=4", "run.rounds=2", *settings)
    assert [row["cohort"] for row in done.history] == [[0, 1, 2, 3]] * 2


def test_evaluation_every_third_round_and_the_last(runner):
    often = runner("clients.per-round=2", "run.rounds=7")
    runner.always = []
    rarely = runner("clients.per-round=2", "run.rounds=7", "eval.every=3")
    rows = rarely.history
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    for key in ("accuracy", "loss"):
        known = {row["round"]: row[key] for row in rows if row.get(key) is not None}
        assert sorted(known) == [3, 6, 7]
        assert known == {n: often.history[n - 1][key] for n in (3, 6, 7)}
    assert rarely.summary["model_sha256"] == often.summary["model_sha256"]
    assert rarely.summary["accuracy"] == rows[6]["accuracy"]
    assert rarely.summary["best_accuracy"] == max(rows[n]["accuracy"] for n in (2, 5, 6))
    png(rarely.folder / "curves.png")


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def test_default_config_learns_the_digits(tmp_path: Path):
    """In 90 s: CPU seconds, since what else the machine does is not the product's."""
    before = cpu_seconds()
    assert main(["run", f"run.output-dir={tmp_path}", "run.name=default"]) == 0
    seconds = cpu_seconds() - before
    summary = json.loads((tmp_path / "default" / "summary.json").read_text())
    print(f"default: accuracy {summary['accuracy']:.4f} in {seconds:.1f} CPU s")
    assert summary["accuracy"] >= 0.95
    assert seconds <= 90


def test_breast_cancer_with_an_mlp(runner):
    done = runner("data.source=breast-cancer", "model.name=mlp", "clients.number=5")
    assert done.code == 0
    assert done.summary["accuracy"] > 0.9


@pytest.mark.parametrize(
    "settings",
    [
        ["train.lr-decay=0.5"],
        ["train.momentum=0.9"],
        ["train.momentum=0.9", "train.nesterov=true"],
        ["train.optimizer=adam", "train.lr=0.01"],
        ["train.clip-norm=0.1"],
        ["train.weight-decay=0.01"],
        ["train.epochs=2"],
        ["train.batch-size=16"],
        ["train.dtype=bfloat16"],
        ["train.dtype=float64"],
        ["train.lr=0.05"],
        ["strategy.name=fedprox", "fedprox.mu=0.1"],
        ["regularizers=proximal", "proximal.mu=0.1"],
        ["model.name=mlp"],
    ],
    ids=lambda settings: " ".join(settings),
)
def test_every_option_changes_a_finite_result(plain, runner, settings: list[str]):
    done = runner(*SMALL, *settings)
    assert done.code == 0
    assert sha(done.folder) != sha(plain)
    assert finite(done.model)
    assert math.isfinite(done.summary["loss"])


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy.name=fedprox", "fedprox.mu=0"],
        ["regularizers=proximal", "proximal.mu=0"],
        ["train.clip-norm=1e9"],
        ["train.keep-optimizer=true"],
    ],
    ids=lambda settings: " ".join(settings),
)
def test_what_has_no_effect_changes_no_bit(plain, runner, settings: list[str]):
    assert sha(runner(*SMALL, *settings).folder) == sha(plain)


def test_lr_decay_begins_with_the_second_round(runner):
    small = ["clients.number=4", "clients.per-round=2", "run.rounds=1"]
    done, decayed = runner(*small), runner(*small, "train.lr-decay=0.5")
    assert sha(done.folder) == sha(decayed.folder)


@pytest.mark.parametrize("model", ["digits-cnn", "resnet8"])
def test_normalisation_is_the_one_asked_for(runner, model: str):
    """What config.json says of the layers is what was trained."""
    batch, group = (
        runner(f"model.name={model}", "clients.per-round=1", "run.rounds=1", f"model.norm={norm}")
        for norm in ("batch", "group")
    )
    assert any(name.endswith("running_mean") for name in batch.model)
    assert not any(name.endswith("running_mean") for name in group.model)


def test_fedprox_with_mu_0_is_fedavg(runner, own_model):
    """BatchNorm's buffers, momentum and clipping are in the case, not the plain path alone."""
    settings = [
        f"model.name={own_model(BATCH_NORM)}",
        "clients.per-round=4",
        "run.rounds=3",
        "train.momentum=0.5",
        "train.clip-norm=1",
    ]
    avg = runner(*settings, "strategy.name=fedavg")
    prox = runner(*settings, "strategy.name=fedprox", "fedprox.mu=0")
    pulled = runner(*settings, "strategy.name=fedprox", "fedprox.mu=0.0001")
    assert prox.summary["model_sha256"] == avg.summary["model_sha256"]
    assert prox.history_less_times == avg.history_less_times
    assert pulled.summary["model_sha256"] != avg.summary["model_sha256"]
    assert prox.summary["strategy"] == "fedprox"


def test_fedprox_is_fedavg_with_the_regularizer_proximal(runner):
    strategy = runner(*SMALL, "strategy.name=fedprox", "fedprox.mu=0.3")
    regularizer = runner(*SMALL, "regularizers=proximal", "proximal.mu=0.3")
    assert strategy.summary["model_sha256"] == regularizer.summary["model_sha256"]


@pytest.mark.parametrize("optimizer", ["train.momentum=0.9", "train.optimizer=adam"])
def test_a_kept_optimizer_differs_from_a_fresh_one(runner, optimizer: str):
    settings = ["clients.number=3", "run.rounds=3", "train.batch-size=200", optimizer]
    fresh, kept = runner(*settings), runner(*settings, "train.keep-optimizer=true")
    again = runner(*settings, "train.keep-optimizer=true")
    assert kept.history[0]["accuracy"] == fresh.history[0]["accuracy"], (
        "round 1 has nothing to keep"
    )
    assert kept.summary["model_sha256"] != fresh.summary["model_sha256"]
    assert kept.summary["model_sha256"] == again.summary["model_sha256"]


@pytest.mark.parametrize("optimizer", ["train.momentum=0.9", "train.optimizer=adam"])
def test_a_kept_optimizer_is_the_same_from_the_disk_in_any_order_in_memory(
    runner, tmp_path: Path, optimizer: str
):
    settings = ["clients.number=3", "run.rounds=2", "train.batch-size=200", "train.device=cpu"]
    settings += [optimizer, "train.keep-optimizer=true", "train.channels-last=on"]
    on_disk, in_memory = runner(*settings, f"client.state-dir={tmp_path}"), runner(*settings)
    assert on_disk.summary["model_sha256"] == in_memory.summary["model_sha256"]


def clients(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Sizes (N,) and label counts (N, classes) of the partitions."""
    record = json.loads((folder / "clients.json").read_text())
    return np.array(record["samples"]), np.array(record["label_counts"])


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "dirichlet-balanced", "pathological"])
def test_every_partition(runner, partition: str):
    done = runner(f"data.partition={partition}", "run.rounds=1", "data.alpha=0.3")
    sizes, labels = clients(done.folder)
    assert done.code == 0
    assert finite(done.model)
    assert labels.shape == (10, 10)
    assert (labels.sum(1) == sizes).all()
    if partition != "dirichlet-balanced":
        assert sizes.sum() == 1438, "each training sample is somebody's"
    if partition == "iid":
        assert np.ptp(sizes) <= 1
        assert (labels > 0).all()
    if partition == "dirichlet":
        assert sizes.min() >= 10
        assert len(set(sizes)) > 5
    if partition == "dirichlet-balanced":
        assert np.ptp(sizes) <= 1
        assert abs(int(sizes.sum()) - 1438) < 10
    if partition == "pathological":
        assert ((labels > 0).sum(1) == 2).all()
    if partition.startswith("dirichlet"):
        shares = labels / sizes[:, None]
        assert shares.max() > 0.3, "alpha 0.3 makes clients unlike"


def test_pathological_where_each_class_has_one_client(runner):
    """Five clients of two classes can hold all ten: then they do."""
    done = runner("data.partition=pathological", "clients.number=5", "run.rounds=1")
    assert done.code == 0
    _, labels = clients(done.folder)
    assert ((labels > 0).sum(1) == 2).all()
    assert ((labels > 0).sum(0) == 1).all()


BIAS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.b = nn.Parameter(torch.arange(classes) / 8 - 0.5)

    def forward(self, x):
        return self.b.expand(len(x), -1)
"""


START = np.arange(10) / 8 - 0.5  # exact in float32


def softmax(b: np.ndarray) -> np.ndarray:
    e = np.exp(b - b.max())
    return e / e.sum()


def cross_entropy(b: np.ndarray, labels: np.ndarray) -> float:
    return float(-(labels * np.log(softmax(b))).sum() / labels.sum())


def by_hand(
    labels: np.ndarray,
    cohorts: list[list[int]],
    *,
    lr: float,
    lr_decay: float = 1.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    adam: bool = False,
    weight_decay: float = 0.0,
    clip_norm: float = math.inf,
    epochs: int = 1,
    mu: float = 0.0,
    keep: bool = False,
) -> list[np.ndarray]:
    """The global b after each round: one full-batch step per epoch, FedAvg's weights n_i."""
    w = START
    memory: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
    models = []
    for number, cohort in enumerate(cohorts):
        eta = lr * lr_decay**number
        total = 0.0
        for i in cohort:
            theta = w.copy()
            m, v, t = memory.get(i, (np.zeros(10), np.zeros(10), 0)) if keep else (0.0, 0.0, 0)
            for _ in range(epochs):
                g = softmax(theta) - labels[i] / labels[i].sum() + mu * (theta - w)
                g = g * min(1.0, clip_norm / np.linalg.norm(g)) + weight_decay * theta
                t += 1
                if adam:
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                    step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
                else:
                    m = momentum * m + g
                    step = g + momentum * m if nesterov else m
                theta = theta - eta * step
            memory[i] = (m, v, t)
            total = total + labels[i].sum() * theta
        w = total / sum(labels[i].sum() for i in cohort)
        models.append(w)
    return models


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ([], {}),
        (["train.epochs=3"], {"epochs": 3}),
        (["train.lr-decay=0.5"], {"lr_decay": 0.5}),
        (["train.momentum=0.9", "train.epochs=3"], {"momentum": 0.9, "epochs": 3}),
        (
            ["train.momentum=0.9", "train.nesterov=true", "train.epochs=3"],
            {"momentum": 0.9, "nesterov": True, "epochs": 3},
        ),
        (
            ["train.momentum=0.9", "train.keep-optimizer=true"],
            {"momentum": 0.9, "keep": True},
        ),
        (["train.optimizer=adam", "train.epochs=2"], {"adam": True, "epochs": 2}),
        (
            ["train.optimizer=adam", "train.keep-optimizer=true", "train.weight-decay=0.1"],
            {"adam": True, "keep": True, "weight_decay": 0.1},
        ),
        (["train.weight-decay=0.2"], {"weight_decay": 0.2}),
        (["train.clip-norm=0.2"], {"clip_norm": 0.2}),
        (
            ["train.clip-norm=0.2", "train.weight-decay=0.2"],
            {"clip_norm": 0.2, "weight_decay": 0.2},
        ),
        (
            ["strategy.name=fedprox", "fedprox.mu=0.7", "train.epochs=4"],
            {"mu": 0.7, "epochs": 4},
        ),
        (
            ["regularizers=proximal", "proximal.mu=0.7", "train.epochs=4", "train.clip-norm=0.3"],
            {"mu": 0.7, "epochs": 4, "clip_norm": 0.3},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_whole_run_by_hand(runner, own_model, settings: list[str], rule: dict):
    done = runner(
        f"model.name={own_model(BIAS)}",
        "train.dtype=float64",
        "train.lr=0.7",
        "train.batch-size=2000",
        "clients.number=6",
        "clients.per-round=4",
        "run.rounds=4",
        *settings,
    )
    assert done.code == 0
    _, labels = clients(done.folder)
    rows = done.history
    expected = by_hand(labels, [row["cohort"] for row in rows], lr=0.7, **rule)

    # torch adds 1e-6 to the norm that it clips by
    atol = 1e-5 if "clip_norm" in rule else 1e-12
    np.testing.assert_allclose(done.model["b"].numpy(), expected[-1], rtol=0, atol=atol)

    # The test set is what no client holds.
    test = np.bincount(load_digits().target, minlength=10) - labels.sum(0)
    for row, b in zip(rows, expected, strict=True):
        assert row["accuracy"] == pytest.approx(test[b.argmax()] / test.sum(), abs=1e-9)
        assert row["loss"] == pytest.approx(cross_entropy(b, test), abs=1e-5)

    if rule.get("epochs", 1) == 1:  # the clients' loss is that of the model they received
        for row, b in zip(rows, [START, *expected], strict=False):
            weights = [labels[i].sum() for i in row["cohort"]]
            losses = [cross_entropy(b, labels[i]) for i in row["cohort"]]
            assert row["client_loss"] == pytest.approx(np.average(losses, weights=weights))


FAILING = """
from torch import nn

class Net(nn.Module):
    steps = 0

    def __init__(self, shape, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

    def forward(self, x):
        if self.training:
            Net.steps += 1
            if Net.steps > 5:
                raise {what}
        return self.body(x)
"""

# two clients, one step each per round: round 3 is the one that fails, at its second client
FAILING_RUN = ["clients.number=2", "train.batch-size=2000", "run.rounds=6"]


def test_an_interrupted_run_leaves_its_history(runner, own_model):
    name = own_model(FAILING.format(what="KeyboardInterrupt"))
    code = None
    try:
        code = runner(f"model.name={name}", *FAILING_RUN, "clients.min-replies=1").code
    except (KeyboardInterrupt, SystemExit) as stop:
        code = getattr(stop, "code", 130)
    assert code not in (0, 2, None)
    folder = runner.base / "run1"
    summary = strict((folder / "summary.json").read_text())
    rows = [strict(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert summary["status"] == "failed"
    assert [row["round"] for row in rows] == [1, 2]
    assert summary["rounds"] == 2
    assert (folder / "config.json").exists()


def test_clients_that_fail_end_the_run(runner, own_model, capsys):
    name = own_model(FAILING.format(what="RuntimeError('no such luck')"))
    done = runner(f"model.name={name}", *FAILING_RUN, "clients.min-replies=2")
    out, err = capsys.readouterr()
    assert done.code == 3
    assert done.summary["status"] == "failed"
    assert [row["round"] for row in done.history[:2]] == [1, 2]
    message = "\n".join(line for line in (out + err).splitlines() if "no such luck" in line)
    assert "round 3" in message
    assert "client 1" in message


def test_a_diverging_run_writes_json(runner):
    """NaN is no JSON: a strict reader must get through what a failed training left."""
    done = runner(*SMALL, "train.lr=1e30")
    assert done.code in (0, 3)
    strict((done.folder / "summary.json").read_text())
    for line in (done.folder / "history.jsonl").read_text().splitlines():
        strict(line)


def test_ctrl_c(tmp_path: Path):
    """SIGINT to the process: it ends soon, not as a success, and the rounds so far are kept."""
    folder = tmp_path / "mine"
    settings = [f"run.output-dir={tmp_path}", "run.name=mine", "run.rounds=100000"]
    settings.append("run.pictures=false")
    with subprocess.Popen(
        [FLATFED, "run", *settings, "clients.per-round=1", "eval.every=100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job inherits an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            history = folder / "history.jsonl"
            limit = time.monotonic() + 120
            while not (history.exists() and history.read_text().count("\n") >= 3):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < limit
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode not in (0, 2)
    assert "Traceback" not in err
    summary = strict((folder / "summary.json").read_text())
    rows = [strict(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert summary["status"] == "failed"
    assert len(rows) >= 3
    assert summary["rounds"] == len(rows)
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_twice_ends_a_run_once(tmp_path: Path, number):
    """As `timeout` sends it, and Linux to a cell whose suite was killed: the second comes while the
    first one's results are written."""
    code = f"""
import os, signal
from fl_server.cli import entry_point
from fl_server.recorder import Recorder

row, close = Recorder.row, Recorder._close

def told(self, values, **more):
    row(self, values, **more)
    if len(self.rows) == 2:
        os.kill(os.getpid(), signal.{number})

def ends(self):
    os.kill(os.getpid(), signal.{number})
    return close(self)

Recorder.row, Recorder._close = told, ends
entry_point()
"""
    # A shell's background job inherits an ignored SIGINT.
    heeding = ("import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
               "os.execv(sys.argv[1], sys.argv[1:])")  # fmt: skip
    command = [sys.executable, "-c", heeding, sys.executable, "-c", code, "run"]
    settings = [f"run.output-dir={tmp_path}", "run.name=mine", "clients.number=2"]
    settings.append("run.pictures=false")
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=120)
    summary = strict((tmp_path / "mine" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("failed", 2)
    assert summary["error"] == {"SIGINT": "interrupted", "SIGTERM": "stopped"}[number]
    assert done.returncode == {"SIGINT": 130, "SIGTERM": 143}[number]
    assert "Traceback" not in done.stderr


def test_a_completed_run_that_is_ended_at_its_pictures_stays_completed(
    tmp_path, monkeypatch, capsys
):
    def ended(self) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "_draw", ended)
    settings = [f"run.output-dir={tmp_path}", "run.name=my run", "clients.number=2"]
    assert main(["run", "run.rounds=1", *settings]) == 130
    folder = tmp_path / "my run"
    summary = strict((folder / "summary.json").read_text())
    assert summary["status"] == "completed" and (folder / "model.safetensors").exists()
    told = capsys.readouterr().out
    assert told.endswith(
        "interrupted while the pictures were drawn; the results are complete, and\n"
        f"flatfed report '{folder}' draws them\n"
    )
    monkeypatch.undo()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()


def test_a_run_is_marked_as_ended_only_if_its_process_did_not(tmp_path, monkeypatch):
    """It may write its end while one looks."""
    told = {"status": "failed", "error": "stopped", "rounds": 3}
    lock = recorder._lock

    def released(folder: Path):
        (folder / "summary.json").write_text(json.dumps(told))
        return lock(folder)

    (tmp_path / "summary.json").write_text('{"status": "running"}')
    monkeypatch.setattr(recorder, "_lock", released)
    recorder.ended(tmp_path, "interrupted")
    assert recorder.read_summary(tmp_path) == told


def test_a_run_is_not_marked_as_ended_while_its_process_is_at_work(tmp_path: Path):
    """Whoever asks may wait for the end of one that was told to stop, and ends without a word."""
    (tmp_path / "summary.json").write_text('{"status": "running"}')
    code = f"""
import sys
from pathlib import Path
from fl_server.recorder import _lock
held = _lock(Path({str(tmp_path)!r}))
print("held", flush=True)
sys.stdin.read(1)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        recorder.ended(tmp_path, "interrupted")
        recorder.ended(tmp_path, "interrupted", wait=0.1)
        assert recorder.read_summary(tmp_path) == {"status": "running"}
        ending = threading.Timer(0.5, other.kill)
        ending.start()
        recorder.ended(tmp_path, "interrupted", wait=60)
    told = {"status": "failed", "error": "interrupted"}
    assert recorder.read_summary(tmp_path) == told


@pytest.mark.parametrize("call", ["row", "_close"])
def test_a_stopped_run_says_so_although_flower_ends_its_process_by_force(tmp_path, call):
    """In a ServerApp's process: Flower's handler of the signal takes longer than Flower waits.  The
    signal may come when a refused call has already ended the rounds, and their end is written."""
    code = f"""
import os, signal, time
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
from flwr.supercore.exit import exit as ending, register_signal_handlers
from flwr.supercore.telemetry import EventType
import fl_server.app
from fl_server.cli import entry_point
from fl_server.recorder import Recorder

row, close = Recorder.row, Recorder._close

def told(self, values, **more):
    row(self, values, **more)
    if len(self.rows) == 2:
        if "{call}" == "row":
            stop()
        raise OSError("401 Unauthorized")

def closed(self):
    stop()
    return close(self)

def stop():
    leave = EventType.FLWR_SERVERAPP_RUN_LEAVE
    register_signal_handlers(leave, exit_handlers=[lambda: time.sleep(60)])
    os.kill(os.getpid(), signal.SIGTERM)

Recorder.row, Recorder._close = told, closed
ending.FORCE_EXIT_TIMEOUT_SECONDS = 0.2
fl_server.app.ENGINES = {{}}
entry_point()
"""
    settings = [f"run.output-dir={tmp_path}", "run.name=mine", "clients.number=2"]
    command = [sys.executable, "-c", code, "run", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr  # Flower's own, of a process that it stopped
    assert "run failed" not in done.stdout  # nothing of ours ran after the signal
    summary = strict((tmp_path / "mine" / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "stopped")
    assert (summary["rounds"], "accuracy" in summary) == (2, True)


def test_what_rounds_do_not_need_is_not_in_memory_while_they_run(runner, tmp_path):
    """From a warm cache; the pictures are drawn, and matplotlib is loaded, after the last round."""
    assert runner("run.rounds=1").code == 0
    code = """
import sys
from fl_server.cli import main
from fl_server.recorder import Recorder

row = Recorder.row

def look(self, values, **more):
    loaded = {"datasets", "sklearn", "matplotlib"} & set(sys.modules)
    assert not loaded, loaded
    row(self, values, **more)

Recorder.row = look
code = main(["run", "run.rounds=2", f"run.output-dir={sys.argv[1]}", "run.name=lean"])
assert "matplotlib" in sys.modules
sys.exit(code)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_every_run_leaves_its_page(plain):
    text = (plain / "report.html").read_text()
    assert sha(plain) in text
    assert list((plain / "report").glob("*.png"))


def test_a_run_without_room_for_its_pictures_is_completed(tmp_path, monkeypatch, capsys):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "curves.png")

    monkeypatch.setattr("fl_report.plots.curves", full)
    place = [f"run.output-dir={tmp_path}", "run.name=mine", "engine.workers=1"]
    assert main(["run", *place, *SMALL]) == 0
    assert strict((tmp_path / "mine" / "summary.json").read_text())["status"] == "completed"
    told = "pictures and report.html: [Errno 28] No space left on device: 'curves.png'\n"
    assert told in capsys.readouterr().out
