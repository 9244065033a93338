"""docker/: the image, the federation of docker/compose.yml, and the demo, under a real engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from tests.conftest import Runner

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PROJECT, DEMO = "flatfed-test", "flatfed-demo"
SETTINGS = ("strategy.name=feddc", "model.norm=group", "run.rounds=4")
CLIENTS = ("client-0", "client-1", "client-2")
COMPOSED = yaml.safe_load((DOCKER / "compose.yml").read_text())["services"]
PLUGIN = ["docker", "compose"]


def answers(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def missing() -> str:
    """Why containers cannot be run here; "" if they can."""
    if not answers("docker", "info"):
        return "no Docker engine answers"
    if not (answers(*PLUGIN, "version") or answers("docker-compose", "version")):
        return "neither `docker compose` nor docker-compose is there"
    return ""


def run(*command: str | Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=1500
    )
    assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def ports() -> dict[str, str]:
    """Free ones for the two that are published."""
    from fl_common.sockets import free_port

    return {"FLATFED_HTTP_PORT": str(free_port()), "FLATFED_NODE_PORT": str(free_port())}


@pytest.mark.parametrize("name", list(COMPOSED))
def test_every_service_is_locked_in(name: str):
    service = COMPOSED[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "user"}
    inside = [str(port).rpartition(":")[2] for port in service.get("ports", [])]
    assert inside == (["8000", "9092"] if name == "superlink" else [])


def test_clients_see_their_own_keys_alone():
    for name in CLIENTS:
        keys = [v for v in COMPOSED[name]["volumes"] if "keys" in v]
        assert [key.endswith(f":-{name}-keys}}:/keys:ro") for key in keys] == [True]


def test_the_gpu_file_names_known_services():
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yml").read_text())["services"]
    assert gpu.keys() == COMPOSED.keys()
    for name in CLIENTS:
        (device,) = gpu[name]["deploy"]["resources"]["reservations"]["devices"]
        assert len(device["device_ids"]) == 1


def test_the_setup_goes_on_without_node_keys_that_were_brought_away(tmp_path: Path):
    """The script as it is, in other folders and without the work of `flatfed certs`."""
    script = tmp_path / "setup.sh"
    script.write_text((DOCKER / "setup.sh").read_text().replace("/keys/", f"{tmp_path}/"))
    for name in ("server", "admin/nodes", "client-0", "client-1", "client-2", "bin"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("ca.crt", "server.pem", "server.key", "keys.json", "nodes/0", "nodes/2"):
        (tmp_path / "admin" / name).touch()
    (tmp_path / "bin/flatfed").symlink_to("/bin/true")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    run("sh", script, PATH=path, FLWR_HOME=str(tmp_path / "flower"))
    keys = sorted(str(key.relative_to(tmp_path)) for key in tmp_path.glob("client-*/*"))
    assert keys == [
        *("client-0/ca.crt", "client-0/node.key", "client-1/ca.crt"),
        *("client-2/ca.crt", "client-2/node.key"),
    ]
    assert (tmp_path / "flower/config.toml").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="sh")
def test_the_demo_without_an_engine_is_one_line():
    done = run(DOCKER / "demo.sh", check=False, DOCKER_HOST="unix:///nowhere/docker.sock")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    # Which of them is missing depends on the machine.
    assert line.startswith("error: ")
    assert re.search("no Docker engine answers|is not installed|is installed", line)


@pytest.fixture(scope="module")
def image() -> str:
    if reason := missing():
        pytest.skip(reason)
    network = os.environ.get("FLATFED_BUILD_NETWORK", "host")
    options = ["--network", network, "--file", "docker/Dockerfile", "--tag", "flatfed:cpu"]
    mirrors = ["--build-arg", "PIP_INDEX_URL", "--build-arg", "PIP_EXTRA_INDEX_URL"]
    run("docker", "build", *mirrors, *options, ".")
    return "flatfed:cpu"


@pytest.fixture(scope="module")
def alone(image: str) -> dict:
    """Summary of the run in one process, with the image's torch."""
    settings = " ".join([*SETTINGS, "clients.number=3", "run.output-dir=/tmp", "run.name=alone"])
    call = f"flatfed run {settings} run.pictures=false >&2 && cat /tmp/alone/summary.json"
    return json.loads(run("docker", "run", "--rm", image, "sh", "-c", call).stdout)


def left(project: str) -> list[str]:
    """Containers, volumes and networks of a compose project."""
    label = f"label=com.docker.compose.project={project}"
    found = []
    for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
        found += run("docker", *kind, "--quiet", "--filter", label).stdout.split()
    return found


