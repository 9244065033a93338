"""A mistake costs seconds: one line per error, exit code 2, and nothing was touched."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fl_common.checks import unused
from fl_common.config import ConfigError, from_text, resolve
from fl_report.terminal import text
from fl_server import result_commands
from fl_server.cli import main
from fl_server.console import show

FLATFED = Path(sys.executable).with_name("flatfed")


def started(*args: str) -> int:
    """Exit code of `flatfed args` in this process."""
    try:
        return main(list(args))
    except SystemExit as stop:
        return stop.code


@dataclass(frozen=True)
class Refusal:
    """What the user reads, and what the attempt did besides."""

    lines: list[str]

    def names(self, key: str, *remedies: str) -> None:
        """One line says which key, and holds every remedy (regular expressions)."""
        lines = [line for line in self.lines if re.search(rf"(^|[\s'\"]){re.escape(key)}\b", line)]
        assert lines, f"no line names {key}: {self.lines}"
        for remedy in remedies:
            assert any(re.search(remedy, line) for line in lines), (remedy, lines)


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Refusal]:
    """`refused("train.lr=x")` runs it, expects a refusal, and returns what was printed."""
    monkeypatch.chdir(tmp_path)

    def forbidden(what: str) -> Callable[..., None]:
        def touch(*args, **kwargs):
            touched.append(what)
            raise AssertionError(f"{what} in a run that had to be refused")

        return touch

    touched: list[str] = []
    monkeypatch.setattr(subprocess.Popen, "__init__", forbidden("a process was started"))
    monkeypatch.setattr(os, "fork", forbidden("a process was forked"))
    monkeypatch.setattr(os, "posix_spawn", forbidden("a process was spawned"))

    class NoPort(socket.socket):
        bind = forbidden("a port was opened")

    monkeypatch.setattr(socket, "socket", NoPort)

    def refuse(*args: str, errors: int | None = 1, command: str = "run") -> Refusal:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = started(command, *args)
        out, err = capsys.readouterr()
        assert code == 2, (code, out, err)
        assert "Traceback" not in out + err
        assert out == "", "nothing but the errors is said"
        assert touched == []
        assert sorted(tmp_path.rglob("*")) == before, "the attempt left something behind"
        lines = err.splitlines()
        if errors is not None:
            assert len(lines) == errors, lines
        return Refusal(lines)

    return refuse


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve training and four test images in two classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            place = tmp_path / "images" / part / label
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("setting", "key", "remedies"),
    [
        # wrong type
        ("train.lr=fast", "train.lr", ["fast", "number"]),
        ("train.lr=", "train.lr", ["number"]),
        ("train.epochs=1.5", "train.epochs", ["1.5", "whole number"]),
        ("run.rounds=ten", "run.rounds", ["ten", "whole number"]),
        ("run.rounds=true", "run.rounds", ["whole number"]),
        ("train.nesterov=perhaps", "train.nesterov", ["perhaps", "true or false"]),
        ("train.lr=[0.1]", "train.lr", ["number"]),
        # out of range
        ("data.alpha=0", "data.alpha", ["greater than 0"]),
        ("data.alpha=-0.5", "data.alpha", ["greater than 0"]),
        ("train.lr=0", "train.lr", ["greater than 0"]),
        ("train.lr=nan", "train.lr", ["nan", "finite|number"]),
        ("train.lr=inf", "train.lr", ["inf", "finite|number"]),
        ("train.lr-decay=1.5", "train.lr-decay", ["at most 1"]),
        ("train.momentum=1", "train.momentum", ["less than 1"]),
        ("train.weight-decay=-1", "train.weight-decay", ["at least 0"]),
        ("train.clip-norm=-1", "train.clip-norm", ["at least 0"]),
        ("train.batch-size=0", "train.batch-size", ["at least 1"]),
        ("train.threads=0", "train.threads", ["at least 1"]),
        ("run.rounds=0", "run.rounds", ["at least 1"]),
        ("run.seed=-1", "run.seed", ["at least 0"]),
        ("clients.number=0", "clients.number", ["at least 1"]),
        ("clients.per-round=-1", "clients.per-round", ["at least 0"]),
        ("clients.deadline-s=0", "clients.deadline-s", ["greater than 0"]),
        ("eval.every=0", "eval.every", ["at least 1"]),
        ("fedprox.mu=-1", "fedprox.mu", ["at least 0"]),
        ("feddyn.alpha=0", "feddyn.alpha", ["greater than 0"]),
        ("feddc.alpha=-0.1", "feddc.alpha", ["at least 0"]),
        ("scaffold.eta-g=0", "scaffold.eta-g", ["greater than 0"]),
        ("fedspeed.lambda=0", "fedspeed.lambda", ["greater than 0"]),
        ("fedspeed.rho=-0.1", "fedspeed.rho", ["at least 0"]),
        ("fedspeed.alpha=1.5", "fedspeed.alpha", ["at most 1"]),
        ("mofedsam.beta=0", "mofedsam.beta", ["greater than 0"]),
        ("sam.rho=-0.1", "sam.rho", ["at least 0"]),
        ("asam.eta=-0.1", "asam.eta", ["at least 0"]),
        ("server.checkpoint-every=0", "server.checkpoint-every", ["at least 1"]),
        # none of the choices; the nearest and all are named
        ("train.optimizer=adm", "train.optimizer", ["did you mean adam", r"\bsgd\b"]),
        ("train.dtype=float16", "train.dtype", ["bfloat16", "float32", "float64"]),
        ("train.device=tpu", "train.device", ["cpu", "cuda"]),
        ("train.device=cuda:01", "train.device", ["auto, cpu, cuda or cuda:K"]),
        ("train.device=cuda:128", "train.device", ["auto, cpu, cuda or cuda:K"]),
        ("data.path=~nobody/x", "data.path", ["digits"]),
        ("model.norm=bach", "model.norm", ["did you mean batch", "group"]),
        ("clients.sampling=bernouli", "clients.sampling", ["did you mean bernoulli", "fixed"]),
        ("data.partition=dirichlt", "data.partition", ["did you mean dirichlet", "pathological"]),
        ("data.source=digitz", "data.source", ["did you mean digits", "cifar10", "folder"]),
        ("data.augment=mooon", "data.augment", ["mooon", "none"]),
        ("engine.name=rya", "engine.name", ["did you mean ray", "inprocess"]),
        ("eval.on=moon", "eval.on", ["server"]),
        ("eval.models=cloud,sell", "eval.models", ["did you mean sel", "all, first"]),
        ("scaffold.weighting=omga", "scaffold.weighting", ["did you mean omega", "uniform"]),
        ("feddyn.clip-scope=oficial", "feddyn.clip-scope", ["did you mean official", "all"]),
        # unknown models and methods
        ("model.name=resnt8", "model.name", ["did you mean resnet8", "lenet64"]),
        ("model.name=nowhere.to.be.found:Net", "model.name", ["nowhere", "PYTHONPATH|package"]),
        ("strategy.name=fedpro", "strategy.name", ["did you mean fedprox", "fedavg"]),
        ("strategy.name=scafold", "strategy.name", ["did you mean scaffold", "feddc"]),
        # a run has one strategy: control variates, drifts and server steps are not stacked
        ("strategy.name=scaffold,feddc", "strategy.name", ["unknown", "scaffold", "feddc"]),
        ("strategy.name=feddyn,fedspeed", "strategy.name", ["unknown", "feddyn", "fedspeed"]),
        ("regularizers=proxmal", "regularizers", ["did you mean proximal"]),
        ("regularizers=proximal,nonesuch", "regularizers", ["nonesuch", "proximal"]),
        # keys
        ("run.rouds=3", "run.rouds", ["did you mean run.rounds"]),
        ("rounds=3", "rounds", ["unknown key", "flatfed config|did you mean"]),
        ("trian.lr=3", "trian.lr", ["did you mean train.lr"]),
        ("fedprox.nu=1", "fedprox.nu", ["did you mean fedprox.mu"]),
        ("strategies.name=fedavg", "strategies.name", ["did you mean strategy.name"]),
        ("clients.per_round=3", "clients.per_round", ["did you mean clients.per-round"]),
        ("train.lr_decay=0.9", "train.lr_decay", ["did you mean train.lr-decay"]),
        ("train.batch_size=8", "train.batch_size", ["did you mean train.batch-size"]),
        ("data.min_size=8", "data.min_size", ["did you mean data.min-size"]),
        # not a setting at all
        ("train.lr", "train.lr", ["key=value"]),
        ("fast", "fast", ["key=value"]),
        ("=5", "=5", ["key=value"]),
    ],
)
def test_one_mistake(refused, setting: str, key: str, remedies: list[str]):
    refused(setting).names(key, *remedies)


@pytest.mark.parametrize(
    ("settings", "key", "remedies"),
    [
        (
            ["clients.number=10", "clients.per-round=11"],
            "clients.per-round",
            ["11", r"clients\.number", "10", "lower|at most"],
        ),
        (["clients.number=5000"], "clients.number", ["5000", "1438", "lower|at most"]),
        (["clients.number=1439", "data.partition=iid"], "clients.number", ["1438"]),
        (
            ["clients.number=457", "data.source=breast-cancer", "model.name=mlp"],
            "clients.number",
            ["456"],
        ),
        (["clients.number=200"], "data.min-size", ["2000", "1438", "lower"]),
        (["clients.min-replies=11"], "clients.min-replies", ["11", "10"]),
        (
            ["strategy.name=fedprox", "regularizers=proximal"],
            "regularizers",
            ["fedprox", "proximal", r"fedprox\.mu|either|one of"],
        ),
        (
            ["data.partition=pathological", "data.classes-per-client=11"],
            "data.classes-per-client",
            ["10", "lower"],
        ),
        (
            [
                "data.partition=pathological",
                "data.classes-per-client=1",
                "clients.number=3",
            ],
            "data.classes-per-client",
            ["raise"],
        ),
        (["model.name=lenet"], "model.name", ["16|32", "digits-cnn"]),
        (["data.source=breast-cancer"], "model.name", ["mlp"]),
        (["train.optimizer=adam", "train.momentum=0.9"], "train.momentum", ["sgd"]),
        (["train.nesterov=true"], "train.nesterov", ["train.momentum"]),
        (["run.rounds=3", "run.rounds=4"], "run.rounds", ["twice"]),
        (["strategy.params=eta=1"], "strategy.params", ["empty|fedavg"]),
        (["regularizers=proximal,proximal"], "regularizers", ["twice"]),
        # one perturbation a step
        (["regularizers=sam,asam"], "regularizers", ["sam", "asam", "one"]),
        (["regularizers=asam,proximal,sam"], "regularizers", ["sam with asam", "one"]),
        (
            ["strategy.name=fedspeed", "regularizers=sam"],
            "regularizers",
            ["fedspeed", r"fedspeed\.rho", "leave it out|another"],
        ),
        (["strategy.name=fedspeed", "regularizers=asam"], "regularizers", [r"fedspeed\.rho"]),
        (["strategy.name=fedsam", "regularizers=sam"], "regularizers", ["fedsam", "leave it out"]),
        (
            ["strategy.name=fedsam", "regularizers=asam"],
            "regularizers",
            ["asam with sam", "part of strategy fedsam", "one"],
        ),
        (
            ["strategy.name=fedasam", "regularizers=sam"],
            "regularizers",
            ["sam with asam", "part of strategy fedasam", "one"],
        ),
        (
            ["strategy.name=mofedsam", "regularizers=asam"],
            "regularizers",
            ["asam with sam", "part of strategy mofedsam"],
        ),
        # control variates are measured as plain SGD's mean gradient
        (
            ["strategy.name=scaffold", "train.momentum=0.9"],
            "train.momentum",
            ["scaffold", "SGD", "leave it at 0"],
        ),
        (
            ["strategy.name=scaffold", "train.optimizer=adam"],
            "train.optimizer",
            ["scaffold", "leave it at sgd"],
        ),
        (["strategy.name=feddc", "train.momentum=0.9"], "train.momentum", ["feddc", "at 0"]),
        (["strategy.name=feddc", "train.optimizer=adam"], "train.optimizer", ["feddc", "at sgd"]),
        # and so is MoFedSAM's momentum, which a client's own would make grow from round to round
        (["strategy.name=mofedsam", "train.momentum=0.9"], "train.momentum", ["SGD", "at 0"]),
        (["strategy.name=mofedsam", "train.optimizer=adam"], "train.optimizer", ["SGD", "at sgd"]),
        # FedNova's a_i is known for SGD that starts anew
        (["strategy.name=fednova", "train.optimizer=adam"], "train.optimizer", ["fednova", "sgd"]),
        (
            ["strategy.name=fednova", "train.momentum=0.9", "train.nesterov=true"],
            "train.nesterov",
            ["fednova", "leave it at false"],
        ),
        (
            ["strategy.name=fednova", "train.momentum=0.9", "train.keep-optimizer=true"],
            "train.keep-optimizer",
            ["fednova", "leave it at false"],
        ),
        # the dual methods have no server rate: their step is the dual step
        (["strategy.name=feddyn", "strategy.params=eta=0.1"], "strategy.params", ["empty"]),
        (["strategy.name=feddyn", "feddyn.eta-g=0.5"], "feddyn.eta-g", ["unknown key"]),
        (["strategy.name=feddc", "feddc.eta-g=0.5"], "feddc.eta-g", ["unknown key"]),
        (["strategy.name=fedspeed", "fedspeed.eta-g=0.5"], "fedspeed.eta-g", ["unknown key"]),
        (
            ["strategy.name=feddyn", "scaffold.eta-g=0.5"],
            "scaffold.eta-g",
            ["no effect", r"strategy\.name=scaffold"],
        ),
        (["strategy.name=feddc", "feddyn.alpha=0.5"], "feddyn.alpha", ["no effect"]),
        (["sam.rho=0.1"], "sam.rho", ["no effect", "regularizers=sam"]),
        (["eval.models=sel", "eval.on=clients"], "eval.models", ["test set", "server or both"]),
        (["eval.models=all", "server.ledger=false"], "eval.models", [r"server\.ledger", "true"]),
        (["run.resume=true"], "run.resume", [r"run\.name"]),
        # what the model alone tells
        (
            ["strategy.name=fedpart", "fedpart.cycles=2", "run.rounds=3"],
            "fedpart.cycles",
            [r"set run\.rounds=\d+"],
        ),
        (["strategy.name=fedpart", "fedpart.groups=foo"], "fedpart.groups", ["foo: no parameter"]),
        (["client.dp-clip=1"], "client.dp-clip", ["BatchNorm", "model.norm=group"]),
        # nodes of one process have one data set
        (["data.partition=local"], "data.partition", ["engine.name=grpc", "another"]),
        (["data.partition=local", "engine.name=ray"], "data.partition", ["engine.name=grpc"]),
    ],
)
def test_settings_that_do_not_fit_each_other(refused, settings, key: str, remedies: list[str]):
    refused(*settings).names(key, *remedies)


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy.name=feddc", "feddc.gradient-correction=false", "train.momentum=0.9"],
        ["strategy.name=feddyn", "train.momentum=0.9"],
        ["strategy.name=fednova", "train.momentum=0.9"],
        ["strategy.name=feddyn", "regularizers=sam"],
        ["strategy.name=scaffold", "regularizers=asam,proximal"],
        ["strategy.name=fedspeed", "regularizers=proximal"],
        ["strategy.name=fedsam", "sam.rho=0.1"],
    ],
)
def test_what_has_a_meaning_is_not_refused(settings: list[str], capsys):
    assert started("config", *settings) == 0
    assert capsys.readouterr().err == ""


def test_a_run_that_is_not_there_is_not_resumed(refused):
    (line,) = refused("nowhere", command="resume").lines
    assert "/nowhere: there is no run to resume" in line


def test_resume_needs_no_settings(refused):
    (*_, line) = refused(command="resume", errors=None).lines
    assert line.endswith("required: DIR")


def test_a_suite_is_no_configuration(refused, tmp_path: Path):
    (tmp_path / "suite.toml").write_text("seeds = [0]\n[base]\nrun.rounds = 1\n[methods.fedavg]\n")
    refused("--config", "suite.toml").names("--config", "suite.toml", "flatfed suite suite.toml")


def test_defaults_are_written_where_a_pyproject_is(refused):
    (line,) = refused("--write-pyproject", command="config").lines
    assert "Errno" not in line and "checkout" in line


def test_a_folder_without_a_run(refused, tmp_path: Path):
    (tmp_path / "all" / "mine").mkdir(parents=True)
    (line,) = refused("all", command="report").lines
    assert "all: holds no run" in line and "Errno" not in line and "give a run's" in line
    (tmp_path / "all" / "mine" / "summary.json").write_text("{}")
    (line,) = refused("all", command="report").lines
    assert "give those in it, as all/mine" in line


def test_a_picture_of_no_kind(refused):
    (line,) = refused("--picture", "x.foo", "mine", command="compare").lines
    assert line.startswith("error: --picture x.foo: ") and ".png" in line


def test_costs_of_own_data_need_their_shape(refused, tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_data.py").write_text("")
    refused("data.source=my_data:load", command="cost").names("--shape", "--classes")


MISTAKES = {
    "run.rouds": "run.rouds=3",
    "clients.per_round": "clients.per_round=3",
    "clients.per-round": "clients.per-round=20",
    "data.alpha": "data.alpha=0",
    "train.lr": "train.lr=fast",
    "train.epochs": "train.epochs=0",
    "strategy.name": "strategy.name=fedpro",
    "model.name": "model.name=resnt8",
    "data.path": "data.path=nowhere",
}


@pytest.mark.parametrize("engine", ["inprocess", "ray"])
def test_several_mistakes_make_one_message(refused, engine: str):
    """None of these stands on another's ground, so none hides another."""
    settings = [f"engine.name={engine}", "data.source=folder", *MISTAKES.values()]
    refusal = refused(*settings, errors=len(MISTAKES))
    for key in MISTAKES:
        refusal.names(key)


