"""A federation on this machine, for trying things out: `flatfed up` and `flatfed down`.

One SuperLink and N nodes on loopback, detached from the terminal, all in one folder: Flower's home
with the connection `up`, an empty working directory (Flower's processes import from theirs), keys,
logs, and a state file that names every process with its start time.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_common import files, processes, sockets
from fl_server.flower_run import BIN, ENVIRONMENT, without_colours

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CONNECTION = "up"
MARK = "FLATFED_UP"
START_TIMEOUT = 60.0  # s, for the SuperLink to listen
ONLINE_TIMEOUT = 60.0  # s, and NODE_S more for each node, for all nodes to be there
NODE_S = 5.0
STOP_GRACE = 8.0  # s, between SIGTERM and SIGKILL
POLL = 0.1  # s


class UsageError(ValueError):
    """A mistake of the caller, as one line with the remedy."""


class FederationError(RuntimeError):
    """The federation did not start; the first line says why."""


def home() -> Path:
    """The folder of the federation that `flatfed up` starts."""
    return files.home() / "up"


@dataclass(frozen=True)
class Connection:
    """A SuperLink to submit to."""

    name: str
    address: str
    flower_home: Path

    @property
    def on_this_machine(self) -> bool:
        return self.address.startswith(("127.", "localhost:", "[::1]:"))


def connection(name: str) -> Connection:
    """The connection `name` of the user's Flower configuration; "": what `flatfed up` started.

    Raises UsageError if there is none, or if nobody listens there.
    """
    if name:
        found = Connection(name, _address(name), files.flower_home())
        path = found.flower_home / "config.toml"
        remedy = f"start the SuperLink, or correct the address of [superlink.{name}] in {path}"
    else:
        remedy = (
            "start one on this machine with `flatfed up --clients N`, or name a connection with "
            "engine.connection=NAME"
        )
        if not _present(state := _state()):
            raise UsageError(f"no federation is up: {remedy}")
        found = Connection(CONNECTION, state["address"], home() / "flower")
    host, _, port = found.address.removeprefix("https://").rstrip("/").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5.0).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"SuperLink {found.address} cannot be reached ({why}): {remedy}") from None
    return found


def _address(name: str) -> str:
    path = files.flower_home() / "config.toml"
    try:
        table = files.read_toml(path).get("superlink")
    except FileNotFoundError:
        table = None
    except (OSError, ValueError) as error:
        raise UsageError(f"Flower's configuration {path} cannot be read: {error}") from None
    table = table if isinstance(table, dict) else {}
    known = [key for key, value in table.items() if isinstance(value, dict)]
    if name not in known:
        have = f"{path} knows {', '.join(known)}" if known else f"{path} has none"
        raise UsageError(
            f'"{name}": unknown connection; {have}; add [superlink.{name}] with an address there'
        )
    address = str(table[name].get("address", ""))
    if not address or address.startswith(":"):
        raise UsageError(
            f'"{name}": the connection of a local simulation (engine.name=ray), not of a '
            "federation of nodes; choose another"
        )
    return address


def up(
    clients: int,
    *,
    insecure: bool = False,
    data_paths: Sequence[str] = (),
    node_options: Sequence[str] = (),
) -> None:
    """Start a federation of `clients` nodes and wait until all are online.

    `data_paths` holds none, one for all nodes, or one for each; `node_options` go to every
    `flatfed node`.

    Raises:
        UsageError: one is up already, or the arguments are wrong.
        FederationError: it did not start; nothing of it is left.
    """
    if clients < 1:
        raise UsageError(f"--clients {clients}: must be at least 1")
    if len(data_paths) not in (0, 1, clients):
        raise UsageError(f"--data-path: given {len(data_paths)} times; give it once, or {clients}")
    with _alone():
        if _present(state := _state()):
            raise UsageError(
                f"a federation is up already ({_nodes(state['clients'])}); end it with "
                "`flatfed down`"
            )
        starting = Federation(home(), clients, insecure)
        starting.start(data_paths, node_options)
    safety = "no encryption" if insecure else "TLS, one key per node"
    print(f"{_nodes(clients)} online on SuperLink {starting.address} ({safety})")
    print(f"logs: {starting.folder / 'logs'}")
    print(f"next: flatfed run engine.name=grpc clients.number={clients}")
    print("      flatfed down")


def down() -> None:
    """End what `up` started, with all below it, and wait until it is gone.

    Raises:
        UsageError: nothing is up.
        FederationError: a process cannot be ended.
    """
    with _alone():
        state = _state()
        if not _present(state):
            (home() / "state.json").unlink(missing_ok=True)
            stale = "; the processes that it had started have ended" if state else ""
            raise UsageError(f"no federation is up{stale}")
        if left := _end(state):
            raise FederationError(f"processes {sorted(left)} cannot be ended")
        (home() / "state.json").unlink(missing_ok=True)
    print(f"the federation is down: SuperLink and {_nodes(state['clients'])} ended")


def _nodes(count: int) -> str:
    return f"{count} node{'' if count == 1 else 's'}"


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other calls of `up` and `down` out.  Raises UsageError while one is at work."""
    if problem := files.unwritable(home().parent):
        raise UsageError(f"FLATFED_HOME: {problem}; choose another folder")
    home().parent.mkdir(parents=True, exist_ok=True)
    held = files.lock(home().parent)
    if held is None:
        raise UsageError("another `flatfed up` or `flatfed down` is running; wait for it to end")
    with held:
        yield


