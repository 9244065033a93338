"""Nodes and servers that die under a run, on loopback: it goes on, or says how to go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from living import living, wait_for
from test_grpc import FLATFED, Place, federation, less_times, summary

import fl_server.inprocess
from fl_server.federation import Federation
from fl_server.inprocess import InProcessGrid

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# The cohort shrinks to a tenth: a grid whose nodes vanish, everything else of a run is real.

TEN = ["clients.number=10", "run.rounds=4", "train.device=cpu", "clients.return-s=0.2"]


def shrink(patch: pytest.MonkeyPatch, after: int) -> None:
    """Nine of ten nodes are gone once the first client was sent `after` rounds."""

    class Shrinking(InProcessGrid):
        sent = 0

        def push_messages(self, messages):
            messages = list(messages)
            self.sent += any(m.metadata.message_type == "train" for m in messages)
            return super().push_messages(messages)

        def get_node_ids(self):
            nodes = super().get_node_ids()
            return nodes if self.sent < after else nodes[:1]

    patch.setattr(fl_server.inprocess, "InProcessGrid", Shrinking)


def test_a_tenth_of_the_cohort_goes_on_alone(runner, monkeypatch):
    shrink(monkeypatch, 2)
    result = runner(*TEN, "clients.min-replies=1")
    assert result.code == 0
    assert [len(row["replies"]) for row in result.history] == [10, 10, 1, 1]
    assert result.history[2]["failed"] == {str(name): "not connected" for name in range(1, 10)}


def test_too_few_are_waited_for_and_the_run_can_be_resumed(runner, monkeypatch, capsys):
    from fl_client.app import release
    from fl_server.cli import main

    whole = runner(*TEN, "clients.min-replies=5", "strategy.name=scaffold")
    shrink(monkeypatch, 2)
    started = time.monotonic()
    short = runner(*TEN, "clients.min-replies=5", "strategy.name=scaffold", "clients.deadline-s=6")
    assert short.code == 3
    assert time.monotonic() - started > 6  # it was waited for them until the deadline
    told = capsys.readouterr().out
    assert "round 3: 1 of 10 clients are connected, clients.min-replies = 5; waiting, " in told
    assert f"continue it with: flatfed resume {short.folder}" in told
    assert "1 good replies, clients.min-replies = 5" in short.summary["error"]
    assert "not connected" in short.summary["error"]
    assert [row["round"] for row in short.history] == [1, 2, 3]
    assert len(short.history[-1]["failed"]) == 9  # of the round that ended the run

    monkeypatch.setattr(fl_server.inprocess, "InProcessGrid", InProcessGrid)
    release()
    assert main(["resume", str(short.folder), "clients.deadline-s=3600"]) == 0
    assert short.summary["model_sha256"] == whole.summary["model_sha256"]
    assert short.history_less_times == whole.history_less_times


# Real processes

MEMORY = ["strategy.name=scaffold", "clients.number=2", "train.device=cpu", "data.partition=iid"]
HOLDING = '''
import json, os, time
from pathlib import Path

import fl_client.client
from fl_common.data.sources import load as load_digits

here = Path(__file__).parent
honest = fl_client.client.Clients.train

def train(self, partition, content, state):
    """Client 1 stops in the middle of a round while the file `hold` is there, and is absent
    from the rounds that `absent` lists."""
    if partition == 1:
        if (here / "hold").exists():
            (here / "holding").write_text(str(os.getpid()))
            time.sleep(600)
        listed = here / "absent"
        server_round = int(content["config"]["server-round"])
        if listed.exists() and server_round in json.loads(listed.read_text()):
            raise RuntimeError("absent")
    return honest(self, partition, content, state)

fl_client.client.Clients.train = train

def load(path, seed):
    data = load_digits("digits")
    return (data.train.x, data.train.y), (data.test.x, data.test.y), data.classes
'''


def submit(place: Place, name: str, *settings: str) -> subprocess.Popen[str]:
    command = [FLATFED, "run", "engine.name=grpc", f"run.output-dir={place.folder}"]
    return subprocess.Popen(
        [*command, f"run.name={name}", *settings],
        cwd=place.folder,
        env=place.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rounds_done(folder: Path) -> int:
    path = folder / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def come(folder: Path, rounds: int, seconds: float) -> bool:
    """Whether a run came this far in time."""
    return wait_for(lambda: rounds_done(folder) >= rounds, seconds)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_a_trainer_that_dies_in_a_round_fails_at_once(tmp_path: Path):
    """The round closes long before its deadline, names the client, and the next one has it."""
    for place in federation(tmp_path, "--clients", "2", "--insecure", "--worker"):
        (place.modules / "holding.py").write_text(HOLDING)
        (place.modules / "hold").touch()
        settings = [*MEMORY, "data.source=holding:load", "run.rounds=3", "clients.deadline-s=500"]
        run = submit(place, "dies", *settings)
        try:
            assert wait_for((place.modules / "holding").exists, 240)
            (place.modules / "hold").unlink()
            killed = time.monotonic()
            end(int((place.modules / "holding").read_text()))
            assert come(place.folder / "dies", 1, 120)
            assert time.monotonic() - killed < 120
            output, _ = run.communicate(timeout=400)
        finally:
            run.kill()
        assert run.returncode == 0, output
        rows = less_times(place.folder / "dies")
        assert [row["replies"] for row in rows] == [[0], [0, 1], [0, 1]]
        assert "died while handling the message" in rows[0]["failed"]["1"]


@pytest.mark.long
def test_a_client_that_is_killed_in_the_middle_of_training(tmp_path: Path):
    """The round closes by its deadline over the other one; started again, the client goes on from
    its memory, as in the run of one process in which it is absent from the same rounds."""
    for place in federation(tmp_path, "--clients", "2", "--insecure"):
        (place.modules / "holding.py").write_text(HOLDING)
        settings = [*MEMORY, "data.source=holding:load", "run.rounds=12"]
        limits = ["clients.deadline-s=20", "clients.return-s=0"]
        run, folder = submit(place, "killed", *settings, *limits), place.folder / "killed"
        try:
            assert come(folder, 2, 240)
            (place.modules / "hold").touch()
            assert wait_for((place.modules / "holding").exists, 120)
            at = rounds_done(folder) + 1
            state = json.loads((place.folder / "home/up/state.json").read_text())
            node = int(list(state["processes"])[2])  # the SuperLink, node 0, node 1
            command, env = started_as(node)
            assert "--partition 1 " in " ".join(command)
            end(node)
            (place.modules / "hold").unlink()
            assert come(folder, at, 120)
            row = less_times(folder)[at - 1]
            assert row["replies"] == [0]
            assert row["failed"] == {"1": "no reply within 20 s (clients.deadline-s)"}
            with (place.folder / "again.log").open("wb") as log:
                subprocess.Popen(
                    command, cwd=place.folder, env=env, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            output, _ = run.communicate(timeout=500)
        finally:
            run.kill()
        assert run.returncode == 0, output
        rows = less_times(folder)
        absent = [row["round"] for row in rows if row["replies"] == [0]]
        assert absent[0] == at
        assert rows[-1]["replies"] == [0, 1], output  # it took part again
        assert "memory_given_back" not in summary(folder)
        (place.modules / "absent").write_text(json.dumps(absent))
        alone = place.run("alone", "inprocess", *settings)
        assert summary(alone)["model_sha256"] == summary(folder)["model_sha256"]


@pytest.mark.long
def test_ten_nodes_shrink_to_one(tmp_path: Path):
    """Too few: waited for, told, ended by the deadline with a checkpoint, and resumed by ten nodes
    to the model of an unharmed run.  Enough: the one that is left goes on alone."""
    settings = ["clients.number=10", "run.rounds=40", "model.name=mlp", "train.device=cpu"]
    for place in federation(tmp_path, "--clients", "10", "--insecure"):
        state = json.loads((place.folder / "home/up/state.json").read_text())
        nodes = [int(pid) for pid in list(state["processes"])[2:]]  # not the SuperLink, nor node 0
        again = [started_as(node) for node in nodes]
        limits = ["clients.deadline-s=20", "clients.return-s=1"]
        run = submit(place, "few", *settings, *limits, "clients.min-replies=5")
        folder = place.folder / "few"
        try:
            assert come(folder, 2, 300)
            for node in nodes:
                os.kill(node, signal.SIGTERM)
            output, _ = run.communicate(timeout=300)
        finally:
            run.kill()
        assert run.returncode == 3, output
        assert summary(folder)["status"] == "failed"
        reason = summary(folder)["error"]
        assert "1 good replies, clients.min-replies = 5" in reason
        assert re.search(r"waiting, \d+ s at most \(clients.deadline-s\)", output)
        started = []
        try:
            for i, (command, env) in enumerate(again):
                with (place.folder / f"again-{i}.log").open("wb") as log:
                    started.append(
                        subprocess.Popen(
                            command, cwd=place.folder, env=env, stdout=log, stderr=log,
                            start_new_session=True,
                        )
                    )  # fmt: skip
            done = place.flatfed("resume", str(folder), "clients.deadline-s=300")
            assert done.returncode == 0, done.stdout + done.stderr
            alone = place.run("whole", "inprocess", *settings)
            assert summary(folder)["model_sha256"] == summary(alone)["model_sha256"]

            limits = ["clients.deadline-s=300", "clients.return-s=1"]
            run, folder = submit(place, "one", *settings, *limits), place.folder / "one"
            try:
                assert come(folder, 2, 300)
                for process in started:
                    process.terminate()
                output, _ = run.communicate(timeout=500)
            finally:
                run.kill()
            assert run.returncode == 0, output
            assert less_times(folder)[-1]["replies"] == [0]
        finally:
            for process in started:
                process.terminate()
                process.wait(60)


def started_as(process: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a process."""
    place = Path(f"/proc/{process}")
    entries = (place / "environ").read_text().split("\0")
    env = dict(entry.split("=", 1) for entry in entries if entry)
    return (place / "cmdline").read_text().split("\0")[:-1], env


