"""Processes that are killed at random moments, and runs that end as if nothing had happened.

The server is killed in the middle of a random round; nodes and the ServerApp of a real federation
are killed too.  The final model, the history less its times and every client's memory must be
those of the uninterrupted run, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
from living import MARK, wait_for
from safetensors import safe_open
from test_grpc import FLATFED, Place, federation

from fl_common import processes
from tests.memories import in_state_dir, memories, reached, summary

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

ROUNDS = 6
SETTINGS = [
    f"run.rounds={ROUNDS}",
    "clients.number=4",
    "clients.per-round=3",
    "train.lr-decay=0.95",
    "train.device=cpu",
]
STRATEGIES = {
    "fedavg": ["train.momentum=0.9"],
    "scaffold": ["strategy.name=scaffold"],
    "feddyn": ["strategy.name=feddyn", "feddyn.alpha=0.1"],
    "feddc": ["strategy.name=feddc", "feddc.alpha=0.1"],
}


def settings_of(strategy: str, on_disk: bool) -> list[str]:
    """With a state directory FedAvg's clients remember something too."""
    kept = ["train.keep-optimizer=true"] if on_disk and strategy == "fedavg" else []
    return [*SETTINGS, *STRATEGIES[strategy], *kept]


class Run:
    """A results folder `run` and, if clients keep their memory on disk, a folder `state`."""

    def __init__(self, base: Path, on_disk: bool) -> None:
        base.mkdir(exist_ok=True)
        self.base, self.on_disk = base, on_disk
        self.folder, self.state, self.log = base / "run", base / "state", base / "log.txt"
        self.history = self.folder / "history.jsonl"

    @property
    def where(self) -> list[str]:
        return [f"client.state-dir={self.state}"] if self.on_disk else []

    def begin(self, strategy: str) -> list[str]:
        """The command of a new run."""
        place = [f"run.output-dir={self.base}", "run.name=run", "run.pictures=false"]
        return ["run", *place, *settings_of(strategy, self.on_disk), *self.where]

    @property
    def resume(self) -> list[str]:
        return ["resume", str(self.folder), *self.where]

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [FLATFED, *command], cwd=self.base, stdout=log, stderr=subprocess.STDOUT
            )

    def complete(self, command: list[str]) -> dict[str, Any]:
        """What must be as without a crash."""
        code = self.start(command).wait(timeout=300)
        assert code == 0, self.log.read_text()
        found = reached(self.folder)
        if self.on_disk:
            found["clients"] = in_state_dir(self.state)
            assert found["ledger"] in ({}, found["clients"])
            assert "memory_given_back" not in summary(self.folder)
        return found

    def kill(self, command: list[str], rng: random.Random, after: int, round_s: float) -> int:
        """Kill it at a random moment of a random round later than `after`; gives the round, or 0
        if the run was faster."""
        before, within = rng.randrange(after, ROUNDS), rng.random() * round_s
        begins = f"round {before}/" if before > after else "resumed after"
        process = self.start(command)

        def the_round_begins() -> bool:
            first = command[0] == "run" and not before
            told = self.checkpoints() if first else begins in self.log.read_text()
            return bool(told) or process.poll() is not None

        try:
            assert wait_for(the_round_begins, 120), self.log.read_text()
            process.wait(within)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
        code = process.wait(timeout=60)
        told = self.log.read_text()
        assert code in (0, -signal.SIGKILL), told
        done = re.findall(r"(?:^round +|resumed after round )(\d+)(?:/| of)", told, re.MULTILINE)
        playing = int(done[-1]) + 1 if done else 1
        return playing if code and playing <= ROUNDS else 0

    def checkpoints(self) -> list[Path]:
        found = (self.folder / "checkpoints").glob("*.safetensors")
        return sorted(found, key=lambda path: int(path.name[:6]))

    def copy(self, base: Path) -> Run:
        shutil.copytree(self.base, base)
        return Run(base, self.on_disk)


