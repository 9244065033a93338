"""A node of a federation: becomes Flower's SuperNode, and says what that leaves unsaid."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from shlex import quote
from types import SimpleNamespace
from typing import TYPE_CHECKING

from fl_client import preload
from fl_client.node_checks import NodeError
from fl_common import (
    determinism,  # noqa: F401  (sets MKL's environment for the ClientApps)
    processes,
    sockets,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fl_client.node_checks import Node
    from fl_common.config import Scalar

SUPERNODE = "flwr.supernode.start_client_internal"
RESTART_S = 0.5
"""Pause before a trainer that died is started anew [s]."""
LONGEST_ROOT = 70
"""Of a folder for sockets [bytes]: their names below it take 30, and macOS allows 103 in all."""
LOGGERS = ("flwr", "uvicorn.error")
"""The loggers of a SuperNode."""
REFUSED = "Exit Code: 305\n"
"""The start of what a SuperNode logs when the server refuses it."""
CLOCKS = "Invalid timestamp"
"""All that a server says to a request whose signed time differs too much from its own."""
IDLE_S, REPLY_S = 3, 0.5
"""Flower's hard-coded pauses between two polls, for a message and for the ClientApp's reply [s]."""
IDLE_SHARE = 0.01
"""A node's pause grows to this share of its time without work, and delays a round by no more."""


def serve(node: Node) -> int:
    """Run a SuperNode until a signal ends it; returns the exit code.  `node` has been checked."""
    # Flower looks its own commands up, and reaches the ClientApps by loopback.
    os.environ |= {**processes.FLOWER, **sockets.direct()}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    poll_every(node.poll_interval)
    processes.adopt_orphans()
    sys.argv = ["flower-supernode", *_arguments(node)]
    opening = Opening()
    hear_denials(opening)
    end_once()
    for name in LOGGERS:
        logging.getLogger(name).addFilter(opening)
    from flwr.supercore.exit import add_exit_handler
    from flwr.supernode.cli import flower_supernode

    root = sockets.root(LONGEST_ROOT)
    with tempfile.TemporaryDirectory(prefix="flatfed-node-", dir=root) as folder:
        if node.worker:
            node = replace(node, config=_with_worker(node.config, Path(folder) / "trainer"))
            sys.argv = ["flower-supernode", *_arguments(node)]
        if node.preload:
            _preload(Path(folder), light=node.worker)
        # First registered, last called.
        add_exit_handler(lambda: processes.end_descendants(grace=1.5))
        try:
            flower_supernode()
        except RuntimeError as error:
            raise NodeError(f"the SuperNode did not start: {error}; try again") from None
        except SystemExit as end:
            if end.code or opening.denial:
                raise NodeError(_why_refused(node, opening)) from None
        finally:
            processes.end_descendants()
    return 0


def hear_denials(opening: Opening) -> None:
    """Tell `opening` why the server rejects this SuperNode's requests: Flower then ends it without
    a word, as on Ctrl-C."""
    module = importlib.import_module(SUPERNODE)
    make = module.make_simple_grpc_retry_invoker

    def listening() -> object:
        invoker = make()
        gives_up = invoker.should_giveup

        def heard(error: Exception) -> bool:
            if error.code().name == "UNAUTHENTICATED":
                opening.denial = error.details()
            return gives_up(error)

        invoker.should_giveup = heard
        return invoker

    module.make_simple_grpc_retry_invoker = listening


def end_once() -> None:
    """Have no signal break off the orderly end that another has begun.

    For its end Flower restores the handlers that it found.  With ours, a second Ctrl-C would leave
    the temporary folder, and a node that the server took for online.
    """
    module = importlib.import_module(SUPERNODE)
    register = module.register_signal_handlers

    def registering(*arguments: object, **named: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, lambda *_: None)
        register(*arguments, **named)

    module.register_signal_handlers = registering


