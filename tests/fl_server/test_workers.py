"""Worker processes: the same bits as one process, whatever happens to a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_common import determinism, wire
from fl_common.config import resolve
from fl_server import network, workers
from fl_server.inprocess import InProcessGrid
from tests.living import living, mark

if TYPE_CHECKING:
    from tests.conftest import Runner

CASES = {
    "fedavg": ("train.momentum=0.9", "eval.on=both", "model.norm=batch"),
    "scaffold": ("clients.per-round=4", "eval.models=cloud,sel,all"),
    "fedprox": ("train.channels-last=true", "fedprox.mu=0.1", "train.momentum=0.9"),
    "feddc": ("regularizers=man,moon", "model.head=moon", "clients.per-round=5"),
    "fedpart": ("fedpart.warm-up=1", "fedpart.rounds-per-group=1", "eval.on=clients"),
    "flwr:FedAdam": ("strategy.params=eta=0.01", "flatness.every=2", "flatness.match=paper",
                     "flatness.samples=32", "flatness.match-probes=2"),
}  # fmt: skip


@pytest.mark.parametrize("strategy", CASES)
def test_workers_give_the_same_bits(runner: Runner, strategy: str) -> None:
    """Model, and history less times: accuracies, losses, bytes, who answered; client memory too,
    or the later rounds would differ."""
    runner.always = ["run.pictures=false"]
    settings = (f"strategy.name={strategy}", *CASES[strategy], "run.rounds=4", "data.alpha=1.0")
    one, three = (runner(*settings, f"engine.workers={n}") for n in (1, 3))
    assert one.code == three.code == 0
    assert three.summary["model_sha256"] == one.summary["model_sha256"]
    assert three.history_less_times == one.history_less_times
    clients = sum(row["client_cpu_s"] for row in three.history)
    assert three.summary["cpu_s"] > clients  # that of other processes is counted
    assert three.summary.get("memory_given_back") == one.summary.get("memory_given_back")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_evaluation_is_shared_out(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """From the second one on; in runs of several threads too, which do not live in a fork."""
    runner.always = ["run.pictures=false", f"train.threads={threads}", "run.rounds=3"]
    one = runner("engine.workers=1")
    counts, original = [], network.evaluate

    def counted(*arguments: object) -> tuple[float, float]:
        counts.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(network, "evaluate", counted)
    monkeypatch.setattr(network, "PART_S", 1e-9)
    three = runner("engine.workers=3")
    assert counts == [1, 3, 3]
    assert three.history_less_times == one.history_less_times


def test_a_run_begun_by_one_worker_goes_on_with_two(runner: Runner, tmp_path: Path) -> None:
    from fl_server.cli import main

    runner.always = ["run.pictures=false"]
    settings = ("strategy.name=feddyn", "run.rounds=4", "clients.per-round=5")
    whole = runner(*settings, "engine.workers=1")
    states = str(tmp_path / "states")
    half = runner("strategy.name=feddyn", "run.rounds=2", "clients.per-round=5",
                  "engine.workers=1", f"client.state-dir={states}")  # fmt: skip
    assert main(["resume", str(half.folder), "run.rounds=4", "engine.workers=2"]) == 0
    assert half.summary["model_sha256"] == whole.summary["model_sha256"]


def grid_of(app: ClientApp, clients: int = 4, count: int = 2) -> InProcessGrid:
    return InProcessGrid(app, clients, {}, count)


def questions(grid: InProcessGrid, n: int = 4) -> list[Message]:
    content = {wire.ARRAYS: wire.pack({"w": torch.ones(3)})}
    return [Message(RecordDict(content), 2 + i, "train", group_id="1") for i in range(n)]


def test_a_worker_that_dies_is_its_clients_failure_alone() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        metrics = MetricRecord({"process": os.getpid()})
        return Message(RecordDict({wire.METRICS: metrics}), reply_to=message)

    grid = grid_of(app)
    try:
        for _ in range(2):  # the second round finds two workers again
            replies = grid.send_and_receive(questions(grid))
            failed = [r for r in replies if r.has_error()]
            assert [r.metadata.src_node_id for r in failed] == [3]
            assert "its worker process died (SIGKILL" in failed[0].error.reason
            good = [r.content[wire.METRICS]["process"] for r in replies if r.has_content()]
            assert len(good) == 3 and os.getpid() not in good
    finally:
        grid.close()


def test_what_a_client_raises_is_its_failure() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ValueError(f"no luck for {context.node_config['partition-id']}")

    grid = grid_of(app)
    try:
        replies = grid.send_and_receive(questions(grid))
        reasons = sorted(reply.error.reason for reply in replies)
        assert reasons == [f"ValueError: no luck for {i}" for i in range(4)]
    finally:
        grid.close()


def test_a_clients_state_is_its_own_wherever_it_is_trained() -> None:
    """Each adds up what it was sent; a worker that kept states, or mixed them, would show."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = context.node_config["partition-id"]
        w = wire.vectors(message.content)["w"] * (partition + 1)
        if "sum" in context.state:
            w = w + wire.unpack(context.state["sum"])["w"]
        context.state["sum"] = wire.pack({"w": w})
        time.sleep(0.01 * (partition % 2))  # so that clients change workers
        reply = {wire.ARRAYS: wire.pack({"w": w}), wire.METRICS: MetricRecord({"i": partition})}
        return Message(RecordDict(reply), reply_to=message)

    grid = grid_of(app, clients=5, count=2)
    try:
        for r in (1, 2, 3):
            for reply in grid.send_and_receive(questions(grid, 5)):
                i = reply.content[wire.METRICS]["i"]
                assert torch.equal(
                    wire.vectors(reply.content)["w"], torch.full((3,), r * (i + 1.0))
                )
    finally:
        grid.close()


