"""A run that ended early is continued from its newest good checkpoint, or a line says why not.

Runs are real, on the quadratic toy; one that crashes does so in a child of this process, by
SIGKILL, and is continued here.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fl_client.app import release
from fl_client.client import Clients
from fl_common import assembly, snapshots, wire
from fl_common.config import resolve
from fl_server import recorder, rounds
from fl_server.app import _unresumable
from fl_server.checkpoint import Checkpoints
from fl_server.cli import main
from fl_server.progress import Progress
from fl_server.recorder import Recorder, read_summary
from tests import toy
from tests.memories import history, in_state_dir, leftovers, memories, reached, summary

TOY = [item for item in toy.SETTINGS if not item.startswith("eval.")]
MEMORY = ["strategy.name=scaffold", "train.epochs=3"]
ROUNDS = 5


@pytest.fixture(autouse=True)
def on_the_toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    release()
    toy.install(monkeypatch, n=(4, 2))
    # Pictures are most of the time that such a run takes.
    monkeypatch.setattr(Recorder, "_draw", lambda self: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody pulls the plug here
    yield
    release()


class Runs:
    """Runs in one folder."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def command(self, name: str, *settings: str) -> list[str]:
        place = [f"run.output-dir={self.base}", f"run.name={name}"]
        rounds = [] if any("run.rounds" in s for s in settings) else [f"run.rounds={ROUNDS}"]
        return ["run", *place, *rounds, *TOY, *settings]

    def __call__(self, name: str, *settings: str) -> Path:
        """A run that completes."""
        assert main(self.command(name, *settings)) == 0
        release()
        return self.base / name

    def resume(self, folder: Path, *settings: str) -> int:
        release()
        return main(["resume", str(folder), *settings])

    def crashed(self, name: str, *settings: str, after: int) -> Path:
        """A run that SIGKILL ended after this round and its checkpoint."""
        crash(lambda: kill_after(after), self.command(name, *settings))
        folder = self.base / name
        assert len((folder / "history.jsonl").read_text().splitlines()) == after
        assert summary(folder) == {"status": "running"}
        return folder


def crash(prepare: Callable[[], None], command: list[str]) -> None:
    """`flatfed command` in a child that SIGKILL ends."""
    child = os.fork()
    if not child:
        try:
            prepare()
            main(command)
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"not killed, exit code {os.waitstatus_to_exitcode(status)}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill_after(server_round: int) -> None:
    told = Progress.row

    def row(self, row: dict) -> None:
        told(self, row)
        if row["round"] == server_round:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.row = row