class Composed:
    """The federation of docker/compose.yml."""

    def __init__(self) -> None:
        self.env = ports()
        base = PLUGIN if answers(*PLUGIN, "version") else ["docker-compose"]
        self.base = [*base, "-p", PROJECT, "-f", "docker/compose.yml"]

    def __call__(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*self.base, *arguments, check=check, **self.env)

    def container(self, service: str) -> str:
        return self("ps", "-q", service).stdout.strip()

    def summary(self, name: str) -> dict:
        path = f"/results/{name}/summary.json"
        return json.loads(run("docker", "exec", self.container("superlink"), "cat", path).stdout)

    def submit(self, name: str, *settings: str) -> Iterator[str]:
        """The lines of a run, as they come; it has to end well."""
        job = ["run", "-T", "--no-deps", "--rm", "run", f"run.name={name}", *SETTINGS, *settings]
        with subprocess.Popen(
            [*self.base, *job],
            cwd=ROOT,
            env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            limit = threading.Timer(1200, process.kill)
            limit.start()
            try:
                yield from process.stdout
            finally:
                limit.cancel()
        assert process.returncode == 0


@pytest.fixture(scope="module")
def composed(image: str) -> Iterator[Composed]:
    compose = Composed()
    try:
        compose("up", "--detach")
        yield compose
    finally:
        compose("down", "--volumes", "--remove-orphans", check=False)
    assert left(PROJECT) == []


@pytest.mark.long
def test_the_image_has_no_compiler_and_no_root(image: str):
    look = "id -u; for tool in gcc cc g++ clang make; do command -v $tool; done; id -u > /empty/x"
    done = run("docker", "run", "--rm", image, "sh", "-c", look, check=False)
    assert done.stdout.split() == ["10001"]
    assert done.returncode != 0  # not even its working directory is its own
    history = run("docker", "history", "--no-trunc", image).stdout
    assert "INDEX_URL" not in history


@pytest.mark.long
def test_two_ports_and_users_without_rights(composed: Composed):
    published = {}
    for name in ("superlink", *CLIENTS):
        facts = json.loads(run("docker", "inspect", composed.container(name)).stdout)[0]
        published |= {k: name for k, v in facts["NetworkSettings"]["Ports"].items() if v}
        assert facts["Config"]["User"] == "10001:10001"
        assert facts["HostConfig"]["ReadonlyRootfs"] is True
        assert facts["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert published == {"8000/tcp": "superlink", "9092/tcp": "superlink"}
    keys = run("docker", "exec", composed.container("client-1"), "ls", "/keys").stdout.split()
    assert keys == ["ca.crt", "node.key"]


@pytest.mark.long
def test_a_client_that_is_killed_changes_no_bit(composed: Composed, alone: dict):
    for line in composed.submit("killed", "clients.return-s=600"):
        print(line, end="")
        if line.startswith("round 2/4"):
            victim = composed.container("client-1")
            run("docker", "kill", victim)
            time.sleep(1)
            run("docker", "start", victim)
    found = composed.summary("killed")
    assert found["engine"] == "grpc"
    assert found["model_sha256"] == alone["model_sha256"]
    deadline = time.monotonic() + 120
    for name in ("superlink", *CLIENTS):
        health = ""
        while health != "healthy" and time.monotonic() < deadline:
            state = ("inspect", "--format", "{{.State.Health.Status}}", composed.container(name))
            health = run("docker", *state).stdout.strip()
            time.sleep(1)
        assert health == "healthy", name


@pytest.mark.long
def test_the_demo(image: str, alone: dict, runner: Runner):
    """Last: with it, nothing of the federation above may be needed any more."""
    done = run("make", "compose-demo", **ports())
    folder = Path(re.findall(r"(?m)^results: (.*)$", done.stdout)[-1])
    found = json.loads((folder / "summary.json").read_text())
    keys = json.loads((folder / "config.json").read_text())["clients.keys"]
    shutil.rmtree(folder)
    assert folder.parent == ROOT / "results"
    assert (found["status"], found["engine"], found["clients"]) == ("completed", "grpc", 3)
    assert keys == "/keys/keys.json"
    assert left(DEMO) == []

    settings = ("strategy.name=feddc", "model.norm=group", "run.rounds=10", "clients.number=3")
    if version("torch") == found["versions"]["torch"]:  # other builds of torch give other bits
        here = runner(*settings).summary
        assert here["model_sha256"] == found["model_sha256"]
    call = f"flatfed run {' '.join(settings)} run.output-dir=/tmp run.name=r run.pictures=false >&2"
    inside = run("docker", "run", "--rm", image, "sh", "-c", f"{call}; cat /tmp/r/summary.json")
    assert json.loads(inside.stdout)["model_sha256"] == found["model_sha256"]
