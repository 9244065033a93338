"""`tracking.to`: what trackers have of a run is its history, and they change nothing of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flwr.app import Message
from flwr.common import Error
from numpy import float32
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray

import fl_client.app
from fl_common.config import resolve
from fl_server.cli import main
from fl_server.tracking import OPEN, Tracking, numbers_of, settings_of

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = ["clients.number=3", "train.device=cpu", "run.rounds=3", "data.max-samples=60"]

STAND_IN = '''
"""A `wandb` that writes down what it is told, and fails at a round if asked to."""
import json, os

class Settings:
    def __init__(self, **given):
        assert given == {"console": "off", "silent": True}

class Run:
    def __init__(self, given):
        self.path = os.path.join(given["dir"], "told.jsonl")
        before = [json.loads(line) for line in open(self.path)] if os.path.exists(self.path) else []
        steps = [step for what, step, _ in before if what == "log"]
        self.resumed, self.step = bool(steps), max(steps, default=-1) + 1
        self.summary = self
        self.tell("init", given["id"], {k: given[k] for k in ("project", "name", "resume")})

    def tell(self, *what):
        with open(self.path, "a") as file:
            file.write(json.dumps(what) + "\\n")

    def log(self, numbers, step):
        if str(step) == os.environ.get("STAND_IN_FAILS_AT"):
            raise ConnectionError("the server is gone\\nand more")
        self.tell("log", step, numbers)

    def update(self, summary):
        self.tell("summary", summary["rounds"], summary)

    def finish(self, exit_code):
        self.tell("finish", exit_code, None)

def init(settings, config, **given):
    return Run(given)
'''


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The stand-in's records of a run, instead of the real one, which needs a server."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda folder: [json.loads(line) for line in (folder / "told.jsonl").open()]
    sys.modules.pop("wandb", None)


def events(folder: Path) -> tuple[EventAccumulator, dict[str, list[tuple[int, float]]]]:
    """The event files of a folder, and steps and values by tag of what is a number."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    curves = {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }
    return read, curves


def column(
    history: list[dict[str, Any]], key: str, kind: Callable[[float], float] = float
) -> list[tuple[int, float]]:
    return [(row["round"], float(kind(row[key]))) for row in history if row.get(key) is not None]


def without_newest_checkpoint(folder: Path) -> None:
    """As if the process had been killed before it wrote that."""
    *_, older, newest = sorted((folder / "checkpoints").iterdir())
    assert older.name.startswith("000002") and newest.name.startswith("000003")
    newest.unlink()


def test_event_files_have_every_number_of_the_history(runner):
    more = [*SMALL, "eval.every=2", "eval.on=both", "eval.grad-norm=true", "flatness.every=3",
            "flatness.samples=16", "flatness.tolerance=0.5", "flatness.probes=2"]  # fmt: skip
    tracked, plain = runner(*more, "tracking.to=tensorboard"), runner(*more)
    assert tracked.summary["model_sha256"] == plain.summary["model_sha256"]
    assert tracked.history_less_times == plain.history_less_times
    assert not list(plain.folder.glob("events*"))
    history = tracked.history
    read, curves = events(tracked.folder)
    single = {k for row in history for k, v in row.items() if isinstance(v, float | int)}
    assert {"loss", "client_loss", "bytes_up", "seconds", "lambda_max", "trace"} <= single
    for key in single - {"round"}:
        assert curves[key] == column(history, key, float32)
    assert curves["accuracy"][0][0] == 2  # the first evaluation
    assert curves["replies"] == [(1, 3), (2, 3), (3, 3)] and curves["rejected"][2] == (3, 0)
    assert curves["client_accuracy_after"] == [
        (t, float32(sum(row["client_accuracy_after"].values()) / 3))
        for t, row in enumerate(history, 1)
        if t > 1
    ]
    norms = history[2]["grad_norm"]["all"]
    assert curves["grad_norm/all"][2] == (3, float32(sum(norms) / len(norms)))
    (summary,) = read.Tensors("summary/text_summary")
    told = make_ndarray(summary.tensor_proto).item().decode()
    assert json.loads(told) == tracked.summary
    starts = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(starts).session_start_info.hparams
    assert found["train.lr"].number_value == 0.1
    assert found["strategy.name"].string_value == "fedavg"
    assert read.SummaryMetadata("_hparams_/session_end_info")


def test_a_resumed_curve_goes_on_without_a_step_twice(runner):
    """Round 3 is told, lost in a crash, and played again."""
    first = runner(*SMALL, "server.checkpoint-every=2", "tracking.to=tensorboard")
    without_newest_checkpoint(first.folder)
    assert main(["resume", str(first.folder), "run.rounds=5"]) == 0
    assert len(list(first.folder.glob("events*"))) == 2
    _, curves = events(first.folder)
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4, 5]
    assert curves["loss"] == column(first.history, "loss", float32)
    assert curves["seconds"] == column(first.history, "seconds", float32)


def test_a_run_may_be_told_from_its_resume_on(runner):
    first = runner(*SMALL)
    assert main(["resume", str(first.folder), "run.rounds=4", "tracking.to=tensorboard"]) == 0
    assert events(first.folder)[1]["loss"] == column(first.history, "loss", float32)
    assert first.history[-1]["round"] == 4