def _state() -> dict[str, Any]:
    """What `up` wrote; empty if there is nothing, or nothing that can be read."""
    state = files.read_or_empty(home() / "state.json")
    return state if {"boot", "mark", "clients", "address", "processes"} <= state.keys() else {}


def _present(state: dict[str, Any]) -> dict[int, str]:
    """The living processes of a state file's federation, id to start time; none after the machine
    was rebooted.

    The state file names those that `up` started; those that they started are known by the mark in
    their environment, which they keep if their parent ends.
    """
    if not state or state["boot"] != processes.boot():
        return {}
    known = {int(pid): start for pid, start in state["processes"].items()}
    return processes.present(known) | processes.marked(MARK, state["mark"])


def _end(state: dict[str, Any]) -> set[int]:
    """End a federation's processes, those too that one of them started while it was being ended;
    gives those that cannot be ended."""
    while known := _present(state):
        if left := processes.end(known, STOP_GRACE):
            return left
    return set()


class Federation:
    """A federation that is starting; the state file names each process as soon as it runs."""

    def __init__(self, folder: Path, clients: int, insecure: bool) -> None:
        self.folder, self.clients, self.insecure = folder, clients, insecure
        self.keys = folder / "keys"
        self.processes: dict[int, str] = {}
        self.address = self.fleet = ""
        self.env = {
            **os.environ,
            **ENVIRONMENT,
            **sockets.direct(),
            "FLWR_HOME": str(folder / "flower"),
            "FLWR_LOG_LEVEL": "INFO",  # the level at which the SuperLink says that it listens
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONUNBUFFERED": "1",
            MARK: uuid.uuid4().hex,
        }

    @property
    def state(self) -> dict[str, Any]:
        """All that another process needs, to submit to it and to end it."""
        return {
            "boot": processes.boot(),
            "mark": self.env[MARK],
            "clients": self.clients,
            "address": self.address,
            "fleet": self.fleet,
            "processes": self.processes,
        }

    def start(self, data_paths: Sequence[str] = (), node_options: Sequence[str] = ()) -> None:
        """Start all of it, in an empty folder, and wait until the nodes are online."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("empty", "flower", "keys", "logs"):
            (self.folder / name).mkdir(mode=0o700, parents=True)
        try:
            self._start_superlink()
            if not self.insecure:
                self._register_keys()
            self._start_nodes(data_paths, node_options)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> set[int]:
        """End all of it; gives what still lives, which should be nothing."""
        left = _end(self.state)
        (self.folder / "state.json").unlink(missing_ok=True)
        return left

    def _start_superlink(self) -> None:
        """Start a SuperLink on free ports, and write Flower's connection `up` that leads to it."""
        options = ["--insecure"]
        if not self.insecure:
            from fl_server.certificates import CA, SERVER, SERVER_KEY, make_certificates

            make_certificates(self.keys, ["127.0.0.1", "localhost"])
            options = [
                "--ssl-ca-certfile", str(self.keys / CA), "--ssl-certfile", str(self.keys / SERVER),
                "--ssl-keyfile", str(self.keys / SERVER_KEY), "--enable-supernode-auth",
            ]  # fmt: skip

        options += ["--disable-runtime-dependency-installation", "--host", "127.0.0.1"]
        log, deadline = self.folder / "logs" / "superlink.log", time.monotonic() + START_TIMEOUT
        while True:
            port, fleet = sockets.free_port(), sockets.free_port()
            self.address, self.fleet = f"127.0.0.1:{port}", f"127.0.0.1:{fleet}"
            ports = ["--port", str(port), "--fleet-api-address", self.fleet]
            process = self._start("superlink", "flower-superlink", *options, *ports)
            # By its own log: another SuperLink may have taken the port, and answer there.
            while process.poll() is None and b"Uvicorn running on" not in log.read_bytes():
                if time.monotonic() > deadline:
                    raise self._broken(f"SuperLink did not listen within {START_TIMEOUT:g} s", log)
                time.sleep(POLL)
            if process.poll() is None:
                break
            if not sockets.TAKEN.search(log.read_bytes()):
                raise self._broken("SuperLink ended at its start", log)
        trust = "insecure = true" if self.insecure else f'root-certificates = "{self.keys}/ca.crt"'
        text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        config = self.folder / "flower" / "config.toml"
        config.write_text(f'{text}address = "{self.address}"\n{trust}\n')

    def _register_keys(self) -> None:
        """Make a key for every node and tell the SuperLink of it."""
        from fl_server.certificates import make_node_key

        public = [make_node_key(self.keys / f"node-{i}") for i in range(self.clients)]
        calls = [self._flwr("supernode", "register", str(p), CONNECTION) for p in public]
        for call in calls:
            text = self._answer(call)
            if call.returncode or "registered successfully" not in text:
                raise FederationError(f"a node's key was refused: {' '.join(text.split())}")

    def _start_nodes(self, data_paths: Sequence[str], options: Sequence[str]) -> None:
        """Start the nodes, and wait until the SuperLink has them all."""
        started = {}
        for i in range(self.clients):
            name, path = f"node-{i}", data_paths[i % len(data_paths)] if data_paths else ""
            started[name] = self._start(name, *self.node_command(i, path), *options)
        limit = ONLINE_TIMEOUT + NODE_S * self.clients
        deadline = time.monotonic() + limit
        waiting = dict(started)
        while waiting or self._online() < self.clients:
            for name, process in started.items():
                log = self.folder / "logs" / f"{name}.log"
                if process.poll() is not None:
                    raise self._broken(f"{name} ended at its start", log)
                if name in waiting and b"SuperNode ID:" in log.read_bytes():
                    del waiting[name]
            if time.monotonic() > deadline:
                who = ", ".join(waiting) or "a node that says it is"
                log = self.folder / "logs" / f"{next(iter(waiting), 'superlink')}.log"
                raise self._broken(f"not online within {limit:g} s: {who}", log)
            time.sleep(POLL)

    def node_command(self, partition: int, data_path: str = "") -> list[str]:
        """The command that is the node of `partition`."""
        command = ["flatfed", "node", "--partition", str(partition), "--superlink", self.fleet]
        if self.insecure:
            command += ["--insecure"]
        else:
            key = self.keys / f"node-{partition}"
            command += ["--root-certificates", f"{self.keys}/ca.crt", "--auth-key", str(key)]
        if data_path:
            command += ["--data-path", str(files.absolute_path(data_path))]
        return [*command, f"num-partitions={self.clients}"]

    def _online(self) -> int:
        """How many nodes the SuperLink says are online."""
        call = self._flwr("supernode", "list", CONNECTION, "--format", "json")
        with suppress(ValueError, LookupError):
            return sum(n["status"] == "online" for n in json.loads(self._answer(call))["nodes"])
        return 0

    @staticmethod
    def _answer(call: subprocess.Popen[str]) -> str:
        """What a call of `flwr` prints.  Raises FederationError if it takes too long."""
        try:
            return without_colours(call.communicate(timeout=START_TIMEOUT)[0])
        except subprocess.TimeoutExpired:
            command = " ".join(["flwr", *call.args[1:3]])
            raise FederationError(
                f"the federation did not start: `{command}` gave no answer within "
                f"{START_TIMEOUT:g} s"
            ) from None

    def _flwr(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BIN / "flwr", *arguments],
            cwd=self.folder / "empty",
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _start(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a process of the federation, with a log of its name, and put it into the state."""
        with (self.folder / "logs" / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [BIN / command, *arguments],
                cwd=self.folder / "empty",
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with suppress(ProcessLookupError):
            self.processes[process.pid] = processes.identify(process.pid)
        files.write_object(self.folder / "state.json", self.state)
        return process

    def _broken(self, what: str, log: Path) -> FederationError:
        """The error that says what went wrong, with the reason or the end of a process's log."""
        lines = without_colours(log.read_text(errors="replace")).splitlines()
        reason = [line for line in lines if line.startswith("error: ")]
        tail = reason or [f"the end of its log {log}:", *lines[-8:]]
        return FederationError("\n".join([f"the federation did not start: {what}", *tail]))