class Opening(logging.Filter):
    """Holds back Flower's log until the server has accepted the node, or anything but its refusal
    goes wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.refusal = self.denial = ""
        self._over = False
        self._held: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if self._over:
            return True
        text = record.getMessage()
        if text.startswith(REFUSED):
            self.refusal = " ".join(text.removeprefix(REFUSED).partition("\n\n")[0].split())
        elif record.levelno > logging.INFO or text.startswith("SuperNode ID:"):
            self._over = True
            for held in self._held:
                logging.getLogger(held.name).handle(held)
            return True
        self._held.append(record)
        return False


def _why_refused(node: Node, opening: Opening) -> str:
    """Why a server that could be reached did not take this node, which Flower does not say."""
    where = f"SuperLink {node.superlink}"
    if opening.denial == CLOCKS:
        return (
            f"{where} does not accept this node's requests, because its clock and this machine's "
            "differ (a node's may be 5 s ahead, 5 minutes behind); set both by NTP"
        )
    if opening.denial:
        return (
            f"{where} no longer accepts this node's requests ({opening.denial}): its key is no "
            "longer registered; register it, or a new one, and start the node again"
        )
    if not node.auth_key:
        return (
            f"{where} did not accept this node ({opening.refusal or 'see above'}); if it asks for "
            "keys, give this node's as --auth-key"
        )
    return (
        f"{where} did not accept this node's key: register it with `flatfed register keys.json "
        "CONNECTION` on the server; if it is registered, another node has it, or had it within the "
        "last minute"
    )


def _with_worker(config: Mapping[str, Scalar], path: Path) -> dict[str, Scalar]:
    """The node's configuration with a resident trainer, which this process keeps alive."""
    command = [sys.executable, "-P", "-m", "fl_client.worker", str(path), str(os.getpid())]

    def keep() -> None:
        while True:
            code = subprocess.Popen(command, stdin=subprocess.DEVNULL).wait()
            time.sleep(RESTART_S)  # a node that stops ends its trainer first, then itself
            print(f"the trainer ended (code {code}) and is started again", flush=True)

    threading.Thread(target=keep, daemon=True).start()
    return {**config, "worker-socket": str(path)}


def _preload(folder: Path, *, light: bool) -> None:
    """Have ClientApps forked: see fl_client/preload.py."""
    name, address = preload.COMMAND, str(folder / "socket")
    command = shutil.which(name)
    if command is None:
        raise NodeError(f"{name} is not installed beside this Python; install flwr again")
    script, launcher = folder / "launch.py", folder / "bin" / name
    script.write_text(preload.LAUNCHER.format(address=address, command=command))
    launcher.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\nexec {quote(sys.executable)} -IS {quote(str(script))} "$@"\n')
    launcher.chmod(0o700)
    os.environ["PATH"] = f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"
    # -P: this file's folder is not a place to import from.
    options = [str(folder), str(os.getpid()), *(["--light"] if light else [])]
    subprocess.Popen([sys.executable, "-P", preload.__file__, *options], stdin=subprocess.DEVNULL)


def _arguments(node: Node) -> Iterator[str]:
    yield from ("--superlink", node.superlink, "--port", str(node.port or sockets.free_port()))
    yield from ("--node-config", " ".join(f"{k}={_literal(k, v)}" for k, v in node.config.items()))
    if node.insecure:
        yield "--insecure"
    if node.root_certificates:
        yield from ("--root-certificates", str(node.root_certificates))
    if node.auth_key:
        yield from ("--auth-supernode-private-key", str(node.auth_key))
    if node.trusted_entities:
        yield from ("--trusted-entities", str(node.trusted_entities))


def _literal(key: str, value: Scalar) -> str:
    """`value` as Flower's reader of --node-config takes it: TOML, no quote within quotes."""
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str) or '"' not in value:
        return text
    if "'" in value or not value.isprintable():
        raise NodeError(f"{key} = {value}: Flower cannot take both kinds of quotes in a value")
    return f"'{value}'"


def poll_every(interval: float) -> None:
    """Have the SuperNode of this process ask for work every `interval` seconds.

    After long idleness it asks less often, so that many nodes do not keep the server busy: every
    IDLE_S at last, as Flower's own does, unless `interval` is longer.

    Flower's module sleeps for hard-coded times; it is given a `time` that sleeps for less.
    """
    module = importlib.import_module(SUPERNODE)
    idle_since = None

    def sleep(seconds: float) -> None:
        nonlocal idle_since
        if seconds == IDLE_S:
            now = time.monotonic()
            idle_since = idle_since or now
            time.sleep(max(interval, min(IDLE_S, IDLE_SHARE * (now - idle_since))))
        else:  # for a ClientApp's reply
            idle_since = None
            time.sleep(0.05 if seconds == REPLY_S else seconds)

    module.time = SimpleNamespace(**{**vars(time), "sleep": sleep})
