"""The resident trainer: real processes that talk over its socket."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from living import living, mark, wait_for
from PIL import Image

from fl_client import app, worker
from fl_common import assembly, wire
from fl_common.config import resolve
from fl_common.layout import concatenate, tensors_of
from fl_server.cli import main

SETTINGS = {"clients.number": 3, "train.device": "cpu"}
COMMAND = [sys.executable, "-P", "-m", "fl_client.worker"]
"""Then its socket, and the process with which it ends."""


def context(path: Path, partition: int = 0, run_id: int = 1, **settings) -> Context:
    node = {"partition-id": partition, "num-partitions": 3, "worker-socket": str(path)}
    return Context(run_id, 1, node, RecordDict(), {**SETTINGS, **settings})


def to_train(**settings) -> RecordDict:
    config = resolve({**SETTINGS, **settings})
    data = assembly.load_data(config)
    net = assembly.new_model(config, 10, data.shape, torch.device("cpu"))
    model = {kind: concatenate(t.values()) for kind, t in tensors_of(net).items()}
    asked = ConfigRecord({"server-round": 1, wire.SAMPLES: 1000})
    return RecordDict({wire.ARRAYS: wire.pack(model), wire.CONFIG: asked})


@pytest.fixture
def trainer(tmp_path: Path):
    """A worker's process and its socket."""
    path = tmp_path / "trainer"
    process = subprocess.Popen([*COMMAND, path, str(os.getpid())])
    assert wait_for(path.exists, 300)
    yield process, path
    process.kill()
    process.wait()


def test_it_answers_as_the_process_itself_would(trainer):
    _, path = trainer
    content = to_train()
    mine, its = context(path), context(path)
    for kind in ("query", "train", "train"):
        asked = content if kind == "train" else RecordDict({wire.CONFIG: ConfigRecord({})})
        here, there = app.answer(kind, asked, mine), worker.ask(str(path), kind, asked, its)
        assert here.keys() == there.keys()
        if kind == "train":
            ours, theirs = wire.vectors(here), wire.vectors(there)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        else:
            assert dict(here[wire.METRICS]) == dict(there[wire.METRICS])
    app.release()


def test_what_the_node_remembers_goes_there_and_back(trainer):
    _, path = trainer
    settings = {"strategy.name": "scaffold"}
    content = to_train(**settings)
    content[wire.ARRAYS]["c"] = content[wire.ARRAYS]["params"]
    content[wire.CONFIG] = ConfigRecord(
        {
            **content[wire.CONFIG],
            wire.EXPERIMENT: "e",
            wire.MEMORY_ROUND: 0,
            wire.CHECKPOINTS: [0],
        }
    )
    its = context(path, **settings)
    worker.ask(str(path), "train", content, its)
    (record,) = its.state.values()
    assert record["strategy.c"].numpy().any()


def test_its_socket_is_its_users_alone(trainer):
    mode = trainer[1].stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_a_failure_is_an_answer_and_the_trainer_goes_on(trainer):
    process, path = trainer
    with pytest.raises(worker.WorkerError, match="partition-id 7"):
        worker.ask(str(path), "query", RecordDict(), context(path, partition=7))
    with pytest.raises(worker.WorkerError, match="answers query, train, evaluate"):
        worker.ask(str(path), "sing", RecordDict(), context(path))
    worker.ask(str(path), "query", RecordDict(), context(path))
    assert process.poll() is None


def test_an_answer_may_come_before_empty_parts_are_sent():
    """The other side has all when what is left to send is empty, and may be gone already."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        real, sent = ours.sendall, []

        class Slow:
            def sendall(self, data: bytes) -> None:
                if len(sent) == 2:  # lengths and header
                    theirs.close()
                sent.append(data)
                real(data)

        worker._send(Slow(), {"kind": "query"}, RecordDict(), RecordDict())
    assert len(sent) == 2


def test_its_death_is_told_at_once(trainer):
    process, path = trainer
    content = to_train(**{"train.epochs": 10_000})
    asked = context(path, **{"train.epochs": 10_000})
    threading.Timer(1.0, process.kill).start()
    started = time.monotonic()
    with pytest.raises(worker.WorkerError, match="died while handling the message"):
        worker.ask(str(path), "train", content, asked)
    assert time.monotonic() - started < 20


def test_other_code_is_refused(trainer, monkeypatch: pytest.MonkeyPatch):
    _, path = trainer
    monkeypatch.setattr(worker, "code_sha256", lambda: "0" * 64)
    with pytest.raises(worker.WorkerError, match="other code"):
        worker.ask(str(path), "query", RecordDict(), context(path))


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, what: str, capsys):
    path = tmp_path / "precious"
    path.mkdir() if what == "folder" else path.write_text("data")
    assert main(["worker", "--socket", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "exists and is not a socket; give another --socket" in said.err
    assert path.is_dir() if what == "folder" else path.read_text() == "data"


def test_silence_ends_with_the_round(trainer):
    """A trainer that hangs, here by SIGSTOP, keeps nobody waiting for ever, and answers again."""
    process, path = trainer
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(worker.WorkerError, match=r"no answer within 0.5 s \(clients.deadline-s\)"):
        worker.ask(str(path), "query", RecordDict(), context(path, **{"clients.deadline-s": 0.5}))
    process.send_signal(signal.SIGCONT)
    worker.ask(str(path), "query", RecordDict(), context(path))


def test_runs_that_take_turns(trainer):
    """A message of another run replaces what is resident; the answers stay each run's own."""
    _, path = trainer
    runs = [{"clients.number": 3}, {"clients.number": 4, "run.seed": 1}]
    for settings in runs * 2:
        asked = RecordDict({wire.CONFIG: ConfigRecord({})})
        there = worker.ask(str(path), "query", asked, context(path, **settings))
        here = app.answer("query", asked, context(path, **settings))
        assert dict(here[wire.METRICS]) == dict(there[wire.METRICS])
    app.release()


