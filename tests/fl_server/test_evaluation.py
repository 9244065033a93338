"""Evaluation on the clients' own data, and clients that each hold their own folder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fl_server.evaluator
import fl_server.inprocess
from fl_common import assembly
from fl_common.config import resolve
from fl_common.evaluation import evaluate
from fl_server import run_commands
from fl_server.evaluator import Evaluator
from fl_server.inprocess import InProcessGrid

BASE = ["clients.number=5", "run.rounds=3", "train.device=cpu"]


def test_clients_evaluate_on_samples_that_they_do_not_train_on(runner):
    alone = runner(*BASE)
    result = runner(*BASE, "eval.on=clients", "eval.holdout=0.25")
    assert result.code == 0
    whole, rest = (json.loads((r.folder / "clients.json").read_text()) for r in (alone, result))
    assert rest["samples"] == [n - max(1, round(0.25 * n)) for n in whole["samples"]]
    assert [sum(counts) for counts in rest["label_counts"]] == rest["samples"]
    held_out = [w - r for w, r in zip(whole["samples"], rest["samples"], strict=True)]
    for row in result.history:
        accuracies = row["client_accuracy"]
        assert list(accuracies) == ["0", "1", "2", "3", "4"]
        for client, accuracy in accuracies.items():
            right = accuracy * held_out[int(client)]
            assert right == pytest.approx(round(right), abs=1e-9)
        values = list(accuracies.values())
        assert row["client_accuracy_mean"] == pytest.approx(sum(values) / 5)
        assert row["client_accuracy_worst_decile"] == min(values)
        weighted = sum(a * n for a, n in zip(values, held_out, strict=True)) / sum(held_out)
        assert row["accuracy"] == pytest.approx(weighted)
        assert set(row["client_accuracy_before"]) == set(row["client_accuracy_after"])
    # What a client has before training in round t + 1 is the global model of round t.
    first, second = result.history[:2]
    assert second["client_accuracy_before"] == first["client_accuracy"]
    mean = {k: np.mean(list(first[f"client_accuracy_{k}"].values())) for k in ("before", "after")}
    assert mean["after"] > mean["before"]


@pytest.mark.parametrize(("number", "tenth"), [(25, 3), (20, 2)])
def test_worst_decile_of_many_clients(runner, number: int, tenth: int):
    result = runner(
        f"clients.number={number}", "clients.per-round=2", "run.rounds=1", "data.partition=iid",
        "eval.on=both", "train.epochs=3", "train.device=cpu",
    )  # fmt: skip
    row = result.history[0]
    worst = sorted(row["client_accuracy"].values())[:tenth]
    assert worst[0] < worst[-1]
    assert row["client_accuracy_worst_decile"] == pytest.approx(sum(worst) / tenth)
    assert len(row["client_accuracy_after"]) == 2


def test_both_keeps_the_servers_accuracy(runner):
    settings = [*BASE, "train.epochs=2"]
    both = runner(*settings, "eval.on=both")
    clients = runner(*settings, "eval.on=clients")
    assert both.summary["model_sha256"] == clients.summary["model_sha256"]
    assert both.history[-1]["client_accuracy"] == clients.history[-1]["client_accuracy"]
    right = both.history[-1]["accuracy"] * 359  # the test set of digits
    assert right == pytest.approx(round(right), abs=1e-9)


def test_evaluating_changes_no_bit_of_training(runner):
    """Dropout and BatchNorm too: evaluation draws nothing and leaves statistics alone."""
    settings = [*BASE, "model.name=resnet8", "eval.on=clients", "data.max-samples=40"]
    often = runner(*settings)
    seldom = runner(*settings, "eval.every=3")
    assert often.summary["model_sha256"] == seldom.summary["model_sha256"]
    assert "accuracy" not in seldom.history[0]
    assert "client_accuracy_before" not in seldom.history[0]


@pytest.mark.parametrize("channels_last", ["off", "on"])
def test_a_network_that_was_put_away_comes_back_in_its_order_in_memory(
    monkeypatch: pytest.MonkeyPatch, channels_last: str
):
    """A server that trains nobody, as on gRPC, evaluates as one that does."""
    config = resolve({"train.device": "cpu", "train.channels-last": channels_last})
    data = assembly.load_data(config)
    first = SimpleNamespace(classes=data.classes, shape=assembly.input_shape(config, data))
    evaluator = Evaluator(config, first, torch.device("cpu"), 1)
    evaluator.load_data(first)
    model, seen = evaluator.model(), []

    def look(net, *others):
        convolutions = [p for p in net.parameters() if p.dim() == 4 and p.shape[1] > 1]
        assert convolutions
        orders = {p.is_contiguous(memory_format=torch.channels_last) for p in convolutions}
        seen.append((orders, {name: t.stride() for name, t in net.state_dict().items()}))
        return evaluate(net, *others)

    monkeypatch.setattr(fl_server.evaluator, "evaluate", look)
    before = evaluator.evaluate(model)
    evaluator.put_away()
    assert evaluator.evaluate(model) == before
    assert seen[0] == seen[1]
    assert seen[0][0] == {channels_last == "on"}


def picture_folders(tmp_path, classes_of):
    """One folder of images per hospital: train/ and test/ by class, sizes unequal."""
    rng = np.random.default_rng(0)
    for i, classes in enumerate(classes_of):
        for part, count in (("train", 20 + 7 * i), ("test", 5 + i)):
            for label, name in enumerate(classes):
                place = tmp_path / f"hospital{i}" / part / name
                place.mkdir(parents=True)
                for k in range(count):
                    pixels = rng.integers(0, 100, (12, 12, 3)).astype(np.uint8)
                    pixels[:, :, label] += 120
                    Image.fromarray(pixels).save(place / f"{k}.png")
    return [str(tmp_path / f"hospital{i}") for i in range(len(classes_of))]


def own_data(monkeypatch, folders):
    """Every node of the in-process grid gets its own `data-path`, as `--node-config` gives it."""

    class Nodes(InProcessGrid):
        def __init__(self, *args):
            super().__init__(*args)
            for context, folder in zip(self._contexts.values(), folders, strict=True):
                context.node_config["data-path"] = folder

    monkeypatch.setattr(fl_server.inprocess, "InProcessGrid", Nodes)
    monkeypatch.setattr(run_commands, "_run_grpc", run_commands._run_inprocess)


LOCAL = [
    "engine.name=grpc", "data.source=folder", "data.partition=local", "clients.number=3",
    "model.name=cnn", "run.rounds=4", "eval.on=clients", "train.device=cpu", "train.lr=0.05",
    "train.epochs=3",
]  # fmt: skip


def test_three_nodes_with_three_folders(tmp_path, runner, monkeypatch):
    folders = picture_folders(tmp_path, [("benign", "malignant", "other")] * 3)
    own_data(monkeypatch, folders)
    result = runner(*LOCAL)
    assert result.code == 0
    table = json.loads((result.folder / "clients.json").read_text())
    assert table["classes"] == ["benign", "malignant", "other"]
    assert table["samples"] == [60, 81, 102]
    last = result.history[-1]
    assert last["accuracy"] > 0.9
    for i, (_, accuracy) in enumerate(sorted(last["client_accuracy"].items())):
        right = accuracy * 3 * (5 + i)
        assert right == pytest.approx(round(right), abs=1e-9)


def test_the_servers_own_test_set_beside_local_data(tmp_path, runner, monkeypatch):
    folders = picture_folders(tmp_path, [("a", "b")] * 3)
    own_data(monkeypatch, folders)
    settings = [s for s in LOCAL if not s.startswith("eval.on")]
    result = runner(*settings, f"data.path={folders[0]}", "eval.on=server")
    assert result.code == 0
    assert "client_accuracy" not in result.history[-1]
    assert json.loads((result.folder / "clients.json").read_text())["samples"] == [40, 54, 68]


def test_nodes_with_one_and_the_same_folder_are_refused(tmp_path, runner, monkeypatch):
    (folder,) = picture_folders(tmp_path, [("a", "b")])
    own_data(monkeypatch, [folder] * 3)
    result = runner(*LOCAL)
    assert result.code == 3
    assert "all clients hold the same data" in result.summary["error"]


def test_two_nodes_on_one_folder_are_told(tmp_path, runner, monkeypatch, capsys):
    one, other, third = picture_folders(tmp_path, [("a", "b")] * 3)
    settings = ["run.rounds=1" if s.startswith("run.rounds") else s for s in LOCAL]
    for folders, told in (([one, other, one], 1), ([one, other, third], 0)):
        own_data(monkeypatch, folders)
        assert runner(*settings).code == 0
        line = "warning: clients 0, 2 hold the same data, which counts once for each; give each"
        assert capsys.readouterr().out.count(line) == told


def test_partitions_of_different_data_sets_are_refused(tmp_path, runner, monkeypatch):
    own_data(monkeypatch, picture_folders(tmp_path, [("a", "b")] * 3))
    settings = [s for s in LOCAL if not s.startswith("data.partition")]
    result = runner(*settings, "data.partition=iid", f"data.path={tmp_path / 'hospital0'}")
    assert result.code == 3
    assert "client 1 has another data set than client 0" in result.summary["error"]


def test_other_class_names_are_refused_with_the_reason(tmp_path, runner, monkeypatch):
    names = ("benign", "malignant")
    own_data(monkeypatch, picture_folders(tmp_path, [names, names, ("benign", "tumour")]))
    result = runner(*LOCAL)
    assert result.code == 3
    error = result.summary["error"]
    assert "clients.number = 3, but 2 can take part" in error
    assert "(benign, tumour) differ from client 0's (benign, malignant)" in error


def test_a_node_without_data_says_so(tmp_path, runner, monkeypatch):
    folders = picture_folders(tmp_path, [("a", "b")] * 2)
    own_data(monkeypatch, [*folders, str(tmp_path / "nowhere")])
    result = runner(*LOCAL)
    assert result.code == 3
    assert "nowhere does not exist" in result.summary["error"]


def test_an_unknown_key_of_a_node_is_refused(tmp_path, runner, monkeypatch):
    class Nodes(InProcessGrid):
        def __init__(self, *args):
            super().__init__(*args)
            next(iter(self._contexts.values())).node_config["data-paht"] = "/x"

    monkeypatch.setattr(fl_server.inprocess, "InProcessGrid", Nodes)
    result = runner(*BASE)
    assert result.code == 3
    assert (
        "--node-config data-paht: unknown key; did you mean data-path? known: data-path"
        in result.summary["error"]
    )
