"""Real runs of a small Flower app: what the app sees, how the run ends, what is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest
from living import living, mark, wait_for

from fl_common import processes, sockets
from fl_server import flower_run
from fl_server.flower_run import FlowerStatus, run_simulation

pytest.importorskip("flwr")
pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PYPROJECT = """
    [project]
    name = "probe"
    version = "0.1.0"
    description = "Writes down what it sees"
    license = "Apache-2.0"
    [tool.flwr.app]
    publisher = "tests"
    [tool.flwr.app.components]
    serverapp = "probe_server.server_app:app"
    clientapp = "probe_client.client_app:app"
    [tool.flwr.app.config]
    probe.folder = ""
    probe.mode = "return"
    probe.text = "default"
    probe.float = 0.5
    probe.flag = false
    probe.untouched = 1
"""
SERVER_APP = """
    import json, os, time
    from pathlib import Path
    from flwr.app import Message, RecordDict
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid, context):
        config = dict(context.run_config)
        print("the server starts", flush=True)
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.05)
        ask = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
        clients = [dict(reply.content["seen"]) for reply in grid.send_and_receive(ask)]
        seen = {"config": config, "clients": clients, "home": os.environ["FLWR_HOME"]}
        Path(config["probe.folder"], "part").write_text(json.dumps(seen))
        Path(config["probe.folder"], "part").rename(Path(config["probe.folder"], "seen.json"))
        if config["probe.mode"] == "wait":
            time.sleep(600)
        if config["probe.mode"] == "raise":
            raise ValueError("raised by the probe")
"""
CLIENT_APP = """
    import os
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def query(message, context):
        seen = ConfigRecord({
            "files": os.listdir(), "mkl": os.environ["MKL_CBWR"], "home": os.environ["FLWR_HOME"],
            "partition": context.node_config["partition-id"],
        })
        return Message(RecordDict({"seen": seen}), reply_to=message)
"""
CALLER = """
    import json, sys
    from pathlib import Path
    from fl_server.flower_run import run_simulation

    app, config, env = json.loads(sys.argv[1])
    run_simulation(Path(app), config, clients=1, env=env)
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the probe app."""
    folder = tmp_path_factory.mktemp("app")
    for name, text in (
        ("pyproject.toml", PYPROJECT),
        ("probe_server/server_app.py", SERVER_APP),
        ("probe_client/client_app.py", CLIENT_APP),
        ("probe_server/__init__.py", ""),
        ("probe_client/__init__.py", ""),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(dedent(text))
    return folder


@pytest.mark.long
def test_three_runs_at_once(app: Path, tmp_path: Path) -> None:
    """Two succeed and one raises, side by side; each sees its own configuration."""

    def start(number: int) -> tuple[FlowerStatus, dict, list[str], list[str]]:
        (folder := tmp_path / str(number)).mkdir()
        config = {
            "probe.folder": str(folder),
            "probe.mode": "raise" if number == 2 else "return",
            "probe.text": f'{number} "quoted" \\ é\x7f\n',
            "probe.float": 1e-7,
            "probe.flag": True,
        }
        lines, env = [], mark()
        status = run_simulation(app, config, clients=2, on_line=lines.append, env=env)
        seen = json.loads((folder / "seen.json").read_text())
        assert seen["config"] == {**config, "probe.untouched": 1}
        return status, seen, lines, living(env)

    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(start, range(3)))

    for number, (status, seen, lines, left) in enumerate(outcomes):
        assert not left
        assert not Path(seen["home"]).parent.exists()
        assert {client["partition"] for client in seen["clients"]} == {0, 1}
        for client in seen["clients"]:
            assert client["files"] == []
            assert client["mkl"] == "AUTO,STRICT"
            assert client["home"] == seen["home"]
        assert "the server starts" in lines
        assert not any("\x1b" in line or line.startswith("INFO") for line in lines)
        assert status.run_id > 0
        assert status.completed == (number < 2)
    assert outcomes[0][0].status == "finished:completed"
    assert outcomes[0][0].details == ""
    assert outcomes[2][0].status == "finished:failed"
    assert "raised by the probe" in outcomes[2][0].details
    assert "ValueError: raised by the probe" in outcomes[2][2]
    assert len({seen["home"] for _, seen, _, _ in outcomes}) == 3


@pytest.mark.long
def test_terminated_caller_leaves_nothing(app: Path, tmp_path: Path) -> None:
    env = mark()
    job = json.dumps([str(app), {"probe.folder": str(tmp_path), "probe.mode": "wait"}, env])
    root = Path(flower_run.__file__).parents[1]
    caller = subprocess.Popen([sys.executable, "-c", dedent(CALLER), job], cwd=root)
    try:
        assert wait_for((tmp_path / "seen.json").exists, 90)
        running = " ".join(living(env))
        for name in ("flower-superlink", "flower-superexec", "flwr-simulation", "gcs_server"):
            assert name in running
        assert "raylet" in running
        assert "ray::ClientAppActor" in running
    finally:
        caller.send_signal(signal.SIGTERM)
        assert caller.wait(10) == -signal.SIGTERM
    home = json.loads((tmp_path / "seen.json").read_text())["home"]
    assert wait_for(lambda: not living(env) and not Path(home).parent.exists(), 20), living(env)


def test_interrupted_caller_leaves_nothing(app: Path, tmp_path: Path) -> None:
    """An exception in the caller comes out after the last process has ended."""
    env = mark()

    def interrupt(line: str) -> None:
        if line == "the server starts":
            assert "flwr-simulation" in " ".join(living(env))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_simulation(app, {"probe.folder": str(tmp_path)}, clients=1, on_line=interrupt, env=env)
    assert not living(env)


def test_refused_run(app: Path) -> None:
    env, lines = mark(), []
    with pytest.raises(RuntimeError, match=r"Flower refused the run\n.*Invalid run configuration"):
        run_simulation(app, {"probe.unknown": 1}, clients=1, on_line=lines.append, env=env)
    assert lines
    assert not living(env)


def test_values_that_flower_cannot_take(app: Path) -> None:
    with pytest.raises(ValueError, match=r"probe\.list is a list"):
        run_simulation(app, {"probe.list": [1]}, clients=1)
    with pytest.raises(ValueError, match="clients is 0"):
        run_simulation(app, {}, clients=0)


def test_a_keeper_that_ends_before_it_reads_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_run, "KEEPER", "pass")
    longer_than_a_pipe = {"probe.text": "x" * 10**6}
    with pytest.raises(RuntimeError, match="watches over the run ended without an error message"):
        run_simulation(tmp_path, longer_than_a_pipe, clients=1)


@pytest.fixture
def caller_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the keeper's functions run in this process, whose standard input says nothing."""
    monkeypatch.setattr(flower_run, "_pause", lambda: time.sleep(0.05))