def test_a_tracker_that_keeps_its_run_is_told_new_rounds_only(runner, wandb):
    first = runner(*SMALL, "server.checkpoint-every=2", "tracking.to=wandb")
    without_newest_checkpoint(first.folder)
    assert main(["resume", str(first.folder), "run.rounds=5"]) == 0
    told = wandb(first.folder)
    named = {"project": "flatfed", "name": "run1", "resume": "allow"}
    assert [what for what in told if what[0] == "init"] == 2 * [
        ["init", first.summary["experiment"], named]
    ]
    assert [step for what, step, _ in told if what == "log"] == [1, 2, 3, 4, 5]
    assert [n["loss"] for what, _, n in told if what == "log"] == [
        row["loss"] for row in first.history
    ]
    assert [step for what, step, _ in told if what == "summary"] == [3, 5]
    assert told[-1] == ["finish", 0, None]


def test_one_that_fails_is_told_of_once_and_left_out(runner, wandb, monkeypatch, capsys):
    plain = runner(*SMALL)
    capsys.readouterr()
    monkeypatch.setenv("STAND_IN_FAILS_AT", "2")
    result = runner(*SMALL, "tracking.to=wandb,tensorboard")
    out = capsys.readouterr().out
    assert result.code == 0 and result.summary["model_sha256"] == plain.summary["model_sha256"]
    assert out.count("warning: tracking") == 1
    assert (
        "warning: tracking.to = wandb: ConnectionError: the server is gone; the run goes on "
        "without it\n"
    ) in out
    assert [step for what, step, _ in wandb(result.folder) if what == "log"] == [1]
    assert events(result.folder)[1]["loss"] == column(result.history, "loss", float32)


def test_an_error_without_text_is_told_by_its_class(tmp_path, monkeypatch):
    def fails(*_):
        raise TimeoutError

    told: list[str] = []
    monkeypatch.setitem(OPEN, "wandb", fails)
    Tracking(resolve({"tracking.to": "wandb"}), tmp_path, "x", [], told.append)
    assert told == ["warning: tracking.to = wandb: TimeoutError; the run goes on without it"]


def test_a_failed_run_is_closed_as_failed(runner, wandb):
    result = runner(*SMALL, "train.lr=1e30", "tracking.to=wandb,tensorboard")
    assert result.code == 3 and result.summary["status"] == "failed"
    assert wandb(result.folder)[-1] == ["finish", 1, None]
    read, _ = events(result.folder)
    (summary,) = read.Tensors("summary/text_summary")
    assert b'"status": "failed"' in make_ndarray(summary.tensor_proto).item()


def test_the_round_that_ended_a_run_is_told_when_it_is_played_again(runner, wandb):
    honest = fl_client.app.app

    def refuses(message, context):
        if message.content["config"].get("server-round") == 2:
            return Message(Error(2, "gone"), reply_to=message)
        return honest(message, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fl_client.app, "app", refuses)
        result = runner(*SMALL, "tracking.to=wandb")
    assert result.code == 3 and [row["round"] for row in result.history] == [1, 2]
    assert main(["resume", str(result.folder)]) == 0
    told = [(step, numbers) for what, step, numbers in wandb(result.folder) if what == "log"]
    assert [(step, numbers["replies"]) for step, numbers in told] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("to", "line"),
    [
        ("tensorbord", '"tensorbord": unknown; did you mean tensorboard? known: tensorboard, '),
        ("wandb,wandb", '"wandb,wandb": wandb is given twice; give it once'),
        ("mlflow", '"mlflow": it is not installed where the server runs; pip install mlflow, or'),
        ("tensorboard", "pip install 'flatfed[tracking]', or leave it out"),
    ],
)
def test_what_cannot_be_told_is_refused_before_the_run(runner, monkeypatch, capsys, to, line):
    from importlib import util

    there = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name: None if name in ("mlflow", "tensorboard") else there(name)
    )
    result = runner(*SMALL, f"tracking.to={to}")
    assert result.code == 2 and not result.folder.exists()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and line in err


def test_numbers_of_a_row_by_hand():
    row = {
        "round": 3, "cohort": [4, 7], "replies": [4], "failed": {"7": "gone"}, "rejected": {},
        "loss": None, "accuracy": 0.5, "client_accuracy": {"4": 0.25},
        "client_accuracy_before": {"4": 0.25, "7": 0.75}, "grad_norm": {"fc": [1.0, 2.0]},
        "layers": [{"layer": "fc", "kind": "Linear", "trace": 2.5}], "flatness_error": "zero",
    }  # fmt: skip
    assert numbers_of(row) == {
        "cohort": 2, "replies": 1, "failed": 1, "rejected": 0, "accuracy": 0.5,
        "client_accuracy_before": 0.5, "grad_norm/fc": 1.5, "layers/fc/trace": 2.5,
    }  # fmt: skip


def test_settings_of_methods_that_take_no_part_are_left_out():
    from fl_common.config import resolve

    config = resolve({"strategy.name": "fedprox", "regularizers": "man"})
    groups = {key.partition(".")[0] for key in settings_of(config)}
    assert {"fedprox", "man", "train", "regularizers"} <= groups
    assert not {"feddyn", "moon"} & groups


def test_mlflow_finds_its_run_again(runner):
    """With the real one, where it is installed."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed here")
    first = runner(*SMALL, "server.checkpoint-every=2", "tracking.to=mlflow")
    without_newest_checkpoint(first.folder)
    assert main(["resume", str(first.folder), "run.rounds=5"]) == 0
    client = mlflow.MlflowClient(f"sqlite:///{first.folder.parent / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("flatfed").experiment_id])
    told = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in told] == column(first.history, "loss")
    assert run.info.status == "FINISHED" and run.data.params["run.rounds"] == "3"
    assert run.data.tags["model_sha256"] == first.summary["model_sha256"]