def test_nothing_is_left_of_a_run(runner: Runner) -> None:
    runner.always = ["run.pictures=false"]
    runner("run.rounds=1", "engine.workers=2")  # what is opened once for all
    files, children = len(os.listdir("/proc/self/fd")), _children(os.getpid())
    assert runner("run.rounds=2", "engine.workers=2").code == 0
    assert len(os.listdir("/proc/self/fd")) == files
    assert _children(os.getpid()) == children


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_run(tmp_path: Path, end: signal.Signals) -> None:
    call = [sys.executable, "-c", "from fl_server.cli import entry_point as e; e()", "run",
            "run.rounds=100000", "engine.workers=2", f"run.output-dir={tmp_path}",
            "run.name=r"]  # fmt: skip
    env = mark()
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(
            call, stdout=log, stderr=log, start_new_session=True, env=os.environ | env
        )
    try:
        limit = time.monotonic() + 120
        while not (tmp_path / "r" / "history.jsonl").exists() and time.monotonic() < limit:
            time.sleep(0.1)
        assert len(_children(run.pid)) == 2
        run.send_signal(end)
        run.wait(60)
        while (left := living(env)) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not left
    finally:
        run.kill()
        run.wait()
    if end == signal.SIGINT:
        assert run.returncode == 130
        assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] != "completed"


def _children(process: int) -> set[int]:
    found = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def test_auto_is_a_worker_for_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for settings, expected in (
        ({}, 8),
        ({"clients.per-round": 3}, 3),
        ({"train.threads": 4}, 2),
        ({"train.threads": 16}, 1),
        ({"engine.workers": "5"}, 5),
        ({"engine.workers": 2}, 2),
    ):
        assert workers.count(resolve({"train.device": "cpu", **settings})) == expected


def test_several_workers_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "training_device", lambda config: torch.device("cuda"))
    assert workers.count(resolve({})) == 1
    with pytest.raises(ValueError, match=r"engine.workers = 2: .*engine.cohort"):
        workers.count(resolve({"engine.workers": "2"}))


determinism.prepare_process()