class Yard:
    """Where runs are killed, and the uninterrupted ones that they are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole: dict[tuple[str, bool], tuple[dict[str, Any], float]] = {}
        self.locks = {(s, on_disk): Lock() for s in STRATEGIES for on_disk in (True, False)}

    def uninterrupted(self, strategy: str, on_disk: bool) -> tuple[dict[str, Any], float]:
        """What it left, and the seconds of one of its rounds."""
        key = strategy, on_disk
        with self.locks[key]:
            if key not in self.whole:
                run = Run(self.folder / f"{strategy}-{on_disk}", on_disk)
                found = run.complete(run.begin(strategy))
                assert len(found.get("clients", found["ledger"])) == (
                    0 if strategy == "fedavg" and not on_disk else 4
                )
                seconds = [json.loads(line)["seconds"] for line in run.history.open()]
                self.whole[key] = found, sum(seconds) / ROUNDS
        return self.whole[key]

    def crash(self, strategy: str, seed: int, on_disk: bool, kills: int, damaged: bool) -> str:
        """Kill a run and continue it; with `damaged`, once more with the newest checkpoint
        damaged.  Gives a line that says when it was killed."""
        expected, round_s = self.uninterrupted(strategy, on_disk)
        rng, base = random.Random(f"{strategy} {seed}"), self.folder / f"{strategy}-{seed}"
        killed: list[int] = []
        while len(killed) < kills:
            run = Run(base, on_disk)
            command = run.resume if killed else run.begin(strategy)
            after = killed[-1] - 1 if killed else 0
            if server_round := run.kill(command, rng, after, round_s):
                killed.append(server_round)
            else:
                shutil.rmtree(base)
                killed = []
        copy = run.copy(base.with_name(f"{base.name}-damaged")) if damaged else None
        assert run.complete(run.resume) == expected
        told = f"{strategy}, seed {seed}: killed in round {' and '.join(map(str, killed))}"
        if copy and len(copy.checkpoints()) > 1:
            newest = copy.checkpoints()[-1]
            damage(newest, rng)
            assert copy.complete(copy.resume) == expected
            assert f"{newest.name}: damaged" in copy.log.read_text()
            told += f"; {newest.name[:6]} damaged"
        return told


def damage(path: Path, rng: random.Random) -> None:
    """A flipped bit anywhere, or a truncation anywhere."""
    data = bytearray(path.read_bytes())
    where = rng.randrange(len(data))
    if rng.random() < 0.5:
        data[where] ^= 1 << rng.randrange(8)
    else:
        del data[where:]
    path.write_bytes(data)


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    return Yard(tmp_path_factory.mktemp("yard"))


def crash_all(yard: Yard, cases: list[tuple[str, int, bool, int, bool]]) -> None:
    """Two at a time."""
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(lambda case: yard.crash(*case), cases):
            print(line)


def test_a_server_that_is_killed(yard: Yard):
    """The short form of the next one: three kills."""
    crash_all(yard, [("scaffold", 100, True, 1, True), ("feddc", 101, False, 2, False)])


@pytest.mark.crash
@pytest.mark.parametrize("seed", range(20))
def test_a_server_that_is_killed_at_any_moment(yard: Yard, seed: int):
    """Every other one has a state directory, every other two a damaged checkpoint, and every
    fourth is killed twice, so that each strategy meets all of it together too."""
    cases = [
        (strategy, seed, n % 2 == 0, 2 if n // 4 % 4 == 0 else 1, n // 2 % 2 == 0)
        for strategy, n in zip(STRATEGIES, range(seed, seed + 4), strict=True)
    ]
    crash_all(yard, cases)


# Real nodes

TWO = [
    "strategy.name=scaffold",
    "clients.number=2",
    "run.rounds=8",
    "train.epochs=3",
    "train.lr-decay=0.95",
    "train.device=cpu",
]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Two nodes with TLS and keys, and the uninterrupted run `whole`."""
    folder = tmp_path_factory.mktemp("nodes")
    for place in federation(folder, "--clients", "2"):
        place.run("whole", "inprocess", *TWO, f"client.state-dir={folder / 'state-whole'}")
        yield place


