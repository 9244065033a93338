"""`flatfed node`: every mistake is one line and exit code 2, before a SuperNode is started."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from living import wait_for

from fl_client import node, node_checks
from fl_client.node_checks import Node, NodeError
from fl_server.certificates import CA, SERVER, SERVER_KEY, make_certificates, make_node_key
from fl_server.cli import main


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates: good ones, of another CA, for another host, and expired ones."""
    folder = tmp_path_factory.mktemp("keys")
    local = ["127.0.0.1", "localhost"]
    make_certificates(folder / "good", local)
    make_certificates(folder / "other", local)
    make_certificates(folder / "elsewhere", ["superlink.example"])
    make_certificates(folder / "expired", local, days=-1)
    make_node_key(folder / "node")
    return folder


@pytest.fixture(scope="module")
def servers(keys: Path):
    """Ports of gRPC servers: one without TLS, and one with each set of certificates."""
    ports, started = {}, []
    for kind in ("plaintext", "good", "elsewhere", "expired"):
        server = grpc.server(ThreadPoolExecutor(1))
        started.append(server)
        if kind == "plaintext":
            ports[kind] = server.add_insecure_port("127.0.0.1:0")
        else:
            pair = [(keys / kind / name).read_bytes() for name in (SERVER_KEY, SERVER)]
            credentials = grpc.ssl_server_credentials([tuple(pair)])
            ports[kind] = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
    yield ports
    for server in started:
        server.stop(0)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which `flatfed node` ends, in less than five seconds."""
    started = time.monotonic()
    assert main(["node", "--wait", "0", *map(str, arguments)]) == 2
    assert time.monotonic() - started < 5
    output, line = capsys.readouterr()
    assert output == ""
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    ("server", "ca", "reason"),
    [
        ("plaintext", "good", "speaks plaintext, not TLS; give the server certificates"),
        ("good", "other", "is not signed by"),
        ("elsewhere", "elsewhere", "does not name 127.0.0.1 (SAN)"),
        ("expired", "expired", "expired on"),
        ("good", "", "is not signed by this machine's certificate authorities"),
    ],
)
def test_certificates(keys, servers, capsys, server: str, ca: str, reason: str):
    options = ["--root-certificates", keys / ca / CA] if ca else []
    address = f"127.0.0.1:{servers[server]}"
    assert reason in refusal(capsys, "--superlink", address, "--partition", 0, *options)


def test_expired_server_certificate(keys, servers):
    port, root = servers["expired"], keys / "expired" / CA
    given = Node(f"127.0.0.1:{port}", root_certificates=root, wait=0)
    with pytest.raises(NodeError, match="renew it on the server, or correct this machine's"):
        node_checks._check_server(given, "127.0.0.1", port)


def test_tls_server_without_tls(servers, capsys):
    address = f"127.0.0.1:{servers['good']}"
    line = refusal(capsys, "--superlink", address, "--partition", 0, "--insecure")
    assert "does not speak plaintext gRPC; leave --insecure out" in line


@pytest.mark.parametrize("kind", ["plaintext", "good"])
def test_good_servers_pass(keys, servers, kind: str):
    tls = {"root_certificates": keys / "good" / CA, "auth_key": keys / "node"}
    options = tls if kind == "good" else {"insecure": True}
    node_checks.check(Node(f"localhost:{servers[kind]}", {"partition-id": 0}, **options))


@pytest.mark.parametrize("tls", [False, True])
def test_port_of_the_http_api(keys, capsys, tls: bool):
    """The SuperLink's other port, served by uvicorn."""
    ssl_files = {
        "ssl_certfile": keys / "good" / SERVER,
        "ssl_keyfile": keys / "good" / SERVER_KEY,
    }
    settings = {"port": 0, "lifespan": "off", "log_level": "critical", **(ssl_files if tls else {})}
    server = uvicorn.Server(uvicorn.Config(None, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    assert wait_for(lambda: server.started, 10)
    address = f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    option = ["--root-certificates", keys / "good" / CA] if tls else ["--insecure"]
    try:
        line = refusal(capsys, "--superlink", address, "--partition", 0, *option)
    finally:
        server.should_exit = True
        thread.join()
    assert "not its port for nodes; give the one of --fleet-api-address" in line


@pytest.mark.parametrize(
    ("server", "ca", "reason"),
    [
        ("good", "good", "that is its port for nodes; give the one of --port"),
        ("plaintext", "", "that is its port for nodes; give the one of --port"),
        ("good", "", "gRPC; leave insecure = true out if it has TLS, and give root-certificates"),
        ("plaintext", "good", "speaks plaintext, not TLS"),
        ("good", "other", "is not signed by"),
        ("good", "none", ""),
    ],
)
def test_connections_for_registering(keys, servers, server: str, ca: str, reason: str):
    """With `ca` or, without, insecure = true."""
    address, root = f"127.0.0.1:{servers[server]}", str(keys / ca / CA) if ca else None
    why = node_checks.why_unavailable(address, root, insecure=not ca)
    assert reason in why
    assert bool(why) == bool(reason)
    assert "--insecure" not in why and "--root" not in why


class HttpProxy:
    """Connects whom it is asked for, or refuses to; counts both."""

    def __init__(self, *, open_: bool) -> None:
        self.open, self.asked = open_, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.server.accept()
                self.asked += 1
                host, _, port = near.recv(4096).split()[1].decode().rpartition(":")
                if not self.open:
                    near.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                    near.close()
                    continue
                # Names are the proxy's to know: a hospital's node may know none outside.
                far = socket.create_connection(("127.0.0.1" if host == "outside" else host, port))
                near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=(source, sink), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch):
    for name in (*node_checks.PROXIES, "no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, "")  # put back as it was, whatever the node sets
        monkeypatch.delenv(name)


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux alone")
@pytest.mark.parametrize("name", node_checks.PROXIES)
def test_a_proxy_that_does_not_let_grpc_through(
    capsys, monkeypatch: pytest.MonkeyPatch, no_proxies, name: str
):
    """The server can be reached, but not where the SuperNode will look for it."""
    server, proxy = grpc.server(ThreadPoolExecutor(1)), HttpProxy(open_=False)
    address = f"127.0.0.2:{server.add_insecure_port('127.0.0.2:0')}"
    server.start()
    monkeypatch.setenv(name, proxy.url)
    monkeypatch.setenv("no_proxy", "elsewhere.example")
    line = refusal(capsys, "--superlink", address, "--partition", 0, "--insecure")
    assert f"not through the proxy that gRPC takes from {name}; have the proxy let it" in line
    assert "or add 127.0.0.2 to no_proxy" in line
    assert proxy.asked
    monkeypatch.setenv("no_proxy", "127.0.0.2")
    node_checks.check(Node(address, {"partition-id": 0}, insecure=True))
    server.stop(0)


def test_a_server_behind_a_proxy(servers, monkeypatch: pytest.MonkeyPatch, no_proxies):
    """It has no other way there."""
    proxy = HttpProxy(open_=True)
    monkeypatch.setenv("https_proxy", proxy.url)
    given = {"superlink": f"outside:{servers['plaintext']}", "config": {"partition-id": 0}}
    node_checks.check(Node(insecure=True, **given))
    assert proxy.asked


def test_nobody_listens(capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    line = refusal(capsys, "--superlink", address, "--partition", 0, "--insecure")
    assert "connection refused; start the SuperLink" in line


def test_server_that_comes_up_later():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(f"127.0.0.1:{port}")
    threading.Timer(1.0, server.start).start()
    node_checks.check(Node(f"127.0.0.1:{port}", {"partition-id": 0}, insecure=True, wait=20))
    server.stop(0)


def test_a_network_that_comes_up_later(servers, monkeypatch: pytest.MonkeyPatch):
    """A machine that boots has no DNS yet: that is no mistake in --superlink."""
    connect, calls = socket.create_connection, []

    def connecting(*arguments: object) -> socket.socket:
        calls.append(arguments)
        if len(calls) < 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return connect(*arguments)

    monkeypatch.setattr(node_checks.socket, "create_connection", connecting)
    given = Node(f"localhost:{servers['plaintext']}", insecure=True, wait=0)
    with pytest.raises(NodeError, match="no DNS server answers; check this machine's network"):
        node_checks._check_server(given, "localhost", servers["plaintext"])
    calls.clear()
    node_checks._check_server(replace(given, wait=20), "localhost", servers["plaintext"])
    assert len(calls) == 3


def test_port_in_use(servers, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(
            capsys,
            *("--superlink", f"127.0.0.1:{servers['plaintext']}", "--insecure"),
            *("--partition", 0, "--port", port),
        )
    assert f"--port {port}: Address already in use; give another" in line


def test_keys(keys, tmp_path: Path, capsys):
    def refused(path: Path) -> str:
        return refusal(capsys, "--superlink", "h:1", "--partition", 0, "--auth-key", path)

    assert "No such file or directory" in refused(tmp_path / "none")
    assert "not an OpenSSH private key; make one: ssh-keygen" in refused(keys / "node.pub")
    assert "not an OpenSSH private key" in refused(keys / "good" / SERVER_KEY)
    for name, options in (("rsa", ["-t", "rsa"]), ("secret", ["-t", "ecdsa", "-N", "word"])):
        command = ["ssh-keygen", "-q", *options, "-f", str(tmp_path / name)]
        command += [] if "-N" in options else ["-N", ""]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            pytest.skip("no ssh-keygen")
    assert "not an EC key on a NIST curve" in refused(tmp_path / "rsa")
    assert "has a passphrase" in refused(tmp_path / "secret")


def test_a_key_that_others_can_read_is_told(tmp_path: Path, capsys):
    make_node_key(tmp_path / "key")
    node_checks._check_key(tmp_path / "key")
    assert capsys.readouterr().err == ""
    (tmp_path / "key").chmod(0o640)
    node_checks._check_key(tmp_path / "key")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: --auth-key {tmp_path}/key: others")
    assert line.endswith(f"chmod 600 {tmp_path}/key")


def test_keys_of_ssh_keygen_are_taken(tmp_path: Path):
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "key"]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        pytest.skip("no ssh-keygen")
    node_checks._check_key(tmp_path / "key")


def test_root_certificates(keys, tmp_path: Path, capsys):
    for path, reason in (
        (tmp_path / "none", "No such file or directory"),
        (keys / "good" / SERVER_KEY, "not a PEM certificate"),
        (keys / "expired" / CA, "expired on"),
    ):
        line = refusal(capsys, "--superlink", "h:1", "--partition", 0, "--root-certificates", path)
        assert f"--root-certificates {path}: {reason}" in line


def test_trusted_entities(keys, tmp_path: Path, capsys):
    path = tmp_path / "trusted.yaml"
    for text in (None, "[", "one: 5", "one: ssh-ed25519 AAAA", f"one: {(keys / 'node.pub')}", ""):
        if text is not None:
            path.write_text(text)
        line = refusal(capsys, "--superlink", "h:1", "--partition", 0, "--trusted-entities", path)
        reason = "No such file" if text is None else "not a YAML table of key ids and public keys"
        assert f"--trusted-entities {path}: {reason}" in line
    key = Ed25519PrivateKey.generate().public_key()
    public = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    path.write_text(f"fpk_one: '{public} someone'\n")
    node_checks._check_trusted(path)
    given = list(node._arguments(Node("h:1", {"partition-id": 0}, trusted_entities=path)))
    assert given[-2:] == ["--trusted-entities", str(path)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--superlink", "host"], "must be HOST:PORT"),
        (["--superlink", "https://h:1"], "must be HOST:PORT"),
        (["--superlink", "h:1"], "no partition: give --partition N"),
        (["--superlink", "h:1", "--partition", "-1"], "partition-id = -1: must be a whole number"),
        (["--superlink", "h:1", "--partition", "0", "partition-id=1"], "given twice, 0 and 1"),
        (["--superlink", "h:1", "partition-id=x"], "partition-id = x: must be a whole number"),
        (["--superlink", "h:1", "partition-id=2", "num-partitions=2"], "less than num-partitions"),
        (["--superlink", "h:1", "partition-id=0", "threads=0"], "threads = 0: must be"),
        (["--superlink", "h:1", "partition-id=0", "data_path=x"], "did you mean data-path?"),
        (["--superlink", "h:1", "partition-id=0", "data-path=/nowhere"], "does not exist"),
        (["--superlink", "h:1", "partition-id=0", "device=tpu"], "must be auto, cpu, cuda"),
        (["--superlink", "h:1", "partition-id=0", "device=cuda:99"], "this machine has"),
        (["--superlink", "h:1", "partition-id=0", "worker-socket=/nowhere"], "no trainer is there"),
        (["--superlink", "h:1", "partition-id=0", "state-dir=/dev/null/x"], "Not a directory"),
        (["--superlink", "h:1", "partition-id=0", "--poll-interval", "0"], "greater than 0"),
        (["--superlink", "h:1", "partition-id=0", "--wait", "nan"], "--wait nan: must be at least"),
        (["--superlink", "h:1", "partition-id=0", "--insecure", "--auth-key", "k"], "needs TLS"),
        (["--superlink", "h:1", "partition-id=0", "device=cuda:01"], "must be auto, cpu, cuda"),
        (["--superlink", ".h:1", "partition-id=0", "--insecure"], "no such host; correct --superl"),
        (["--superlink", "h:1", "key"], "written key=value"),
        (["--superlink", "h:1", "partition-id=0", "dp_clip=1"], "did you mean dp-clip?"),
        (["--superlink", "h:1", "partition-id=0", "dp-clip=x"], "dp-clip = x: must be a number"),
        (
            ["--superlink", "h:1", "partition-id=0", "dp-clip=1", "dp-delta=1"],
            "dp-delta = 1.0: must be",
        ),
        (
            ["--superlink", "h:1", "partition-id=0", "dp-clip=1", "dp-delta=0"],
            "dp-delta = 0.0: must be",
        ),
        (
            ["--superlink", "h:1", "partition-id=0", "dp-epsilon=1"],
            "no noise without dp-clip; give",
        ),
        (
            ["--superlink", "h:1", "partition-id=0", "dp-delta=1e-5"],
            "no noise without dp-clip; give",
        ),
    ],
)
def test_settings(capsys, arguments: list[str], reason: str):
    assert reason in refusal(capsys, *arguments)


def test_flowers_home_that_cannot_be_written_to(tmp_path: Path, capsys, monkeypatch):
    """There the app goes that the node is sent."""
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    line = refusal(capsys, "--superlink", "h:1", "--partition", 0, "--insecure")
    assert f"error: FLWR_HOME: {tmp_path}/home cannot be written to (Not a directory); set" in line


STARTING = (logging.INFO, "Starting Flower SuperNode")
REFUSED = (logging.ERROR, "Exit Code: 305\nNo connection.\n[code: 2004] Failed.\n\nFor more: <h>")
STOPPING = (logging.INFO, "FastAPI lifespan: shutdown")
ONLINE = (logging.INFO, "SuperNode ID: 7")
RETRY = (logging.WARNING, "Connection attempt failed, retrying")
OTHER = (logging.ERROR, "Exit Code: 300\n...")


@pytest.mark.parametrize(
    ("logged", "shown"),
    [
        ([STARTING, REFUSED, STOPPING], []),
        ([STARTING, ONLINE, STOPPING], [STARTING, ONLINE, STOPPING]),
        ([STARTING, RETRY, REFUSED], [STARTING, RETRY, REFUSED]),
        ([STARTING, OTHER, STOPPING], [STARTING, OTHER, STOPPING]),
    ],
)
def test_a_refusal_is_one_line(caplog: pytest.LogCaptureFixture, logged: list, shown: list):
    """Flower's log waits until the node is in, or until something else is wrong."""
    opening, logger = node.Opening(), logging.getLogger("test_opening")
    logger.setLevel(logging.INFO)
    logger.addFilter(opening)
    for level, text in logged:
        logger.log(level, text)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == shown
    assert bool(opening.refusal) == (not shown)
    assert opening.refusal in ("", "No connection. [code: 2004] Failed.")
    logger.removeFilter(opening)


class Denying(grpc.GenericRpcHandler):
    """Has a reason against every request."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def service(self, handler_call_details):
        def deny(request: bytes, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, self.reason)

        return grpc.unary_unary_rpc_method_handler(deny)


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("Invalid timestamp", "because its clock and this machine's differ"),
        ("Invalid node ID", "(Invalid node ID): its key is no longer registered"),
    ],
)
def test_a_denied_request_is_told(reason: str, told: str):
    """Flower sends itself Ctrl-C then, and ends with 0."""
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Denying(reason)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    command = [Path(sys.executable).with_name("flatfed"), "node", "--insecure", "--partition", "0"]
    command += ["--no-preload", "--superlink", f"127.0.0.1:{port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    server.stop(0)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: SuperLink 127.0.0.1:{port} ") and told in line


def test_the_line_of_flower_that_tells_of_a_refusal():
    """It is known by its exit code and its loggers' names."""
    from flwr.supercore.exit import ExitCode
    from flwr.supercore.logger import FLOWER_LOGGER

    assert f"Exit Code: {ExitCode.SUPERNODE_CONNECTION_ERROR}\n" == node.REFUSED
    assert logging.getLogger(node.LOGGERS[0]) is FLOWER_LOGGER


def test_what_flower_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Flower's own reader gets back what was given, blanks and quotes included."""
    from flwr.common.config import parse_config_args

    config = {"partition-id": 3, "data-path": "/a b/\\é", "name": 'say "x"', "device": "cpu"}
    given = list(node._arguments(Node("h:1", config)))
    assert parse_config_args([given[given.index("--node-config") + 1]]) == config
    with pytest.raises(NodeError, match="both kinds of quotes"):
        list(node._arguments(Node("h:1", {"partition-id": 0, "x": "\"'"})))


SERVED = """
import os, sys, time
import flwr.supernode.cli
from fl_client import node
from fl_client.node_checks import Node
def supernode():
    given = sys.argv[sys.argv.index("--node-config") + 1]
    path = given.partition('worker-socket="')[2].partition('"')[0]
    end = time.monotonic() + 60
    while not os.path.exists(path):
        assert time.monotonic() < end, path
        time.sleep(0.1)
flwr.supernode.cli.flower_supernode = supernode
node.serve(Node("127.0.0.1:1", {"partition-id": 0}, insecure=True, worker=True))
"""


def test_sockets_have_room_whatever_the_folder_of_temporary_files(tmp_path: Path):
    root = tmp_path / ("x" * 100)
    root.mkdir()
    env = {**os.environ, "TMPDIR": str(root)}
    subprocess.run([sys.executable, "-c", SERVED], env=env, check=True, timeout=100)


ENDED = """
import importlib, os, signal, time
from flwr.supercore.exit import add_exit_handler
from flwr.supercore.telemetry import EventType
from fl_client import node
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
node.end_once()
def end():
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    print("ended", flush=True)
add_exit_handler(end)
module = importlib.import_module(node.SUPERNODE)
module.register_signal_handlers(event_type=EventType.RUN_SUPERNODE_LEAVE)
os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_second_signal_does_not_break_off_a_nodes_end():
    """Flower's end of a SuperNode goes on to its last handler, and its exit code stays 0."""
    command = [sys.executable, "-c", ENDED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_the_lines_of_flower_that_polling_replaces():
    """`poll_every` knows Flower's pauses by their literal lengths.

    If this fails after an update of Flower, look where its SuperNode waits now.
    """
    source = Path(importlib.util.find_spec(node.SUPERNODE).origin).read_text()
    assert re.findall(r"\btime\.(\w+)\((.*)\)", source) == [
        ("sleep", str(node.IDLE_S)),
        ("sleep", str(node.REPLY_S)),
        ("sleep", str(node.REPLY_S)),
    ]
    assert re.findall(r"^import time$", source, re.MULTILINE) == ["import time"]


def test_polling_interval(monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module(node.SUPERNODE)
    monkeypatch.setattr(module, "time", module.time)
    slept, now = [], [1000.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(node.time, "sleep", sleep)
    monkeypatch.setattr(node.time, "monotonic", lambda: now[0])
    node.poll_every(0.2)
    for seconds in (node.IDLE_S, node.REPLY_S, 7):
        module.time.sleep(seconds)
    assert slept == [0.2, 0.05, 7]
    # a pause is a hundredth of the time without work, which a message ends
    slept.clear()
    while slept[-1:] != [3]:
        idle = sum(slept)
        module.time.sleep(node.IDLE_S)
        assert slept[-1] == pytest.approx(min(3, max(0.2, idle / 100)))
    now[0] += 3600.0
    module.time.sleep(node.REPLY_S)
    module.time.sleep(node.IDLE_S)
    assert slept[-3:] == [3, 0.05, 0.2]
    node.poll_every(5)
    module.time.sleep(node.IDLE_S)
    assert slept[-1] == 5
    assert module.time.monotonic() > 0
