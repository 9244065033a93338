"""Real nodes on loopback: the same model as in one process, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from living import MARK, living, mark, wait_for

from fl_common import processes
from fl_server.certificates import make_node_key

FLATFED = Path(sys.executable).with_name("flatfed")
TIMES = ("seconds", "client_cpu_s")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


class Place:
    """A folder with its own federation and results; `flatfed` called in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules = folder / "modules"
        """Where the processes of this place find modules of one's own."""
        self.modules.mkdir()
        self.env = {
            **os.environ,
            **mark(),
            "FLATFED_HOME": str(folder / "home"),
            "PYTHONPATH": str(self.modules),
        }

    def flatfed(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [FLATFED, *arguments],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def run(self, name: str, engine: str, *settings: str) -> Path:
        """The results folder of a run that completes."""
        place = [f"run.output-dir={self.folder}", f"run.name={name}", "run.pictures=false"]
        done = self.flatfed("run", f"engine.name={engine}", *place, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.folder / name


def federation(folder: Path, *options: str):
    """A place in which `flatfed up` was called; at the end none of its processes lives."""
    place = Place(folder)
    try:
        done = place.flatfed("up", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        yield place
    finally:
        down = place.flatfed("down")
    assert down.returncode == 0, down.stderr
    assert "the federation is down" in down.stdout
    assert not living(place.env)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def less_times(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").open()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory):
    """Two nodes with TLS and keys."""
    yield from federation(tmp_path_factory.mktemp("two"), "--clients", "2")


def test_same_bits_over_tls(two: Place):
    settings = ["clients.number=2", "run.rounds=2", "train.device=cpu"]
    alone = two.run("alone", "inprocess", *settings)
    apart = two.run("apart", "grpc", *settings)
    assert summary(apart)["engine"] == "grpc"
    assert summary(alone)["model_sha256"] == summary(apart)["model_sha256"]
    assert less_times(alone) == less_times(apart)


HOSTILE = '''
from flwr.app import Array

import fl_client.client
from fl_common import wire
from fl_common.data.sources import load as load_digits

honest = fl_client.client.Clients.train

def train(self, partition, content, state):
    """Client 1 sends NaN, then a wrong shape, then 50 MB, then nothing, then an honest reply."""
    reply = honest(self, partition, content, state)
    server_round = int(content["config"]["server-round"])
    if partition == 1:
        record = reply["arrays"]
        params = record["params"].tensor
        if server_round == 1:
            params[3] = float("nan")
        elif server_round == 2:
            record["params"] = wire.TensorArray(params[:-1])
        elif server_round == 3:
            shape = tuple(params.shape)
            record["params"] = Array("float32", shape, "numpy.ndarray", bytes(50_000_000))
        elif server_round == 4:
            raise KeyError("no disk")
    return reply

fl_client.client.Clients.train = train

def load(path, seed):
    data = load_digits("digits")
    return (data.train.x, data.train.y), (data.test.x, data.test.y), data.classes
'''


def test_a_hostile_client_touches_nothing(two: Place):
    (two.modules / "hostile.py").write_text(HOSTILE)
    settings = ["data.source=hostile:load", "clients.number=2", "run.rounds=5", "train.device=cpu"]
    alone = two.run("hostile-alone", "inprocess", *settings)
    apart = two.run("hostile-apart", "grpc", *settings)
    rows = less_times(apart)
    assert [row["replies"] for row in rows] == [[0], [0], [0], [0], [0, 1]]
    assert "1 of 10026 elements are NaN or infinite" in rows[0]["rejected"]["1"]
    assert "float32 [10025] instead of float32 [10026]" in rows[1]["rejected"]["1"]
    assert "50000000 bytes, at most 41128 were expected" in rows[2]["rejected"]["1"]
    line = 1 + HOSTILE.splitlines().index('            raise KeyError("no disk")')
    place = f"{two.modules / 'hostile.py'}:{line}"
    assert rows[3]["failed"] == {"1": f"KeyError: 'no disk' ({place})"}
    assert rows[4]["rejected"] == rows[4]["failed"] == {}
    assert summary(alone)["model_sha256"] == summary(apart)["model_sha256"]
    assert rows == less_times(alone)


def test_keys_are_for_their_owner_alone(two: Place):
    keys = two.folder / "home" / "up" / "keys"
    secret = [keys / "server.key", keys / "node-0", keys / "node-1"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in secret)
    assert keys.stat().st_mode & 0o777 == 0o700


def test_a_second_federation_is_refused(two: Place):
    again = two.flatfed("up", "--clients", "1")
    assert again.returncode == 2
    assert again.stderr.startswith("error: a federation is up already (2 nodes)")


def test_a_node_that_is_not_registered(two: Place):
    state = json.loads((two.folder / "home/up/state.json").read_text())
    keys = two.folder / "home" / "up" / "keys"
    options = ["--partition", "2", "--root-certificates", str(keys / "ca.crt")]
    key = make_node_key(two.folder / "unknown").with_suffix("")
    for more, reason in (
        ([], "give this node's as --auth-key"),
        (["--auth-key", str(key)], "register it with `flatfed register keys.json"),
        (["--auth-key", str(keys / "node-0")], "another node has it"),
    ):
        node = two.flatfed("node", "--superlink", state["fleet"], *options, *more)
        assert node.returncode == 2
        (line,) = node.stderr.splitlines()
        assert reason in line


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)],
)
def test_an_interrupted_run_is_stopped(two: Place, number: int, code: int):
    name = f"interrupted-{number}"
    settings = [f"run.output-dir={two.folder}", f"run.name={name}", "run.rounds=1000"]
    settings.append("run.pictures=false")
    run = subprocess.Popen(
        [FLATFED, "run", "engine.name=grpc", "clients.number=2", *settings],
        cwd=two.folder,
        env=two.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert wait_for((two.folder / name / "history.jsonl").exists, 400)
        run.send_signal(number)
        output, _ = run.communicate(timeout=180)
    finally:
        run.kill()
    assert run.returncode == code
    assert "is stopped" in output
    assert summary(two.folder / name)["status"] == "failed"
    assert wait_for(lambda: not any("flwr-serverapp" in line for line in living(two.env)), 30)


def test_a_run_that_fails(two: Place):
    settings = ["clients.number=3", "clients.deadline-s=2", f"run.output-dir={two.folder}"]
    run = two.flatfed("run", "engine.name=grpc", "run.name=fails", *settings)
    assert run.returncode == 3, run.stdout + run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: the run failed: roll call: clients.number = 3, but ")
    assert "Traceback" not in run.stdout
    assert "Traceback" in (two.folder / "fails/flower.log").read_text()
    assert summary(two.folder / "fails")["status"] == "failed"


def test_mistakes_start_nothing(tmp_path: Path):
    place = Place(tmp_path)
    flower = tmp_path / "flower"
    flower.mkdir()
    place.env["FLWR_HOME"] = str(flower)
    tables = '[superlink.lab]\naddress = "127.0.0.1:1"\n[superlink.local]\naddress = ":local:"\n'
    (flower / "config.toml").write_text(tables)
    for settings, reason in (
        (["engine.name=grpc"], "no federation is up: start one"),
        (["engine.name=grpc", "engine.connection=lap"], "knows lab, local"),
        (["engine.name=grpc", "engine.connection=lab"], "cannot be reached (Connection refused)"),
        (["engine.name=grpc", "engine.connection=local"], "of a local simulation"),
        (["engine.name=ray", "engine.connection=lab"], "belongs to engine.name=grpc"),
    ):
        run = place.flatfed("run", *settings)
        assert run.returncode == 2
        assert reason in run.stderr
        assert run.stderr.count("\n") == 1
    down = place.flatfed("down")
    assert (down.returncode, down.stderr) == (2, "error: no federation is up\n")


def test_a_federation_that_does_not_start(tmp_path: Path):
    """Nothing is left of it, and the node's own line says why."""
    place = Place(tmp_path)
    up = place.flatfed("up", "--clients", "2", "--insecure", "num-partitions=1")
    assert up.returncode == 3
    assert "error: partition-id = 1: must be less than num-partitions = 1" in up.stderr
    assert not living(place.env)
    assert place.flatfed("down").returncode == 2


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory):
    """Four nodes without TLS."""
    yield from federation(tmp_path_factory.mktemp("four"), "--clients", "4", "--insecure")


@pytest.mark.long
@pytest.mark.parametrize("per_round", [0, 2])
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedpart"])
def test_three_engines_give_the_same_bits(four: Place, strategy: str, per_round: int):
    settings = [
        f"strategy.name={strategy}",
        *{
            "fedavg": ["train.keep-optimizer=true"],
            "fedprox": ["fedprox.mu=0.1", "train.keep-optimizer=true"],
            "fedpart": ["fedpart.warm-up=1", "fedpart.rounds-per-group=1", "eval.grad-norm=true"],
        }[strategy],
        "clients.number=4",
        f"clients.per-round={per_round}",
        "run.rounds=5",
        "train.device=cpu",
        "train.momentum=0.9",
    ]
    engines = ("inprocess", "ray", "grpc")
    folders = [four.run(f"{strategy}-{per_round}-{e}", e, *settings) for e in engines]
    assert [summary(folder)["engine"] for folder in folders] == list(engines)
    assert len({summary(folder)["model_sha256"] for folder in folders}) == 1
    rows = [less_times(folder) for folder in folders]
    assert rows[0] == rows[1] == rows[2]
    assert all(len(row["cohort"]) == (per_round or 4) for row in rows[0])


@pytest.mark.long
def test_clientapps_started_anew_give_the_same_bits(tmp_path: Path):
    settings = ["clients.number=2", "run.rounds=2", "train.device=cpu"]
    for place in federation(tmp_path, "--clients", "2", "--insecure", "--no-preload"):
        folders = [place.run(engine, engine, *settings) for engine in ("inprocess", "grpc")]
        assert len({summary(folder)["model_sha256"] for folder in folders}) == 1


@pytest.mark.long
def test_a_superlink_that_dies(tmp_path: Path):
    """The run ends with its own exit code, and `flatfed down` ends the nodes that are left."""
    for place in federation(tmp_path, "--clients", "2", "--insecure"):
        settings = [f"run.output-dir={tmp_path}", "run.name=dies", "run.rounds=1000"]
        run = subprocess.Popen(
            [FLATFED, "run", "engine.name=grpc", "clients.number=2", *settings],
            env=place.env,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert wait_for((tmp_path / "dies" / "history.jsonl").exists, 400)
        state = json.loads((tmp_path / "home/up/state.json").read_text())
        os.kill(int(next(iter(state["processes"]))), signal.SIGKILL)
        _, error = run.communicate(timeout=240)
        assert run.returncode == 3
        assert error.startswith("error: the run failed: the SuperLink does not answer")


@pytest.mark.long
def test_resident_trainers_give_the_same_bits(tmp_path: Path):
    """One of them dies between two runs and is started anew."""
    settings = ["clients.number=2", "run.rounds=3", "train.device=cpu", "strategy.name=scaffold"]
    for place in federation(tmp_path, "--clients", "2", "--insecure", "--worker"):
        one = place.run("one", "inprocess", *settings)
        two = place.run("two", "grpc", *settings)
        trainers = [
            pid
            for pid in processes.marked(MARK, place.env[MARK])
            if b"fl_client.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(trainers) == 2
        os.kill(trainers[0], signal.SIGKILL)
        three = place.run("three", "grpc", *settings)
        assert len({summary(folder)["model_sha256"] for folder in (one, two, three)}) == 1
        assert less_times(two) == less_times(three) == less_times(one)