def submit(place: Place, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [FLATFED, "run", "engine.name=grpc", f"run.output-dir={place.folder}", f"run.name={name}",
         *TWO],
        cwd=place.folder,
        env=place.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def rounds_done(folder: Path) -> int:
    path = folder / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def experiment(place: Place, name: str) -> Path:
    """The folder of this run's memories where nodes keep them unless they are told."""
    newest = max((place.folder / name / "checkpoints").glob("*.safetensors"))
    with safe_open(newest, framework="numpy") as file:
        return place.folder / "home" / "state" / json.loads(file.metadata()["facts"])["experiment"]


def assert_as_whole(place: Place, name: str) -> None:
    """Model, history and memories are those of the run in one process."""
    left, whole = (reached(place.folder / n) for n in (name, "whole"))
    assert left == whole
    assert memories(experiment(place, name)) == in_state_dir(place.folder / "state-whole")


class KilledNode:
    """A node that was killed by SIGKILL, and can be started again as it was."""

    def __init__(self, place: Place, partition: int) -> None:
        state = json.loads((place.folder / "home/up/state.json").read_text())
        self.log = place.folder / f"again-{partition}.log"
        pid = int(list(state["processes"])[1 + partition])  # the SuperLink comes first
        process = Path(f"/proc/{pid}")
        self.command = (process / "cmdline").read_text().split("\0")[:-1]
        assert f"--partition {partition} " in " ".join(self.command)
        entries = (process / "environ").read_text().split("\0")
        self.env = dict(entry.split("=", 1) for entry in entries if entry)
        self.folder = os.readlink(process / "cwd")
        os.kill(pid, signal.SIGKILL)

    def start(self) -> bool:
        """Whether it is a node again; the SuperLink holds its key for a while."""
        with self.log.open("wb") as log:
            node = subprocess.Popen(
                self.command, cwd=self.folder, env=self.env, stdout=log, stderr=log
            )
        wait_for(lambda: node.poll() is not None or "SuperNode ID:" in self.log.read_text(), 30)
        if node.poll() is None:
            return True
        assert "had it within the last minute" in self.log.read_text()
        return False


@pytest.mark.crash
def test_nodes_that_are_killed(nodes: Place):
    """Both at once; one finds its state directory, the other one's was wiped."""
    run, folder = submit(nodes, "nodes-killed"), nodes.folder / "nodes-killed"
    try:
        assert wait_for(lambda: rounds_done(folder) >= 2, 90)
        killed = [KilledNode(nodes, partition) for partition in (0, 1)]
        done = rounds_done(folder)
        assert done < 8
        shutil.rmtree(experiment(nodes, "nodes-killed") / "000001")
        for node in killed:
            assert wait_for(node.start, 150), node.log.read_text()
        output, _ = run.communicate(timeout=240)
    finally:
        run.kill()
    assert run.returncode == 0, output
    print(f"killed after round {done}\n{output}")
    assert_as_whole(nodes, "nodes-killed")
    (given,) = summary(folder)["memory_given_back"]
    assert given["client"] == 1
    assert given["round"] > done
    assert "client 1: its memory was lost and is given back" in output


def processes_of(place: Place, word: str = "") -> list[int]:
    """Of a place, those whose command line has this word."""
    found = []
    for pid in processes.marked(MARK, place.env[MARK]):
        with suppress(OSError):
            if word in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


@pytest.mark.crash
def test_a_server_app_that_is_killed(nodes: Place):
    """`flatfed run` says how to go on, and the same federation continues the run."""
    run, folder = submit(nodes, "app-killed"), nodes.folder / "app-killed"
    try:
        assert wait_for(lambda: rounds_done(folder) >= 3, 90)
        killed = processes_of(nodes, "flwr-serverapp")
        assert killed
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        done = rounds_done(folder)
        output, _ = run.communicate(timeout=240)
    finally:
        run.kill()
    assert done < 8
    assert run.returncode == 3, output
    assert "error: the run failed: its process ended" in output
    assert f"continue it with: flatfed resume {folder}" in output
    told = summary(folder)
    assert told["status"] == "failed" and told["error"].startswith("its process ended")
    assert_resumed(nodes, "app-killed")


@pytest.mark.crash
def test_all_processes_are_killed_at_once(nodes: Place):
    """As when the power fails; a federation that is started anew continues the run."""
    run, folder = submit(nodes, "all-killed"), nodes.folder / "all-killed"
    assert wait_for(lambda: rounds_done(folder) >= 3, 90)
    while pids := processes_of(nodes):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    run.communicate(timeout=10)
    assert rounds_done(folder) < 8
    up = nodes.flatfed("up", "--clients", "2")
    assert up.returncode == 0, up.stderr
    assert_resumed(nodes, "all-killed")


def assert_resumed(place: Place, name: str) -> None:
    folder = place.folder / name
    again = place.flatfed("resume", str(folder))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed after round" in again.stdout
    assert "memory_given_back" not in summary(folder)
    assert_as_whole(place, name)


@pytest.mark.long
def test_a_run_goes_on_on_another_engine(yard: Yard, tmp_path: Path):
    """Begun in one process, killed, continued on Ray; the memories of the state directory are
    used there."""
    expected, round_s = yard.uninterrupted("feddc", True)
    run, rng = Run(tmp_path / "moved", True), random.Random(7)
    assert run.kill(run.begin("feddc"), rng, 0, round_s)
    assert run.complete([*run.resume, "engine.name=ray"]) == expected
    told = summary(run.folder)
    assert told["engine"] == "ray"
    assert "memory_given_back" not in told
