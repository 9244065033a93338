"""Worker processes: the same bits as one process, whatever happens to a worker."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_common import determinism, wire
from fl_common.config import resolve
from fl_common.guards import Expected
from fl_server import evaluator, inprocess, workers
from fl_server.exchange import Exchange, Outcome
from fl_server.inprocess import InProcessGrid
from tests.living import living, mark, open_files, wait_for

if TYPE_CHECKING:
    from tests.conftest import Runner

CASES = {
    "fedavg": ("train.momentum=0.9", "eval.on=both", "model.norm=batch"),
    "scaffold": ("clients.per-round=4", "eval.models=cloud,sel,all"),
    "fedprox": ("train.channels-last=on", "fedprox.mu=0.1", "train.momentum=0.9"),
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


def test_no_more_workers_start_than_there_are_clients(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Counted(workers.Pool):
        def __init__(self, count: int, *others: Any) -> None:
            started.append(count)
            super().__init__(count, *others)

    monkeypatch.setattr(inprocess, "Pool", Counted)
    runner.always = []
    assert runner("engine.workers=100000", "clients.number=2", "run.rounds=1").code == 0
    assert started == [2]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_evaluation_is_shared_out(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """From the second one on; in runs of several threads too, which do not live in a fork."""
    runner.always = [
        "run.pictures=false",
        f"train.threads={threads}",
        "run.rounds=3",
        "clients.number=2",
    ]
    one = runner("engine.workers=1")
    counts, original = [], evaluator.evaluate

    def counted(*arguments: object) -> tuple[float, float]:
        counts.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(evaluator, "evaluate", counted)
    monkeypatch.setattr(evaluator, "PART_S", 1e-9)
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

    def train(message: Message, context: Context) -> Message:
        raise ValueError(f"no luck for {context.node_config['partition-id']}")

    app.train()(train)
    place = f"{__file__}:{train.__code__.co_firstlineno + 1}"
    grid = grid_of(app)
    try:
        replies = grid.send_and_receive(questions(grid))
        reasons = sorted(reply.error.reason for reply in replies)
        assert reasons == [f"ValueError: no luck for {i} ({place})" for i in range(4)]
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


def test_work_of_an_earlier_round_changes_nothing_of_a_later_one(monkeypatch) -> None:
    """Two clients' round 1 outlasts its deadline, the others had not begun: nobody waits for any of
    them, and what the late ones remember does not take the place of what they did since."""
    monkeypatch.setattr(workers, "WAIT_S", 0.1)
    app, began = ClientApp(), multiprocessing.get_context("fork").Value("i", 0)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        round_ = int(message.metadata.group_id)
        if round_ == 1:
            with began:
                began.value += 1
            time.sleep(30)
        context.state[f"of-{round_}"] = MetricRecord({"x": round_})
        metrics = MetricRecord({"server-round": round_, "num-examples": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    grid = grid_of(app, clients=6, count=2)
    try:
        exchange = Exchange(grid, 0.3, lambda text: None)

        def play(round_: int, clients: list[int], deadline_s: float) -> Outcome:
            exchange.deadline_s, outcome = deadline_s, Outcome()
            messages = {
                i: Message(RecordDict({"arrays": wire.pack({"w": torch.ones(3)})}), 2 + i, "train",
                           group_id=str(round_))
                for i in clients
            }  # fmt: skip
            expected = Expected({}, round_, 1, frozenset())
            list(
                exchange.replies(
                    messages,
                    f"round {round_}",
                    outcome,
                    lambda i: expected,
                    meanwhile=lambda: wait_for(lambda: began.value == 2, 60),
                )
            )
            return outcome

        assert len(play(1, [0, 1, 2, 3, 4, 5], 0.3).failed) == 6
        assert list(play(2, [0, 1], 60).accepted) == [0, 1]
        time.sleep(0.2)
        assert list(play(3, [5], 60).accepted) == [5]
        states = {i: list(grid._contexts[2 + i].state) for i in range(6)}
        assert {states[0][-1], states[1][-1]} == {"of-2"} and states[5] == ["of-3"]
        assert began.value == 2
        assert not grid._out
    finally:
        grid.close()


def test_a_worker_that_hangs_is_replaced(monkeypatch) -> None:
    """What it had been given ahead is done by others."""
    monkeypatch.setattr(workers, "WAIT_S", 0.1)

    def answer(header, content, own):
        if header["hangs"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        return RecordDict({"of": MetricRecord({"process": os.getpid()})}), own

    pool = workers.Pool(2, answer)
    try:
        before = [worker.process for worker in pool.workers]
        jobs = [
            workers.Job(str(i), {"hangs": i < 2}, RecordDict(), RecordDict()) for i in range(12)
        ]
        pool.put(jobs)
        assert pool.collect() == []  # two more wait behind those that hang
        assert sorted(len(worker.jobs) for worker in pool.workers) == [2, 2]
        pool.withdraw({"0", "1"})
        done, limit = [], time.monotonic() + 60
        while len(done) < 10 and time.monotonic() < limit:
            done += pool.collect()
        assert sorted(int(one.key) for one in done) == list(range(2, 12))
        after = {one.content["of"]["process"] for one in done}
        assert not after & set(before) and not _children(os.getpid()) & set(before)
    finally:
        pool.close()


def test_work_of_an_earlier_round_is_not_kept_by_one_process() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        time.sleep(0.05)
        return Message(RecordDict({"metrics": MetricRecord({"x": 1})}), reply_to=message)

    grid = grid_of(app, clients=3, count=1)
    exchange = Exchange(grid, 0.01, lambda text: None)
    for round_ in (1, 2, 3):
        messages = questions(grid, 3)
        for message in messages:
            message.metadata.__dict__["_group_id"] = str(round_)
        phase, expected = f"round {round_}", Expected({}, round_, 1, frozenset())
        asked = dict(enumerate(messages))
        list(exchange.replies(asked, phase, Outcome(), lambda i, e=expected: e))
        assert len(grid._queue) == 2


def test_large_states_on_both_ways_at_once() -> None:
    """A job is sent ahead while its worker sends a reply; neither fits into a socket."""
    state = RecordDict(
        {"memory": wire.pack({f"optimizer.exp_avg.{i:05d}": torch.zeros(1) for i in range(9000)})}
    )
    pool = workers.Pool(2, lambda header, content, own: (content, own))
    signal.alarm(60)  # ends the test where they wait for each other
    try:
        pool.put([workers.Job(str(i), {}, RecordDict(), state) for i in range(8)])
        done = []
        while len(done) < 8:
            done += pool.collect()
        assert all(len(one.state["memory"]) == 9000 for one in done)
    finally:
        signal.alarm(0)
        pool.close()


def test_what_cannot_be_sent_is_told(monkeypatch) -> None:
    """It is no worker's death: another fork would not help."""

    def full(name: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    pool = workers.Pool(2, lambda header, content, own: (content, own))
    processes = [worker.process for worker in pool.workers]
    try:
        monkeypatch.setattr(os, "memfd_create", full)
        content = RecordDict({"arrays": wire.pack({"w": torch.ones(3)})})
        with pytest.raises(OSError, match="Too many open files"):
            pool.put([workers.Job("1", {}, content, RecordDict())])
        assert [worker.process for worker in pool.workers] == processes
    finally:
        pool.close()


def test_a_reply_that_cannot_be_laid_out_is_told(monkeypatch, capfd) -> None:
    """By the worker, which ends of it."""

    def full(name: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    def answer(header, content, own):
        monkeypatch.setattr(os, "memfd_create", full)  # in the worker alone
        return RecordDict({"arrays": wire.pack({"w": torch.ones(3)})}), own

    pool = workers.Pool(1, answer)
    try:
        pool.put([workers.Job("1", {}, RecordDict(), RecordDict())])
        (done,) = pool.collect()
    finally:
        pool.close()
    assert done.error == "its worker process died (exit code 0)"
    assert "Too many open files" in capfd.readouterr().err


def test_nothing_is_left_of_a_run(runner: Runner) -> None:
    runner.always = ["run.pictures=false"]
    runner("run.rounds=1", "engine.workers=2")  # what is opened once for all
    files, children = open_files(), _children(os.getpid())
    assert runner("run.rounds=2", "engine.workers=2").code == 0
    assert not open_files() - files
    assert _children(os.getpid()) == children


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_the_run(tmp_path: Path, end: signal.Signals) -> None:
    call = [sys.executable, "-c", "from fl_server.cli import entry_point as e; e()", "run",
            "run.rounds=100000", "eval.every=100000", "run.pictures=false", "engine.workers=2",
            f"run.output-dir={tmp_path}", "run.name=r"]  # fmt: skip
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
    if end != signal.SIGKILL:
        code, error = (130, "interrupted") if end == signal.SIGINT else (143, "stopped")
        assert run.returncode == code
        summary = json.loads((tmp_path / "r" / "summary.json").read_text())
        assert (summary["status"], summary["error"]) == ("failed", error)


def _children(process: int) -> set[int]:
    found = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def test_auto_is_a_worker_for_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.machine, "processors", lambda: 8)
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
