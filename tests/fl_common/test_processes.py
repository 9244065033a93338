"""Ending process trees: all of them, and no other."""

from __future__ import annotations

import subprocess
import sys

import pytest
from living import living, mark, wait_for

from fl_common import processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

TREE = """\
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
below = "import time; print('up', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", below], start_new_session=True)
time.sleep(600)
"""


def tree(env: dict[str, str]) -> subprocess.Popen[str]:
    """A process that ignores SIGTERM, with one below it in another session."""
    command = [sys.executable, "-c", TREE]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    return process


def test_a_tree_ends_whole():
    env = mark()
    process = tree(env)
    known = {process.pid: processes.identify(process.pid)}
    assert processes.present(known) == known
    assert processes.end(known, grace=0.3) == set()
    assert not living(env)
    assert processes.present(known) == {}  # though nobody has waited for it
    process.wait()
    with pytest.raises(ProcessLookupError):
        processes.identify(process.pid)


def test_an_id_that_was_given_to_another_process_is_left_alone():
    with subprocess.Popen(["sleep", "600"]) as other:
        known = {other.pid: "1"}  # the start time of the one that had this id before
        assert processes.present(known) == {}
        assert processes.end(known) == set()
        assert other.poll() is None
        other.kill()


def test_orphans_are_adopted_and_ended():
    env = mark()
    code = f"""\
import subprocess, sys
from fl_common import processes
processes.adopt_orphans()
tree = subprocess.Popen([sys.executable, "-c", {TREE!r}], stdout=subprocess.PIPE, text=True)
tree.stdout.readline()
tree.kill()
processes.end_descendants(grace=0.3)
"""
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
    assert wait_for(lambda: not living(env), 5)