class Lasting(Federation):
    """Its SuperLink keeps nodes and runs in a file, as one of a site does."""

    def _start(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        kept = ["--database", str(self.folder / "superlink.db")] if name == "superlink" else []
        started = super()._start(name, command, *arguments, *kept)
        if name == "superlink":
            self.link = command, arguments
        return started


@pytest.mark.long
def test_a_superlink_that_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its nodes come back unaided, and the run that it was at is resumed to the same model."""
    place = Place(tmp_path)
    for key, value in place.env.items():
        monkeypatch.setenv(key, value)
    up = Lasting(tmp_path / "home" / "up", 2, insecure=False)
    up.start()
    try:
        settings = [*MEMORY, "run.rounds=6"]
        whole = place.run("whole", "grpc", *settings)
        run, folder = submit(place, "cut", *settings), tmp_path / "cut"
        try:
            assert come(folder, 2, 240)
            link = next(iter(up.processes))
            end(link)
            output, _ = run.communicate(timeout=300)
        finally:
            run.kill()
        assert run.returncode == 3, output
        assert rounds_done(folder) < 6
        command, arguments = up.link
        up._start("superlink", command, *arguments)
        assert wait_for(lambda: up._online() == 2, 240)
        again = place.flatfed("resume", str(folder))
        assert again.returncode == 0, again.stdout + again.stderr
        assert "resumed after round" in again.stdout
        assert summary(folder)["model_sha256"] == summary(whole)["model_sha256"]
        assert less_times(folder) == less_times(whole)
    finally:
        up.stop()
    assert wait_for(lambda: not living(place.env), 60)
