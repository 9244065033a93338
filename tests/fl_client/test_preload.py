"""ClientApps by fork: they run Flower's command, with none of our code loaded before the app's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from living import living, mark, wait_for

from fl_client import preload
from fl_server.bundle import PACKAGES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SAYS = "Run a Flower ClientApp"
SERVE = [sys.executable, "-P", preload.__file__]


def launch(folder: Path) -> subprocess.CompletedProcess[str]:
    """What a SuperExec starts, with `--help`."""
    command = str(Path(sys.executable).with_name(preload.COMMAND))
    text = preload.LAUNCHER.format(address=str(folder / "socket"), command=command)
    (folder / "launch.py").write_text(text)
    command = [sys.executable, "-IS", folder / "launch.py", "--help"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_fork_is_flowers_command(tmp_path: Path):
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*SERVE, tmp_path, str(os.getpid())], stdout=log)
    try:
        assert wait_for((tmp_path / "socket").exists, 300)
        for count in (1, 2):
            assert launch(tmp_path).stdout == ""
            assert wait_for(lambda n=count: (tmp_path / "log").read_text().count(SAYS) == n, 300)
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()


def test_a_launcher_waits_for_who_has_taken_its_request(tmp_path: Path, monkeypatch):
    """Else both would run the same task."""
    assert "settimeout(5)" in preload.LAUNCHER
    hasty = preload.LAUNCHER.replace("settimeout(5)", "settimeout(0.2)")
    monkeypatch.setattr(preload, "LAUNCHER", hasty)
    with socket.socket(socket.AF_UNIX) as server, ThreadPoolExecutor() as threads:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        server.settimeout(300)
        launched = threads.submit(launch, tmp_path)
        caller, _ = server.accept()
        with caller:
            time.sleep(0.6)
            assert json.loads(caller.recv(4096)) == ["--help"]
            caller.sendall(b"1")
        assert launched.result().stdout == ""


def test_without_it_the_command_itself_runs(tmp_path: Path):
    assert SAYS in launch(tmp_path).stdout


def test_none_of_our_modules_is_loaded(tmp_path: Path):
    """Else the app would find them in place of its own."""
    code = (
        "import runpy, sys; preload = runpy.run_path(sys.argv[1]); "
        "[__import__(name) for name in preload['MODULES']]; "
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-P", "-c", code, preload.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & set(PACKAGES)


@pytest.mark.parametrize("begun", [True, False])
def test_it_ends_with_its_parent(begun: bool, tmp_path: Path):
    """And the folder of a node that was killed, be it at its very start, goes with it."""
    env, folder = mark(), tmp_path / "node"
    folder.mkdir()
    code = (
        "import os, subprocess, sys, time, pathlib\n"
        "subprocess.Popen([*sys.argv[1:], str(os.getpid())])\n"
        f"while {begun} and not pathlib.Path(sys.argv[-1], 'socket').exists(): time.sleep(0.1)"
    )
    command = [sys.executable, "-c", code, *map(str, [*SERVE, folder])]
    subprocess.run(command, env={**env, "PATH": "/usr/bin"}, timeout=300)
    assert wait_for(lambda: not living(env), 60 if begun else 300)
    assert not folder.exists()