def test_a_word_that_is_no_setting_hides_no_other_mistake(refused):
    refusal = refused("oops", "run.rouds=3", "data.alpha=0", errors=3)
    refusal.names("oops", "key=value")
    refusal.names("run.rouds")
    refusal.names("data.alpha")


@pytest.mark.parametrize(
    "source", ["cifar10", "cifar100", "tiny-imagenet", "imagenet-200", "folder", "huggingface"]
)
class TestDataPath:
    def test_missing(self, refused, source: str, tmp_path: Path):
        place = tmp_path / "nowhere" / source
        refusal = refused(f"data.source={source}", f"data.path={place}", "model.name=cnn")
        refusal.names("data.path", re.escape(str(place)), "exist|no such|not found")

    def test_empty_folder(self, refused, source: str, tmp_path: Path):
        (tmp_path / "hollow").mkdir()
        refused(f"data.source={source}", "data.path=hollow").names("data.path", "hollow")

    def test_a_file_of_something_else(self, refused, source: str, tmp_path: Path):
        (tmp_path / "notes.txt").write_text("not data")
        refused(f"data.source={source}", "data.path=notes.txt").names("data.path", "notes.txt")


@pytest.mark.parametrize("source", ["folder", "huggingface"])
def test_a_source_that_needs_a_path(refused, source: str):
    refused(f"data.source={source}").names("data.path", source)