def watch_the_disk(patch: pytest.MonkeyPatch, at: Callable[[int, str], None]) -> None:
    """`at(n, name)` is called before the n-th call, from 1, that changes what is on the disk; a
    write is half done by then."""
    made = 0

    def count(name: str) -> None:
        nonlocal made
        made += 1
        at(made, name)

    class File(io.FileIO):
        def write(self, data) -> int:
            done = super().write(data[: len(data) // 2])
            count("write")
            return done + super().write(data[done:])

    def watched(function: Callable, name: str) -> Callable:
        def call(*args, **kwargs):
            count(name)
            return function(*args, **kwargs)

        return call

    def opened(path: Path, mode: str = "r", *rest, _open=Path.open, **more):
        writes = mode in ("wb", "ab") and path.name != ".lock"
        return File(path, mode[0]) if writes else _open(path, mode, *rest, **more)

    patch.setattr(Path, "open", opened)
    for owner, name in (
        (os, "fsync"), (os, "truncate"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"),
    ):  # fmt: skip
        patch.setattr(owner, name, watched(getattr(owner, name), name))


def kill_at(call: int) -> None:
    def at(n: int, name: str) -> None:
        if n == call:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_the_disk(pytest.MonkeyPatch(), at)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def checkpoint(folder: Path, server_round: int) -> Path:
    (path,) = (folder / "checkpoints").glob(f"{server_round:06d}-*")
    return path


def flip(path: Path, share: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 8
    path.write_bytes(data)


METHODS = {
    "fedavg": ["train.epochs=2"],
    "fedprox": ["strategy.name=fedprox", "fedprox.mu=0.5", "train.momentum=0.9"],
    "scaffold": MEMORY,
    "feddyn": ["strategy.name=feddyn", "feddyn.alpha=1.0", "train.epochs=3"],
    "feddc": ["strategy.name=feddc", "feddc.alpha=1.0", "train.epochs=3"],
    "fedspeed": ["strategy.name=fedspeed", "train.epochs=3"],
    "fednova": ["strategy.name=fednova", "train.epochs=3"],
    "flwr:FedAdam": ["strategy.name=flwr:FedAdam", "strategy.params=eta=0.1,beta_1=0.9"],
    "partly": [*MEMORY, "clients.per-round=1"],
    "bernoulli": [*MEMORY, "clients.per-round=1", "clients.sampling=bernoulli"],
    "sparse": [*MEMORY, "server.checkpoint-every=2"],
    "averages": ["eval.models=cloud,sel,all", "clients.per-round=1"],
    "held-out": ["eval.on=both", "eval.every=2"],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_crash_changes_nothing(runs: Runs, method: str):
    """For every kind of state that a run has: the model's, the strategy's, the clients'."""
    whole = runs("whole", *METHODS[method])
    for after in (1, 4):
        folder = runs.crashed(f"killed-{after}", *METHODS[method], after=after)
        assert runs.resume(folder) == 0
        assert reached(folder) == reached(whole)
        on_disk = after - after % 2 if method == "sparse" else after
        assert summary(folder)["resumed_after_rounds"] == [on_disk]


def calls_of(command: list[str]) -> list[str]:
    """The calls that change the disk which a run makes from beginning to end."""
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        watch_the_disk(patch, lambda n, name: made.append(name))
        assert main(command) == 0
    release()
    return made


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.crash)])
def test_a_kill_before_any_change_of_the_disk(runs: Runs, step: int):
    """In the middle of a write, before its fsync, before the rename, before an old file goes.

    SCAFFOLD with a state directory: per round and client a file of the client's and one of the
    ledger's, then a row of the history, then a checkpoint.
    """

    def command(name: str) -> list[str]:
        return runs.command(name, *MEMORY, f"client.state-dir={runs.base / f'state-{name}'}")

    def left(name: str) -> tuple:
        return reached(runs.base / name), in_state_dir(runs.base / f"state-{name}")

    assert main(command("whole")) == 0
    resumed: list[int] = []
    for call in range(1, len(calls_of(command("counted"))) + 1, step):
        name = f"at-{call}"
        crash(lambda call=call: kill_at(call), command(name))
        begun = any((runs.base / name).glob("checkpoints/*.safetensors"))
        code = runs.resume(runs.base / name)
        if not begun:  # and it does not begin anew
            assert code in (2, 3)
            assert not (runs.base / name / "history.jsonl").exists()
            continue
        assert code == 0
        assert left(name) == left("whole"), f"killed before call {call}"
        resumed += summary(runs.base / name).get("resumed_after_rounds", [])
    assert len(resumed) > 100 // step
    assert set(resumed) >= set(range(ROUNDS))


def test_two_crashes_change_nothing_either(runs: Runs):
    whole = runs("whole", *MEMORY)
    folder = runs.crashed("killed", *MEMORY, after=1)
    crash(lambda: kill_after(3), ["resume", str(folder)])
    assert runs.resume(folder) == 0
    assert reached(folder) == reached(whole)
    assert summary(folder)["resumed_after_rounds"] == [1, 3]


def test_a_run_that_is_terminated_keeps_its_last_round(runs: Runs):
    """SIGTERM after round 2, before its checkpoint is on the disk."""
    whole = runs("whole", *MEMORY)
    child = os.fork()
    if not child:
        code, draw = 99, rounds.draw

        def terminate(clients, seed, server_round: int) -> list[int]:
            if server_round == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return draw(clients, seed, server_round)

        rounds.draw = terminate
        try:
            main(runs.command("ended", *MEMORY))
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    folder = runs.base / "ended"
    told = summary(folder)
    assert (told["status"], told["error"], told["rounds"]) == ("failed", "stopped", 2)
    assert runs.resume(folder) == 0
    assert summary(folder)["resumed_after_rounds"] == [2]
    assert reached(folder) == reached(whole)


def test_a_resumed_runs_times_are_those_of_all_its_parts(runs: Runs):
    def prepare() -> None:
        kill_after(3)
        told = Progress.note
        Progress.note = lambda self, text: (told(self, text), time.sleep(0.5))

    crash(prepare, runs.command("killed"))
    folder = runs.base / "killed"
    before = Checkpoints(folder / "checkpoints").newest(print).facts
    assert before["wall_s"] > 1.0  # two notes
    started = time.perf_counter()
    assert runs.resume(folder) == 0
    elapsed = time.perf_counter() - started
    rows = [json.loads(line) for line in (folder / "history.jsonl").open()][3:]
    told = summary(folder)
    assert told["wall_s"] >= before["wall_s"] + sum(row["seconds"] for row in rows) - 1e-3
    assert told["wall_s"] <= before["wall_s"] + elapsed
    assert told["cpu_s"] >= before["cpu_s"] + sum(row["client_cpu_s"] for row in rows) - 1e-3


def test_workers_times_are_counted_once(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """This process itself takes no time at all: what is added is the workers'."""
    folder = runs.crashed("killed", "engine.workers=2", after=3)
    before = Checkpoints(folder / "checkpoints").newest(print).facts
    clock = SimpleNamespace(perf_counter=time.perf_counter, process_time=lambda: 0.0)
    monkeypatch.setattr(recorder, "time", clock)
    assert runs.resume(folder) == 0
    rows = [json.loads(line) for line in (folder / "history.jsonl").open()][3:]
    added = summary(folder)["cpu_s"] - before["cpu_s"]
    assert added == pytest.approx(sum(row["client_cpu_s"] for row in rows), abs=2e-3)


FLATNESS = [
    "flatness.probes=2", "flatness.match=paper", "flatness.match-probes=2",
]  # fmt: skip


def gathered(folder: Path) -> tuple[int, int]:
    told = summary(folder)
    return told["flatness_bytes_down"], told["flatness_bytes_up"]


@pytest.mark.parametrize("every", [1, 3])
def test_the_bytes_that_measure_flatness_are_those_of_all_rounds(runs: Runs, every: int):
    """After a kill; and after an end that wrote a summary with a round that is played again: the
    first that was measured, if it was the third."""
    settings = [*FLATNESS, f"flatness.every={every}"]
    whole = runs("whole", *settings)
    killed = runs.crashed("killed", *settings, after=3)
    assert runs.resume(killed) == 0
    assert gathered(killed) == gathered(whole)
    ended = runs.base / "ended"
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, [4])
        sparse = ["server.checkpoint-every=2", "clients.max-failed-rounds=1"]
        assert main(runs.command("ended", *settings, *sparse)) == 3
    assert runs.resume(ended) == 0
    assert summary(ended)["resumed_after_rounds"] == [2]
    assert gathered(ended) == gathered(whole)


def test_who_was_given_its_memory_back_is_known_after_a_crash(runs: Runs):
    """In this process the clients of a run that goes on remember nothing."""
    folder = runs.crashed("killed", *MEMORY, after=1)
    crash(lambda: kill_after(3), ["resume", str(folder)])
    assert runs.resume(folder) == 0
    given = summary(folder)["memory_given_back"]
    assert [(g["round"], g["client"]) for g in given] == [(2, 0), (2, 1), (4, 0), (4, 1)]


# Damage


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    runs: Runs, capsys: pytest.CaptureFixture[str], damage: str
):
    state = [f"client.state-dir={runs.base / 'state'}"]
    whole = runs("whole", *MEMORY, f"client.state-dir={runs.base / 'state-whole'}")
    folder = runs.crashed("killed", *MEMORY, *state, after=4)
    newest = checkpoint(folder, 4)
    data = newest.read_bytes()
    if damage == "flip":
        flip(newest)
    else:
        newest.write_bytes(data[: len(data) // 2 if damage == "truncate" else 0])
    capsys.readouterr()
    assert runs.resume(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{newest.name}: damaged (its checksum differs); not used" in lines
    assert "resumed after round 3 of 5" in lines
    assert reached(folder) == reached(whole)
    assert in_state_dir(runs.base / "state") == in_state_dir(runs.base / "state-whole")


@pytest.mark.parametrize("alone", ["state directory", "ledger"])
def test_memories_reach_back_as_far_as_checkpoints(runs: Runs, alone: str):
    """Killed when all clients have saved round 5 and its checkpoint is not written; that of round
    4 is damaged, so that the memories of round 3 are needed: those of one side alone."""
    state = runs.base / "state"
    on_disk = ["server.ledger=false", f"client.state-dir={state}"]
    settings = [*MEMORY, *(on_disk if alone == "state directory" else [])]
    whole = runs("whole", *MEMORY)

    def prepare() -> None:
        write = Checkpoints.write

        def writing(self, saved) -> None:
            if saved.round == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, saved)

        Checkpoints.write = writing

    crash(prepare, runs.command("killed", *settings))
    folder = runs.base / "killed"
    flip(checkpoint(folder, 4))
    assert runs.resume(folder) == 0
    assert summary(folder)["resumed_after_rounds"] == [3]
    left = reached(folder)
    if alone == "state directory":
        left["ledger"] = in_state_dir(state)
        assert "memory_given_back" not in summary(folder)
    assert left == reached(whole)


def test_without_a_good_checkpoint_nothing_starts_anew(
    runs: Runs, capsys: pytest.CaptureFixture[str]
):
    folder = runs.crashed("killed", *MEMORY, after=3)
    for path in (folder / "checkpoints").iterdir():
        flip(path, 0.9)
    before = contents(folder)
    for _ in range(2):
        assert runs.resume(folder) == 3
        told = failure(capsys)
        assert "no good checkpoint (2 damaged); this run cannot be resumed" in told
        assert "start it again under another run.name" in told
        assert contents(folder) == before
    shutil.rmtree(folder / "checkpoints")
    assert runs.resume(folder) == 3
    assert "no good checkpoint; this run cannot be resumed" in failure(capsys)
    assert len(history(folder)) == 3


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that tells why a run failed."""
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("run failed: ")]
    assert len(lines) == 1, out
    assert err == ""
    assert not ("cannot be resumed" in out and "continue it with" in out)
    return lines[0]


def test_a_model_that_was_deleted_is_made_again(runs: Runs):
    folder = runs("whole")
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    assert runs.resume(folder) == 0
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_historys_unfinished_line_is_dropped(runs: Runs):
    """And whole rows of rounds that no good checkpoint knows."""
    whole = runs("whole")
    folder = runs.crashed("killed", after=3)
    flip(checkpoint(folder, 3))
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"round": 4, "cohort": [0, ')
    assert runs.resume(folder) == 0
    assert history(folder) == history(whole)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_history_is_an_error(runs: Runs, capsys: pytest.CaptureFixture[str], damage: str):
    folder = runs.crashed("killed", after=3)
    path = folder / "history.jsonl"
    data = path.read_bytes()
    if damage == "flip":
        flip(path)
    else:
        path.unlink() if damage == "remove" else path.write_bytes(data[:-20])
    assert runs.resume(folder) == 3
    told = failure(capsys)
    assert f"{path}: its first {len(data)} bytes are not what round 3 left" in told
    assert "this run cannot be resumed" in told
    path.write_bytes(data)  # from a backup
    assert runs.resume(folder) == 0


# Settings


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a mistake in the call."""
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_the_command_is_explained(capsys: pytest.CaptureFixture[str]):
    for command, words in (
        (["--help"], ["resume", "continue a run that ended early", "flatfed resume results/NAME"]),
        (["resume", "--help"], ["DIR", "the run's results folder", "key=value"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words), shown


def test_a_folder_that_holds_no_run(runs: Runs, capsys: pytest.CaptureFixture[str]):
    (runs.base / "empty").mkdir()
    (runs.base / "file").write_text("text")
    for name in ("absent", "empty", "file"):
        folder = runs.base / name
        assert main(["resume", str(folder)]) == 2
        told = refusal(capsys)
        assert str(folder) in told
        assert "there is no run to resume" in told
    assert not (runs.base / "absent").exists()
    assert os.listdir(runs.base / "empty") == []


def test_a_damaged_config_is_an_error(runs: Runs, capsys: pytest.CaptureFixture[str]):
    folder = runs.crashed("killed", after=2)
    for text in ('{"run.rounds": 5, ', "[]"):
        (folder / "config.json").write_text(text)
        assert main(["resume", str(folder)]) == 2
        assert f"{folder / 'config.json'}: cannot be read" in refusal(capsys)


def test_a_damaged_summary_does_not_keep_a_run_from_going_on(runs: Runs):
    folder = runs.crashed("summary", after=2)
    (folder / "summary.json").write_text("[]")
    assert main(["resume", str(folder)]) == 0
    assert read_summary(folder)["status"] == "completed"


def test_a_completed_run_is_left_as_it_is(runs: Runs, capsys: pytest.CaptureFixture[str]):
    folder = runs("done")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert runs.resume(folder) == 0
    out, err = capsys.readouterr()
    assert out == (
        f"{folder}: completed, all 5 rounds; nothing is left to do; for more rounds: "
        f"flatfed resume {folder} run.rounds=N\n"
    )
    assert err == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("setting", "was"),
    [
        ("train.lr=0.2", "0.1"),
        ("run.seed=1", "0"),
        ("clients.per-round=1", "0"),
        ("strategy.name=fedavg", "scaffold"),
        ("scaffold.eta-g=0.5", "1.0"),
        ("server.ledger=false", "true"),
        ("train.keep-optimizer=true", "false"),
    ],
)
def test_a_resumed_run_keeps_its_settings(
    runs: Runs, capsys: pytest.CaptureFixture[str], setting: str, was: str
):
    folder = runs.crashed("killed", *MEMORY, after=2)
    before = (folder / "config.json").read_bytes()
    assert runs.resume(folder, setting) == 2
    told = refusal(capsys)
    key = setting.partition("=")[0]
    assert told.startswith(f"error: {key} = ")
    assert f"has {was}, and a resumed run keeps its settings; leave it out" in told
    assert (folder / "config.json").read_bytes() == before
    assert runs.resume(folder, f"{key}={was}") == 0


def test_unknown_keys_are_mistakes_here_too(runs: Runs, capsys: pytest.CaptureFixture[str]):
    folder = runs.crashed("killed", after=2)
    assert runs.resume(folder, "train.lrr=0.1") == 2
    assert "train.lrr: unknown key; did you mean train.lr?" in refusal(capsys)
    assert runs.resume(folder, "run.rounds=many") == 2
    assert "run.rounds" in refusal(capsys)


def test_settings_that_compute_nothing_may_change(runs: Runs):
    whole = runs("whole", *MEMORY)
    folder = runs.crashed("killed", *MEMORY, after=2)
    changed = ["clients.deadline-s=60", "clients.max-failed-rounds=1"]
    assert runs.resume(folder, *changed, f"client.state-dir={runs.base / 'state'}") == 0
    assert reached(folder) == reached(whole)
    assert in_state_dir(runs.base / "state") == memories(folder / "ledger")


def test_a_run_of_an_engine_goes_on_without_what_belongs_to_it(runs: Runs):
    whole, folder = runs("whole"), runs.crashed("killed", after=2)
    told = json.loads((folder / "config.json").read_text())
    of_ray = {"engine.name": "ray", "engine.client-gpus": 0.25}
    (folder / "config.json").write_text(json.dumps(told | of_ray))
    assert runs.resume(folder, "engine.name=inprocess", "engine.client-gpus=0") == 0
    assert reached(folder) == reached(whole)


def test_the_settings_come_from_a_file_too(runs: Runs, capsys: pytest.CaptureFixture[str]):
    folder = runs.crashed("killed", after=2)
    (runs.base / "more.toml").write_text("[run]\nrounds = 6\n")
    assert runs.resume(folder, "--config", str(runs.base / "more.toml")) == 0
    assert summary(folder)["rounds"] == 6
    (runs.base / "other.toml").write_text("[train]\nlr = 0.5\n")
    assert runs.resume(folder, "--config", str(runs.base / "other.toml")) == 2
    assert "train.lr = 0.5" in refusal(capsys)


def test_a_count_in_a_file_is_the_one_that_the_run_has(runs: Runs):
    (runs.base / "two.toml").write_text("[engine]\ncohort = 2\n")
    file = ["--config", str(runs.base / "two.toml")]
    folder = runs("two", *file, "run.rounds=1")
    assert runs.resume(folder, *file, "run.rounds=2") == 0


@pytest.mark.parametrize("method", ["scaffold", "flwr:FedAdam", "averages"])
def test_more_rounds_are_a_longer_run(runs: Runs, method: str):
    """A run's last round has a checkpoint, whatever `server.checkpoint-every`."""
    settings = [*METHODS[method], "server.checkpoint-every=2"]
    whole = runs("whole", *settings, "run.rounds=8")
    folder = runs("short", *settings, "run.rounds=3")
    assert runs.resume(folder, "run.rounds=8") == 0
    assert reached(folder) == reached(whole)
    assert summary(folder)["resumed_after_rounds"] == [3]
    assert json.loads((folder / "config.json").read_text())["run.rounds"] == 8


def test_a_longer_run_has_no_model_until_its_end(runs: Runs):
    folder = runs("short", "run.rounds=2")
    crash(lambda: kill_after(3), ["resume", str(folder), "run.rounds=4"])
    assert not (folder / "model.safetensors").exists()
    assert "model_sha256" not in summary(folder)


def test_fewer_rounds_than_are_done(runs: Runs, capsys: pytest.CaptureFixture[str]):
    done = runs("done")
    assert runs.resume(done, "run.rounds=4") == 2
    assert refusal(capsys) == "error: run.rounds = 4: 5 rounds are already done\n"
    killed = runs.crashed("killed", after=3)
    capsys.readouterr()
    assert runs.resume(killed, "run.rounds=2") == 3
    assert "run.rounds = 2: 3 rounds are already done" in failure(capsys)
    assert runs.resume(killed, "run.rounds=5") == 0
    assert reached(killed) == reached(done)


def test_no_run_ends_with_a_round_that_was_not_evaluated(
    runs: Runs, capsys: pytest.CaptureFixture[str]
):
    """Its accuracy would be an earlier model's."""
    whole = runs("whole", "eval.every=2", "run.rounds=4")
    folder = runs.crashed("killed", "eval.every=2", after=3)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert runs.resume(folder, "run.rounds=3") == 3
    why = "run.rounds = 3: round 3 is already done and was not evaluated (eval.every = 2); give a "
    why += "larger number"
    assert why in failure(capsys)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert runs.resume(folder, "run.rounds=4") == 0
    assert reached(folder) == reached(whole)


def test_resume_is_a_setting_of_run_too(runs: Runs, capsys: pytest.CaptureFixture[str]):
    whole = runs("whole")
    folder = runs.crashed("killed", after=2)
    place = [f"run.output-dir={runs.base}", "run.name=killed"]
    assert main(["run", *place]) == 2
    told = refusal(capsys)
    assert f"{folder} exists and is not overwritten" in told
    assert told.endswith(f"; to continue that run: flatfed resume {folder}\n")
    assert main(["run", *place, "run.resume=true"]) == 0
    assert reached(folder) == reached(whole)
    assert main(["run", "run.resume=true"]) == 2
    assert "run.resume = true: needs the run.name" in refusal(capsys)


def test_a_run_may_be_moved(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """And is named by any path that leads to it."""
    whole = runs("whole", *MEMORY)
    folder = runs.crashed("killed", *MEMORY, after=2)
    elsewhere = runs.base / "other" / "disk" / "renamed"
    elsewhere.parent.mkdir(parents=True)
    folder.rename(elsewhere)
    monkeypatch.chdir(elsewhere.parent)
    release()
    assert main(["resume", "./renamed/"]) == 0
    assert reached(elsewhere) == reached(whole)
    assert not folder.exists()


# One process at a time


def test_a_run_that_is_at_work_is_left_alone(runs: Runs, capsys: pytest.CaptureFixture[str]):
    """Even one that stands still; when it is gone, the run can be continued."""
    whole, child = runs("whole"), os.fork()
    if not child:
        told = Progress.row

        def row(self, row: dict) -> None:
            told(self, row)
            if row["round"] == 2:
                os.kill(os.getpid(), signal.SIGSTOP)

        Progress.row = row
        main(runs.command("first"))
        os._exit(99)
    folder = runs.base / "first"
    try:
        _, status = os.waitpid(child, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        before = contents(folder)
        capsys.readouterr()
        assert runs.resume(folder) == 2
        assert f"{folder}: another process is working on this run" in capsys.readouterr().err
        assert contents(folder) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert runs.resume(folder) == 0
    assert reached(folder) == reached(whole)


# Memory that is lost


MOMENTUM = ["train.epochs=2", "train.momentum=0.9", "train.keep-optimizer=true"]


def test_kept_momentum_survives_in_the_state_directory(runs: Runs):
    whole = runs("whole", *MOMENTUM)
    fresh = runs("fresh", *MOMENTUM[:2])
    assert summary(whole)["model_sha256"] != summary(fresh)["model_sha256"]
    for after in (1, 4):
        state = runs.base / f"state-{after}"
        folder = runs.crashed(
            f"killed-{after}", *MOMENTUM, f"client.state-dir={state}", after=after
        )
        assert runs.resume(folder) == 0
        assert reached(folder) == reached(whole)


def test_the_command_that_continues_a_run_can_be_pasted(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def row(progress: Progress, row: dict) -> None:
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "row", row)
        assert main(runs.command("my run")) == 3
    start = "continue it with: "
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(start)]
    release()
    assert main(shlex.split(lines[0].removeprefix(start))[1:]) == 0
    assert summary(runs.base / "my run")["status"] == "completed"
    capsys.readouterr()
    assert runs.resume(runs.base / "my run") == 0
    command = capsys.readouterr().out.split("for more rounds: ")[1].replace("=N", "=6")
    release()
    assert main(shlex.split(command)[1:]) == 0
    assert len(history(runs.base / "my run")) == 6


def test_kept_momentum_that_is_lost_ends_the_run(runs: Runs, capsys: pytest.CaptureFixture[str]):
    folder = runs.crashed("killed", *MOMENTUM, after=3)
    for _ in range(2):
        assert runs.resume(folder) == 3
        told = failure(capsys)
        assert re.search(r"client \d has lost its memory of round 3", told)
        assert "the server cannot know the momentum in it (train.keep-optimizer)" in told
        assert "set client.state-dir (a node has its own, --state-dir)" in told
        assert summary(folder)["status"] == "failed"
        assert summary(folder)["error"] == told.removeprefix("run failed: ")


def test_without_a_ledger_a_lost_memory_ends_the_run(
    runs: Runs, capsys: pytest.CaptureFixture[str]
):
    settings = [*MEMORY, "server.ledger=false"]
    whole = runs("whole", *MEMORY)
    folder = runs.crashed("killed", *settings, after=2)
    for _ in range(2):
        assert runs.resume(folder) == 3
        # Of two clients beside each other, whoever answers first.
        assert re.search(
            "client [01] has lost its memory of round 2, and server.ledger = false keeps no copy",
            failure(capsys),
        )
    assert len(history(folder)) == 2
    # With a state directory it is not lost.
    state = runs.base / "state"
    kept = runs.crashed("kept", *settings, f"client.state-dir={state}", after=2)
    assert runs.resume(kept) == 0
    assert reached(kept) == reached(whole) | {"ledger": {}}
    assert in_state_dir(state) == memories(whole / "ledger")


@pytest.mark.parametrize("lost", ["all", "one", "damaged"])
def test_a_lost_memory_is_given_back(runs: Runs, lost: str):
    state = runs.base / "state"
    whole = runs("whole", *MEMORY)
    folder = runs.crashed("killed", *MEMORY, f"client.state-dir={state}", after=3)
    (experiment,) = state.iterdir()
    if lost == "all":
        shutil.rmtree(state)
    elif lost == "one":
        shutil.rmtree(experiment / "000001")
    else:
        (path,) = (experiment / "000001").glob("000003-*")
        flip(path)
    assert runs.resume(folder) == 0
    assert reached(folder) == reached(whole)
    assert in_state_dir(state) == memories(folder / "ledger")
    # c_i is one float64.
    down = {"bytes": 8 * len(("model", "c", "c_i"))}
    assert summary(folder)["memory_given_back"] == [
        {"round": 4, "client": client, **down} for client in ([0, 1] if lost == "all" else [1])
    ]


def test_a_memory_that_is_lost_on_both_sides_ends_the_run(
    runs: Runs, capsys: pytest.CaptureFixture[str]
):
    folder = runs.crashed("killed", *MEMORY, after=3)
    (path,) = (folder / "ledger" / "000001").glob("000003-*")
    flip(path)
    assert runs.resume(folder) == 3
    told = failure(capsys)
    assert "what client 1 remembered of round 3 is missing or damaged" in told


def test_a_damaged_ledger_is_no_loss_while_the_clients_have_their_own(
    runs: Runs, capsys: pytest.CaptureFixture[str]
):
    state = runs.base / "state"
    whole = runs("whole", *MEMORY)
    folder = runs.crashed("killed", *MEMORY, f"client.state-dir={state}", after=3)
    (path,) = (folder / "ledger" / "000001").glob("000003-*")
    flip(path)
    capsys.readouterr()
    assert runs.resume(folder) == 0
    told = capsys.readouterr().out
    assert "what client 1 remembered of round 3 is missing or damaged" in told
    assert "the client has its own copy" in told
    assert summary(folder)["model_sha256"] == summary(whole)["model_sha256"]
    assert history(folder) == history(whole)
    assert in_state_dir(state) == memories(whole / "ledger")


def test_what_could_not_be_resumed_is_told_at_the_start(
    runs: Runs, capsys: pytest.CaptureFixture[str]
):
    state = f"client.state-dir={runs.base / 'state'}"
    for i, (settings, why) in enumerate(
        (
            (MOMENTUM, "train.keep-optimizer without client.state-dir"),
            ([*MEMORY, "server.ledger=false"], "server.ledger=false without client.state-dir"),
            ([*MOMENTUM, state], ""),
            ([*MEMORY, "server.ledger=false", state], ""),
            (["server.ledger=false"], ""),
        )
    ):
        runs(f"run{i}", *settings)
        told = [line for line in capsys.readouterr().out.splitlines() if "be resumed" in line]
        assert told == ([f"warning: {why}: this run cannot be resumed"] if why else [])


def test_nodes_on_their_own_can_go_on_by_flwr_run_too():
    """Which leaves `engine.name` at its default."""
    config = resolve({"train.momentum": 0.9, "train.keep-optimizer": True})
    assert len(_unresumable(config, "inprocess")) == len(_unresumable(config, "ray")) == 1
    assert _unresumable(config, "grpc") == []


def test_clients_with_other_data(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """As many samples as before, but not the same.  The run stays as it was."""
    folder = runs.crashed("killed", after=2)
    before = (folder / "summary.json").read_bytes()
    same = assembly.load_data(None)
    monkeypatch.setattr(assembly, "load_data", lambda config: replace(same, fingerprint="new"))
    assert runs.resume(folder) == 3
    why = "clients 0, 1: other data than when the run began; give them the same data again, or "
    why += "start a new run"
    assert why in failure(capsys)
    assert (folder / "summary.json").read_bytes() == before


def test_a_completed_run_is_not_extended_with_other_data(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = runs("whole")
    before = {path: (folder / path).read_bytes() for path in ("summary.json", "clients.json")}
    other = replace(assembly.load_data(None), fingerprint="new")
    monkeypatch.setattr(assembly, "load_data", lambda config: other)
    toy.install(monkeypatch, n=(3, 1))
    assert runs.resume(folder, "run.rounds=50") == 3
    told = capsys.readouterr().out
    assert "when the run began; give them" in told and "pictures" not in told
    assert {path: (folder / path).read_bytes() for path in before} == before


def test_clients_with_other_numbers_of_samples(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    whole = runs("whole")
    folder = runs.crashed("killed", after=2)
    toy.install(monkeypatch, n=(4, 3))
    assert runs.resume(folder) == 3
    assert "client 1: 3 training samples, 2 when the run began; give them" in failure(capsys)
    toy.install(monkeypatch, n=(4, 2))
    assert runs.resume(folder) == 0
    assert reached(folder) == reached(whole)


def test_a_model_of_another_shape(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = runs.crashed("killed", after=2)

    class Wider(toy.Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    monkeypatch.setattr(assembly, "new_model", lambda *args: Wider())
    assert runs.resume(folder) == 3
    assert "the checkpoint's params are not those of mlp" in failure(capsys)


# A full disk


def no_room() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


NEEDS_ROOM = {"write", "fsync", "replace", "mkdir"}


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.crash)])
def test_a_disk_that_is_full_at_any_call(
    runs: Runs, capsys: pytest.CaptureFixture[str], step: int, lasting: bool
):
    """Full from some call on, or for that one call alone.  The run ends with one line, nothing
    unfinished stays, and with room again it goes on to the same end."""
    whole = runs("whole", *MEMORY)
    calls = calls_of(runs.command("counted", *MEMORY))
    last = max(i for i, name in enumerate(calls, 1) if name in NEEDS_ROOM)
    for call in dict.fromkeys([*range(1, len(calls) + 1, step), last]):
        if calls[call - 1] not in NEEDS_ROOM:
            continue

        def at(n: int, name: str, call: int = call) -> None:
            if name in NEEDS_ROOM and (n >= call if lasting else n == call):
                raise no_room()

        name = f"full-{call}"
        folder = runs.base / name
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            watch_the_disk(patch, at)
            assert main(runs.command(name, *MEMORY)) == 3
        told = failure(capsys)
        assert "No space left on device" in told
        assert str(folder) in told
        assert leftovers(folder) == []
        rows = history(folder) if (folder / "history.jsonl").exists() else []
        if (told := read_summary(folder)).get("status") == "failed":  # there was room for that
            assert told["rounds"] == len(rows)
        begun = any(folder.glob("checkpoints/*.safetensors"))
        code = runs.resume(folder)
        if not begun:
            assert code in (2, 3)
            continue
        assert code == 0
        assert reached(folder) == reached(whole), f"full at call {call}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "feddc"])
def test_a_disk_that_is_really_full(
    small_disk: Path,
    runs: Runs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
):
    """Somebody fills it after round 2."""
    whole = runs("whole", *METHODS[method])
    ballast, told = small_disk / "ballast", Progress.row

    def row(self, row: dict) -> None:
        told(self, row)
        if row["round"] == 2:
            free = os.statvfs(small_disk)
            ballast.write_bytes(bytes(free.f_bavail * free.f_frsize))

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "row", row)
        capsys.readouterr()
        assert main(Runs(small_disk).command("full", *METHODS[method])) == 3
    folder = small_disk / "full"
    out, err = capsys.readouterr()
    assert err == ""
    assert f"run failed: round 3: {folder}" in out
    assert "No space left on device; the rounds done before it are kept" in out
    assert f"continue it with: flatfed resume {folder}" in out
    assert leftovers(folder) == []
    assert len(history(folder)) in (2, 3)  # whole rows only
    assert runs.resume(folder) == 3  # there is still no room
    assert leftovers(folder) == []
    ballast.unlink()
    assert runs.resume(folder) == 0
    assert reached(folder) == reached(whole)


def test_a_disk_that_is_full_from_the_start(
    small_disk: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
):
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize))
    assert main(Runs(small_disk).command("full")) == 3
    assert "No space left on device" in failure(capsys)
    assert leftovers(small_disk / "full") == []


def test_a_clients_full_disk_costs_its_reply(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """A node of its own: the round goes on without it and says so, and it is back in the next."""
    state, write = runs.base / "state", snapshots.write_checked

    def full(folder: Path, stem: str, data: bytes) -> Path:
        if state in folder.parents and folder.name == "000001" and stem.startswith("000003"):
            raise no_room()
        return write(folder, stem, data)

    monkeypatch.setattr(snapshots, "write_checked", full)
    folder = runs("full", *MEMORY, f"client.state-dir={state}")
    rows = history(folder)
    assert [row["replies"] for row in rows] == [[0, 1], [0, 1], [0], [0, 1], [0, 1]]
    assert "No space left on device" in rows[2]["failed"]["1"]
    assert in_state_dir(state) == memories(folder / "ledger")
    assert not list(runs.base.rglob("000001/000003-*"))


def test_a_row_that_finds_no_room_leaves_whole_rows(small_disk: Path):
    """A full disk takes the part of a row that fits into the file's last block."""
    recorder = Recorder(small_disk / "run")
    free = os.statvfs(small_disk)
    row = {"round": 0, "client_cpu_s": 0.5, "cohort": list(range(300))}
    recorder.row(dict(row))
    (small_disk / "ballast").write_bytes(bytes((free.f_bavail - 2) * free.f_frsize))
    with pytest.raises(OSError, match="No space left"):
        for i in range(1, 1000):
            recorder.row(row | {"round": i})
    text = (recorder.folder / "history.jsonl").read_bytes()
    assert [json.loads(line)["round"] for line in text.splitlines()] == list(range(i))
    assert 2 <= i < 20
    assert recorder.facts()["history"]["bytes"] == len(text)


def test_failed_rounds_in_a_row_are_counted_through_a_crash(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """All replies of rounds 2 to 4 are NaN; the third such round ends the run."""
    spoil(monkeypatch, range(2, 5))
    folder = runs.crashed("killed", *MEMORY, after=3)
    assert runs.resume(folder) == 3
    assert "failed round 3 in a row (clients.max-failed-rounds)" in failure(capsys)
    assert [row["replies"] for row in history(folder)] == [[0, 1], [], [], []]


@pytest.mark.parametrize("every", [1, 3])
def test_the_round_that_ended_a_run_is_played_again(runs: Runs, every: int):
    """It is in the history until then, with who was rejected, and once afterwards."""
    settings = [*MEMORY, f"server.checkpoint-every={every}", "clients.max-failed-rounds=1"]
    whole = runs("whole", *settings)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, [4])
        assert main(runs.command("ended", *settings)) == 3
        folder = runs.base / "ended"
        for _ in range(2):
            rows = history(folder)
            assert [row["round"] for row in rows] == [1, 2, 3, 4]
            assert [{*row["rejected"]} for row in rows] == [set(), set(), set(), {"0", "1"}]
            assert summary(folder)["rounds"] == 4
            assert runs.resume(folder) == 3  # and ends the same way
    assert runs.resume(folder) == 0
    assert summary(folder)["resumed_after_rounds"] == [3, 3, 3]
    assert reached(folder) == reached(whole)


def test_the_round_that_ended_a_run_is_not_done(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The rounds before it may be all that there are."""
    whole = runs("whole", *MEMORY, "run.rounds=3")
    spoil(monkeypatch, [4])
    assert main(runs.command("ended", *MEMORY, "clients.max-failed-rounds=1")) == 3
    capsys.readouterr()
    assert runs.resume(runs.base / "ended", "run.rounds=2") == 3
    assert "run.rounds = 2: 3 rounds are already done" in failure(capsys)
    assert runs.resume(runs.base / "ended", "run.rounds=3") == 0
    assert reached(runs.base / "ended") == reached(whole)


def spoil(patch: pytest.MonkeyPatch, rounds: Container[int]) -> None:
    """All replies of these rounds are NaN."""
    honest = Clients.train

    def train(self, partition: int, content, state):
        reply = honest(self, partition, content, state)
        if content[wire.CONFIG]["server-round"] in rounds and wire.ARRAYS in reply:
            wire.unpack(reply[wire.ARRAYS])["params"].fill_(float("nan"))
        return reply

    patch.setattr(Clients, "train", train)
