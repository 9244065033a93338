"""Starts a node's ClientApps by fork, from a process that has imported what all of them need.

Flower starts the command `flwr-clientapp` anew for every message: two to three CPU seconds of
imports, most of them torch's.  A node puts another command of this name first on its PATH, which
hands its arguments to the process here; that forks, and the child goes on as Flower's own command
does.  It loads the app's code itself, so none of ours may be imported here: this file runs as a
script and needs only the standard library.  No tensor is made before the fork, and no thread or
CUDA context exists.  With `--light`, for a node with a resident trainer, torch stays out.
"""

import contextlib
import gc
import importlib
import json
import os
import shutil
import socket
import sys
import threading
import traceback

COMMAND = "flwr-clientapp"
MODULES = (
    "flwr.supernode.cli.flwr_clientapp",
    "flwr.clientapp",
    "torch",
    "torch.nn.functional",
    "torch.utils.data",
    "safetensors.torch",
    "pydantic",
)
LAUNCHER = """\
import json, os, socket, sys
try:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        s.connect({address!r})
        s.settimeout(None)  # whoever is asked answers or dies; given up, it might fork all the same
        s.sendall(json.dumps(sys.argv[1:]).encode())
        s.shutdown(socket.SHUT_WR)
        started = s.recv(1)
except OSError:
    started = b""
if not started:
    os.execv({command!r}, [{command!r}, *sys.argv[1:]])
"""
WATCH_S = 1.0
"""Pause between two looks at whether the node still lives [s]."""


def serve(address: str, parent: int, modules: tuple[str, ...] = MODULES) -> None:
    """Fork for everyone who connects, as long as the parent, of this process id, lives."""
    for name in modules:
        with contextlib.suppress(ImportError):  # the app that needs it will say so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the collector's marks would copy every page into every child
    if threading.active_count() > 1:
        raise RuntimeError("a thread is running: forking would be unsafe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while os.getppid() == parent:
            server.settimeout(WATCH_S)
            with contextlib.suppress(TimeoutError):
                caller, _ = server.accept()
                _start(server, caller)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _start(server: socket.socket, caller: socket.socket) -> None:
    with caller, contextlib.suppress(OSError, ValueError):
        caller.settimeout(5)
        arguments = json.loads(b"".join(iter(lambda: caller.recv(4096), b"")))
        if os.fork() == 0:
            server.close()
            caller.close()
            _become_clientapp(arguments)
        caller.sendall(b"1")


def _become_clientapp(arguments: list[str]) -> None:
    code = 1
    try:
        sys.argv = [COMMAND, *arguments]
        from flwr.supernode.cli import flwr_clientapp

        flwr_clientapp()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        folder, node, *light = sys.argv[1:]
        serve(f"{folder}/socket", int(node), MODULES[:2] if light else MODULES)
        shutil.rmtree(folder, ignore_errors=True)  # the node was killed, else it does so itself