def test_what_failed_is_tried_again(trainer, tmp_path: Path):
    """A data folder that is mounted late costs one message, not the life of the trainer."""
    _, path = trainer
    late = tmp_path / "late"
    settings = {"data.source": "folder", "data.path": str(late), "data.partition": "local"}
    with pytest.raises(worker.WorkerError, match="late"):
        worker.ask(str(path), "query", RecordDict(), context(path, **settings))
    pictures(late, 2)
    reply = worker.ask(str(path), "query", RecordDict(), context(path, **settings))
    assert reply[wire.METRICS]["num-examples"] == 4


def pictures(folder: Path, number: int) -> None:
    """So many of each of two classes, to train and to test."""
    pixels = np.zeros((8, 8), np.uint8)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for k in range(number):
                Image.fromarray(pixels + k).save(folder / split / name / f"{k}.png")


def test_a_later_run_with_the_same_settings_sees_the_data_of_its_time(trainer, tmp_path: Path):
    """What is kept is kept for one run; Flower's numbers of runs have up to 64 bits."""
    _, path = trainer
    folder = tmp_path / "pictures"
    settings = {"data.source": "folder", "data.path": str(folder), "data.partition": "local"}
    said = []
    for run_id, number in ((2**64 - 1, 2), (2**64 - 2, 3)):
        pictures(folder, number)
        asked = context(path, run_id=run_id, **settings)
        reply = worker.ask(str(path), "query", RecordDict(), asked)
        said.append((reply[wire.METRICS]["num-examples"], reply[wire.CONFIG]["data"]))
    (first, before), (second, after) = said
    assert (first, second) == (4, 6) and before != after


def test_what_is_resident_stays_for_its_run(tmp_path: Path):
    one = app.resident(context(tmp_path))
    assert app.resident(context(tmp_path, partition=1)) is one
    assert app.resident(context(tmp_path, run_id=2)) is not one
    app.release()


@pytest.mark.parametrize("missing", ["run-id", "run", "node"])
def test_the_header_of_other_code_is_refused_and_not_read(missing: str):
    ours, theirs = socket.socketpair()
    header = {"kind": "query", "code": "0" * 64, "run-id": 1, "run": {}, "node": {}}
    del header[missing]
    with ours, theirs:
        worker._send(ours, header, RecordDict(), RecordDict())
        worker._serve(theirs, app.answer)
        answer, _, _ = worker._receive(ours)
    assert "other code" in answer["error"]


def test_a_lost_device_ends_it(tmp_path: Path):
    """A CUDA error is sticky: the message has its answer, and another process takes over."""
    path = tmp_path / "trainer"
    code = (
        "import sys, torch; from fl_client import app, worker\n"
        "def answer(*_): raise torch.AcceleratorError('device-side assert')\n"
        "app.answer = answer; worker.run(sys.argv[1])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stderr=subprocess.PIPE, text=True
    )
    assert wait_for(path.exists, 300)
    with pytest.raises(worker.WorkerError, match=r"Error: device-side assert \(<string>:2\)"):
        worker.ask(str(path), "query", RecordDict(), context(path))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error == (
        "error: AcceleratorError: device-side assert (<string>:2); this trainer ends; another can "
        "take its place\n"
    )
    assert not path.exists()


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "nothing"
    monkeypatch.setattr(worker, "CONNECT_S", 0.3)
    with pytest.raises(worker.WorkerError, match=r"no trainer at .*flatfed worker"):
        worker.ask(str(path), "query", RecordDict(), context(path))


def test_a_dead_ones_socket_is_replaced_and_a_living_ones_is_not(trainer):
    process, path = trainer
    second = subprocess.run(
        [*COMMAND, path, str(os.getpid())], capture_output=True, text=True, timeout=300
    )
    assert second.returncode != 0
    assert "another trainer is there" in second.stderr
    process.kill()
    process.wait()
    assert path.exists()
    third = subprocess.Popen([*COMMAND, path, str(os.getpid())], stdout=subprocess.PIPE, text=True)
    try:
        assert "trainer ready" in third.stdout.readline()
        worker.ask(str(path), "query", RecordDict(), context(path))
        third.send_signal(signal.SIGTERM)
        assert third.wait(120) == 0
        assert not path.exists()
    finally:
        third.kill()
        third.wait()


def test_the_process_that_asks_imports_no_torch(trainer, tmp_path: Path):
    code = (
        "import sys; from flwr.app import Context, RecordDict\n"
        "from fl_client import app, worker\n"
        "node = {'partition-id': 0, 'num-partitions': 3, 'worker-socket': sys.argv[1]}\n"
        "asked = Context(1, 1, node, RecordDict(), {'clients.number': 3})\n"
        "reply = worker.ask(sys.argv[1], 'query', RecordDict(), asked)\n"
        "assert reply['metrics']['partition-id'] == 0\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, trainer[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("begun", [True, False])
def test_it_ends_with_its_node(begun: bool, tmp_path: Path):
    """And with one that dies while the trainer still imports what it needs."""
    env, path = mark(), tmp_path / "trainer"
    code = (
        "import os, pathlib, subprocess, sys, time\n"
        "subprocess.Popen([*sys.argv[1:], str(os.getpid())])\n"
        f"while {begun} and not pathlib.Path(sys.argv[-1]).exists(): time.sleep(0.1)"
    )
    subprocess.run(
        [sys.executable, "-c", code, *COMMAND, path], env={**os.environ, **env}, timeout=300
    )
    assert wait_for(lambda: not living(env), 60 if begun else 300)