def test_taken_port_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caller_stays: None
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", f"{flower_run.BIN}{os.pathsep}{os.environ['PATH']}")
    for name, value in processes.FLOWER.items():
        monkeypatch.setenv(name, value)
    free = sockets.free_port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = iter(taken.getsockname()[1:2])
        monkeypatch.setattr(sockets, "free_port", lambda: next(first, None) or free())
        superlink, port = flower_run._start_superlink(tmp_path)
        assert next(first, None) is None and port != taken.getsockname()[1]
    superlink.terminate()
    superlink.wait()


@pytest.mark.parametrize(
    ("does", "limit", "message"),
    [
        ("exec sleep 6", 3.0, "did not listen within 3 s"),
        ("exit 3", 60.0, "ended at its start with exit code 3"),
    ],
)
def test_superlink_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caller_stays: None, does: str, limit: float,
    message: str,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "flower-superlink").write_text(f"#!/bin/sh\necho a reason; {does}\n")
    (tmp_path / "flower-superlink").chmod(0o755)
    monkeypatch.setattr(flower_run, "BIN", tmp_path)
    monkeypatch.setattr(flower_run, "START_TIMEOUT", limit)
    with pytest.raises(RuntimeError, match=rf"{message}; the end of its log:\na reason"):
        flower_run._start_superlink(tmp_path)


def test_the_share_of_a_gpu_reaches_ray(tmp_path, monkeypatch, capfd):
    """More of them than any machine has, which Ray, not we, then refuses."""
    from fl_server.cli import main

    monkeypatch.setattr("torch.cuda.device_count", lambda: 99)
    place = (f"run.output-dir={tmp_path}", "run.name=shares", "run.rounds=1", "clients.number=2")
    assert main(["run", *place, "engine.name=ray", "engine.client-gpus=99"]) == 3
    assert "resources: {'num_cpus': 1, 'num_gpus': 99.0}" in "".join(capfd.readouterr())
