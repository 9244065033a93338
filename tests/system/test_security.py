"""A federation as an administrator sets it up: certificates, keys, a SuperLink, nodes; and those
who have no business there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from flwr.proto import fleet_pb2, fleet_pb2_grpc
from living import living, mark, wait_for

from fl_common.processes import FLOWER
from fl_common.sockets import TAKEN, free_port
from fl_server.certificates import make_certificates, make_node_key

BIN = Path(sys.executable).parent
MODEL = """
from torch import nn

class Wide(nn.Sequential):
    def __init__(self, shape, classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 16384), nn.ReLU(), nn.Linear(16384, classes))
"""
MODEL_BYTES = 4 * (64 * 16384 + 16384 + 16384 * 10 + 10)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


class Proxy:
    """Hands a node's connections on to a port, and counts what comes down to it."""

    def __init__(self, target: int) -> None:
        self.target, self.down = target, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self.server.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # the server has ended before its nodes
                near.close()
                continue
            for source, sink, down in ((near, far, 0), (far, near, 1)):
                threading.Thread(target=self._pump, args=(source, sink, down), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, down: int) -> None:
        try:
            while data := source.recv(1 << 16):
                self.down += down * len(data)
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()


class Site:
    """A server on loopback with the folder of `flatfed certs`; all that it starts, it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, folder / "keys"
        self.port, self.fleet = 0, 0
        for name in ("empty", "flower", "modules", "logs"):
            (folder / name).mkdir()
        (folder / "modules" / "wide.py").write_text(MODEL)
        self.env = {
            **os.environ,
            **FLOWER,
            **mark(),
            "FLATFED_HOME": str(folder / "home"),
            "FLWR_HOME": str(folder / "flower"),
            "PYTHONPATH": str(folder / "modules"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
        }
        self.started: list[subprocess.Popen] = []

    def flatfed(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [BIN / "flatfed", *map(str, arguments)]
        options = {"capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(command, cwd=self.folder / "empty", env=self.env, **options)

    def start(self, name: str, *command: object) -> subprocess.Popen:
        log = (self.folder / "logs" / name).open("wb")
        self.started.append(
            subprocess.Popen(
                [BIN / str(command[0]), *map(str, command[1:])],
                cwd=self.folder / "empty",
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
        return self.started[-1]

    def log(self, name: str) -> str:
        return (self.folder / "logs" / name).read_text(errors="replace")

    def superlink(self) -> subprocess.Popen:
        """On ports that were free a moment ago; on others if they no longer are."""
        while True:
            self.port, self.fleet = free_port(), free_port()
            (self.folder / "flower" / "config.toml").write_text(
                f'[superlink.site]\naddress = "127.0.0.1:{self.port}"\n'
                f'root-certificates = "{self.keys}/ca.crt"\n'
            )
            process = self.start(
                "superlink",
                *("flower-superlink", "--host", "127.0.0.1", "--port", self.port),
                *("--fleet-api-address", f"127.0.0.1:{self.fleet}"),
                *("--ssl-ca-certfile", self.keys / "ca.crt", "--ssl-certfile"),
                *(self.keys / "server.pem", "--ssl-keyfile", self.keys / "server.key"),
                *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            )
            assert wait_for(
                lambda one=process: (
                    one.poll() is not None or "Uvicorn running on" in self.log("superlink")
                ),
                90,
            )
            if process.poll() is None:
                return process
            assert TAKEN.search(self.log("superlink").encode()), self.log("superlink")

    def node_options(self, partition: int, key: object, address: str = "") -> list[object]:
        return [
            *("node", "--superlink", address or f"127.0.0.1:{self.fleet}"),
            *("--root-certificates", self.keys / "ca.crt", "--auth-key", key),
            *("--partition", partition),
        ]

    def node(self, name: str, partition: int, key: int, address: str = "") -> subprocess.Popen:
        options = self.node_options(partition, self.keys / "nodes" / str(key), address)
        process = self.start(name, "flatfed", *options, "--state-dir", self.folder / name)
        assert wait_for(lambda: "SuperNode ID:" in self.log(name), 180), self.log(name)
        return process

    def end(self) -> None:
        for process in reversed(self.started):
            process.send_signal(signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory):
    """A SuperLink that has the keys of three nodes, none of them running."""
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        done = site.flatfed("certs", site.keys, "--host", "127.0.0.1", "--nodes", 3)
        assert done.returncode == 0, done.stderr
        site.superlink()
        done = site.flatfed("register", site.keys / "keys.json", "site")
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stdout.splitlines() if "registered" in line] == [
            line for line in done.stdout.splitlines() if line.startswith("node ")
        ]
        yield site
    finally:
        site.end()
    assert wait_for(lambda: not living(site.env), 60)


def test_what_a_stranger_can_do(site: Site, tmp_path: Path):
    """One line within 5 s and exit code 2, where a stock SuperNode retries for ever."""
    make_certificates(tmp_path, ["127.0.0.1"])
    stranger = make_node_key(tmp_path / "key").with_suffix("")
    (tmp_path / "empty").mkdir()
    fleet, own = f"127.0.0.1:{site.fleet}", site.node_options(0, site.keys / "nodes" / "0")
    taken = socket.create_server(("127.0.0.1", 0))
    for options, reason in (
        (site.node_options(0, stranger), "did not accept this node's key: register it with"),
        ([*own, "--root-certificates", tmp_path / "ca.crt"], "is not signed by"),
        # Another way to write 127.0.0.1, which the certificate has not.
        ([*own, "--superlink", f"127.1:{site.fleet}"], "does not name 127.1 (SAN)"),
        ([*own, "--superlink", f"127.0.0.1:{site.port}"], "that is not its port for nodes"),
        (["node", "--superlink", fleet, "--partition", 0, "--insecure"], "speak plaintext gRPC"),
        ([*own, "--auth-key", tmp_path / "empty"], "Is a directory"),
        ([*own, "--auth-key", site.keys / "nodes" / "0.pub"], "not an OpenSSH private key"),
        ([*own, "--port", taken.getsockname()[1]], "Address already in use"),
        ([*own, "--data-path", tmp_path / "images"], "does not exist"),
    ):
        started, cpu = time.monotonic(), os.times().children_user
        done = site.flatfed(*options)
        # 5 s on a machine that is not busy with other things.
        assert time.monotonic() - started < 30
        assert os.times().children_user - cpu < 5
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert reason in line
    taken.close()


def test_a_node_that_is_interrupted_twice_ends_in_order(site: Site):
    node = site.node("twice", 2, 2)
    for _ in range(2):
        node.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert node.wait(60) == 0, site.log("twice")
    assert "Traceback" not in site.log("twice")


def test_plaintext_gets_nothing(site: Site):
    """At most a TLS alert (type 0x15), which says that this was not TLS."""
    greetings = (b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    for port in (site.port, site.fleet):
        for greeting in greetings:
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                connection.sendall(greeting)
                answer = b""
                try:
                    while part := connection.recv(4096):
                        answer += part
                except (TimeoutError, ConnectionResetError):
                    pass
            assert len(answer) <= 7
            assert answer[:1] in (b"", b"\x15")


def test_tls_without_a_key_gets_nothing(site: Site):
    credentials = grpc.ssl_channel_credentials((site.keys / "ca.crt").read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{site.fleet}", credentials) as channel:
        stub = fleet_pb2_grpc.FleetStub(channel)
        for call, request in (
            (stub.PullMessages, fleet_pb2.PullMessagesRequest()),
            (stub.ActivateNode, fleet_pb2.ActivateNodeRequest(public_key=b"mine")),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call(request, timeout=30)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.long
def test_a_key_that_claims_anothers_partition(site: Site):
    """It is refused, is sent no model, and the run goes on with the right node."""
    honest, impostor = Proxy(site.fleet), Proxy(site.fleet)
    site.node("zero", 0, 0)
    wrong = site.node("impostor", partition=1, key=2, address=impostor.address)
    run = site.start(
        "run",
        *("flatfed", "run", "engine.name=grpc", "engine.connection=site", "clients.number=2"),
        *(f"clients.keys={site.keys}/keys.json", "run.rounds=1", "clients.deadline-s=500"),
        *("model.name=wide:Wide", "data.max-samples=32", "train.device=cpu"),
        *(f"run.output-dir={site.folder}", "run.name=bound", "run.pictures=false"),
    )
    said = "it says partition-id 1, but its key is that of client 2 (clients.keys)"
    assert wait_for(lambda: said in site.log("run"), 300), site.log("run")
    assert wait_for(lambda: f"the server refuses this node: {said}" in site.log("impostor"), 60)
    assert run.poll() is None
    site.node("one", 1, 1, address=honest.address)
    assert run.wait(500) == 0, site.log("run")
    summary = json.loads((site.folder / "bound" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("completed", 1)
    assert json.loads((site.folder / "bound/history.jsonl").read_text())["replies"] == [0, 1]
    # The query and the app's code came to it (less than 1 MB), a model never.
    assert honest.down > MODEL_BYTES
    assert 0 < impostor.down < MODEL_BYTES / 4
    assert wrong.poll() is None  # it may come back with its own partition
    assert site.started[0].poll() is None