def test_a_path_for_the_embedded_set(refused, tmp_path: Path):
    refused("data.source=digits", f"data.path={tmp_path}").names("data.path", "digits", "empty")


def test_more_clients_than_images_in_a_folder(refused, images: Path):
    """Its size is known without a download."""
    refusal = refused(
        "data.source=folder",
        f"data.path={images}",
        "clients.number=13",
        "data.partition=iid",
        "model.name=cnn",
    )
    refusal.names("clients.number", "13", "12", "lower|at most")


def test_a_class_folder_without_images(refused, images: Path):
    (images / "train" / "emu").mkdir()
    refusal = refused("data.source=folder", f"data.path={images}", "model.name=cnn")
    refusal.names("data.path", "train/emu has no images", "fill|remove")


def test_a_node_may_have_a_class_folder_without_images(runner, images: Path):
    (images / "train" / "emu").mkdir()
    own = ["data.source=folder", f"data.path={images}", "data.partition=local", "model.name=cnn"]
    run = runner(*own, "clients.number=1", "run.rounds=1", "train.batch-size=2")
    assert run.summary["status"] == "completed"
    clients = json.loads((run.folder / "clients.json").read_text())
    assert 0 in clients["label_counts"][0] and "emu" in clients["classes"]


def test_config_file_nested_tables_and_dotted_keys(tmp_path: Path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text('train.lr = 0.5\n\n[clients]\nper-round = 3\n\n[data]\npartition = "iid"\n')
    assert started("config", "--config", str(file)) == 0
    text = capsys.readouterr().out
    assert "lr = 0.5" in text
    assert "per-round = 3" in text
    assert 'partition = "iid"' in text


def test_key_value_wins_over_the_file(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text("[run]\nrounds = 9\nseed = 5\n\n[clients]\nnumber = 4\n")
    place = [f"run.output-dir={tmp_path}", "run.name=mine"]
    assert started("run", "--config", str(file), *place, "run.rounds=2", "clients.per-round=1") == 0
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    assert (summary["rounds"], summary["seed"], summary["clients"]) == (2, 5, 4)
    assert len((tmp_path / "mine" / "history.jsonl").read_text().splitlines()) == 2


def test_config_file_stands_anywhere_on_the_line(tmp_path: Path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text("train.lr = 0.5\n")
    assert started("config", "run.rounds=2", "--config", str(file), "run.seed=7") == 0
    text = capsys.readouterr().out
    assert "lr = 0.5" in text
    assert "rounds = 2" in text
    assert "seed = 7" in text


def test_missing_config_file(refused):
    refused("--config", "nowhere.toml").names("--config", "nowhere.toml", "(?i)no such|not exist")


def test_a_folder_as_config_file(refused, tmp_path: Path):
    (tmp_path / "folder.toml").mkdir()
    refused("--config", "folder.toml").names("--config", "folder.toml")


@pytest.mark.parametrize("content", [b"lr = = 3", b"[train", b"\xff\xfe\x00", b"train.lr: 3\n"])
def test_config_file_that_is_not_toml(refused, tmp_path: Path, content: bytes):
    (tmp_path / "broken.toml").write_bytes(content)
    refused("--config", "broken.toml").names("--config", "broken.toml", "TOML")


def test_a_file_is_read_alike_in_every_locale(tmp_path: Path):
    (tmp_path / "mine.toml").write_bytes('[run]  # à la carte\nname = "é"\n'.encode())
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    made = subprocess.run(
        [FLATFED, "config", "--config", tmp_path / "mine.toml"],
        env={**os.environ, **plain, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    assert made.stderr == ""
    assert 'name = "é"' in made.stdout.splitlines()


def test_mistakes_in_file_and_on_the_line_come_together(refused, tmp_path: Path):
    (tmp_path / "mine.toml").write_text(
        "[run]\nrouds = 3\n\n[clients]\nper_round = 3\n\n[train]\nlr = [1, 2]\nepochs = 1.5\n"
    )
    refusal = refused("--config", "mine.toml", "data.alpha=0", errors=5)
    refusal.names("run.rouds", "did you mean run.rounds")
    refusal.names("clients.per_round", "did you mean clients.per-round")
    refusal.names("train.lr", "number")
    refusal.names("train.epochs", "whole number")
    refusal.names("data.alpha", "greater than 0")


@pytest.mark.parametrize("value", ["5", "true", "[1, 2]", "1979-05-27"])
def test_a_choice_that_is_no_word(refused, tmp_path: Path, value: str):
    (tmp_path / "mine.toml").write_text(f"[train]\noptimizer = {value}\n")
    refused("--config", "mine.toml").names("train.optimizer", "known: sgd, adam")


def test_a_value_where_a_group_belongs(refused, tmp_path: Path):
    (tmp_path / "mine.toml").write_text("run = 3\n")
    refused("--config", "mine.toml").names("run", "unknown key|group|table")


def test_config_command_refuses_the_same(refused):
    refused("run.rouds=3", command="config").names("run.rouds", "did you mean run.rounds")


def test_existing_results_folder(refused, tmp_path: Path):
    kept = tmp_path / "out" / "mine"
    kept.mkdir(parents=True)
    (kept / "summary.json").write_text("{}")
    refused("run.output-dir=out", "run.name=mine").names("run.name", "exists", "another|empty")
    assert (kept / "summary.json").read_text() == "{}"


def test_output_dir_that_is_a_file(refused, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    refused("run.output-dir=out").names("run.output-dir", "out")


@pytest.mark.parametrize("key", ["run.output-dir", "data.cache-dir"])
@pytest.mark.parametrize("place", ["/proc/mine", "notes.txt", "notes.txt/deeper"])
def test_a_folder_that_cannot_be_made(refused, tmp_path: Path, key: str, place: str):
    (tmp_path / "notes.txt").write_text("mine")
    refused(f"{key}={place}").names(key, "cannot be written to", "choose")


def test_a_name_stays_inside_the_output_dir(refused, tmp_path: Path):
    """Results are in <run.output-dir>/<run.name>/: a name does not lead out of it."""
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), " ", "two\nlines"):
        refused("run.output-dir=out", "run.rounds=1", f"run.name={name}").names("run.name")


def test_no_command_at_all(capsys):
    assert started() == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_has_enough(tmp_path: Path):
    """As in `flatfed config | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([FLATFED, "config"], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("command", ["compare", "suite", "flatness"])
def test_a_reader_that_has_enough_of_a_table(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not a mistake of the call, nor a disk that is full."""

    def closed(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.chdir(tmp_path)
    assert (
        main(["run", "run.rounds=1", "clients.number=2", "run.name=a", "run.pictures=false"]) == 0
    )
    (tmp_path / "s.toml").write_text(
        'title = "T"\nseeds = [0]\nmetrics = ["loss"]\n[methods.fedavg]\n'
    )
    monkeypatch.setattr(result_commands, "show", closed)
    calls = {
        "compare": ["results/a"],
        "suite": ["s.toml", "--table"],
        "flatness": ["results/a", "--top=1", "--probes=2", "--samples=8"],
    }
    assert main([command, *calls[command]]) == 141


def test_colons_are_no_pictures(capsys):
    show("mypkg.nets:Ok: 3 groups")
    print(text("mypkg.nets:Ok: 3 groups"))
    assert capsys.readouterr().out == "mypkg.nets:Ok: 3 groups\n" * 2


def test_refusal_is_fast(tmp_path: Path):
    """At most 2 s: CPU seconds, since what else the machine does is not the product's."""
    settings = ["engine.name=ray", "data.source=cifar10", "data.path=nowhere", "train.lr=fast"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([FLATFED, "run", *settings], cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    print(f"refusal: {seconds:.2f} CPU s")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []
    assert seconds <= 2


SLOW = """
import time
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

    def forward(self, x):
        if self.training:
            time.sleep(1.0)
        return self.body(x)
"""


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            ["data.partition=iid", "data.alpha=0.1", "data.min-size=2", "eval.holdout=0.3"],
            [
                "data.alpha = 0.1 has no effect with data.partition=iid",
                "data.min-size = 2 has no effect with data.partition=iid",
                "eval.holdout = 0.3 has no effect with eval.on=server",
            ],
        ),
        (
            ["data.partition=dirichlet-balanced", "data.alpha=0.1", "data.min-size=2"],
            ["data.min-size = 2 has no effect with data.partition=dirichlet-balanced"],
        ),
        (
            ["data.classes-per-client=3", "train.keep-optimizer=true"],
            [
                "data.classes-per-client = 3 has no effect with data.partition=dirichlet",
                "train.keep-optimizer = true has no effect without train.momentum or "
                "train.optimizer=adam",
            ],
        ),
        (
            ["data.partition=local", "engine.name=grpc", "eval.on=clients", "eval.holdout=0.3"],
            ["eval.holdout = 0.3 has no effect with data.partition=local"],
        ),
        (
            ["clients.sampling=bernoulli"],
            [
                'clients.sampling = "bernoulli" has no effect with clients.per-round=0: all '
                "clients are in every round"
            ],
        ),
        (
            ["clients.sampling=bernoulli", "clients.number=4", "clients.per-round=4"],
            [
                'clients.sampling = "bernoulli" has no effect with clients.per-round=4: all '
                "clients are in every round"
            ],
        ),
        (["clients.sampling=bernoulli", "clients.per-round=9"], []),
        (
            ["flatness.every=1", "flatness.match-probes=100"],
            ["flatness.match-probes = 100 has no effect with flatness.match=none"],
        ),
        (["flatness.every=1", "flatness.match=paper", "flatness.match-probes=100"], []),
        (["data.alpha=0.1", "data.min-size=2", "eval.on=both", "eval.holdout=0.3"], []),
        (["data.partition=pathological", "data.classes-per-client=3", "data.alpha=0.5"], []),
        (["train.keep-optimizer=true", "train.momentum=0.9"], []),
        (
            ["train.graphs=on", "train.device=cpu"],
            ['train.graphs = "on" has no effect with train.device=cpu'],
        ),
        (["train.graphs=off", "train.device=cpu"], []),
        (["train.graphs=on", "train.device=cuda"], []),
    ],
)
def test_what_has_no_effect_beside_the_other_settings(settings, told):
    assert unused(resolve(from_text(dict(pair.split("=") for pair in settings)))) == told


def test_what_has_no_effect_is_told_once(runner, capsys):
    done = runner("clients.number=2", "run.rounds=2", "data.partition=iid", "data.alpha=0.1")
    assert done.code == 0
    line = "warning: data.alpha = 0.1 has no effect with data.partition=iid"
    assert capsys.readouterr().out.count(line) == 1


def test_no_client_within_the_deadline_of_the_roll_call(runner, capsys):
    done = runner("clients.deadline-s=0.0000001", "run.rounds=1")
    assert done.code == 3
    out, err = capsys.readouterr()
    assert "clients.deadline-s" in out + err
    assert "Traceback" not in out + err
    assert done.summary["status"] == "failed"
    assert not (done.folder / "model.safetensors").exists()


def test_no_client_within_the_deadline_of_a_round(
    runner, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "slow_net.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    assert runner("run.rounds=1", "clients.number=2").code == 0  # the data are warm now
    done = runner(
        "model.name=slow_net:Net",
        "clients.number=2",
        "clients.deadline-s=0.6",
        "train.batch-size=2000",
        "run.rounds=3",
    )
    sys.modules.pop("slow_net", None)
    out, err = capsys.readouterr()
    assert done.code == 3
    assert "clients.deadline-s" in out + err
    assert "0.6" in out + err
    assert "Traceback" not in out + err
    assert done.summary["status"] == "failed"


def test_an_unknown_source_or_model_could_be_ones_own():
    with pytest.raises(ConfigError) as wrong:
        resolve({"data.source": "mypkg.data.load", "model.name": "mypkg.nets.Net"})
    source, model = wrong.value.errors
    assert source.startswith('data.source = "mypkg.data.load": unknown; known: digits, ')
    assert source.endswith(", or your own package.module:function")
    assert model.startswith('model.name = "mypkg.nets.Net": unknown; known: ')
    assert model.endswith(", or your own package.module:Name")
