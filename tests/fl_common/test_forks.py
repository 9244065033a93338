"""Forks that torch works in: order, failures, threads, memory."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from living import open_files

from fl_common import forks
from fl_common.forks import in_processes


def test_parts_are_done_in_processes_of_their_own_and_come_back_in_order() -> None:
    found = in_processes(lambda part: [part, os.getpid()], ["a", "b", "c"])
    assert [part for part, _ in found] == ["a", "b", "c"]
    assert found[0][1] == os.getpid()
    assert len({process for _, process in found}) == 3


@pytest.mark.parametrize("end", ["dies", "raises"])
def test_the_part_of_a_fork_that_fails_is_done_here(end: str) -> None:
    here = os.getpid()

    def work(part: int) -> list[int]:
        if part == 1 and os.getpid() != here:
            os._exit(9) if end == "dies" else sys.exit("as it should")
        return [part, os.getpid()]

    found = in_processes(work, [0, 1, 2])
    assert [part for part, _ in found] == [0, 1, 2]
    assert found[1][1] == here
    assert found[2][1] != here


EARLY = """
import os, signal, sys
from fl_common import forks
os_fork, here = os.fork, os.getpid()
def fork():
    process = os_fork()
    if not process:
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    return process
os.fork = fork
signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
try:
    assert forks.in_processes(lambda part: [part], [1, 2, 3]) == [[1], [2], [3]]
finally:
    if os.getpid() != here:
        print("went on as if it were the process that forked")
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_before_the_first_line_of_a_fork(number: str) -> None:
    done = subprocess.run([sys.executable, "-c", EARLY, number], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_a_fork_raise_nothing_in_it(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C goes to all processes of a terminal, and is for the one that forked; SIGTERM ends."""
    here = os.getpid()

    def work(part: int) -> list[int]:
        if os.getpid() != here:
            os.kill(os.getpid(), number)
        return [part, os.getpid()]

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        found = in_processes(work, [0, 1])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [part for part, _ in found] == [0, 1]
    assert (found[1][1] == here) == (number == signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_what_raises_here_ends_the_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    started, here, original = [], os.getpid(), forks._fork

    def fork(*arguments: object) -> object:
        started.append(original(*arguments))
        return started[-1]

    def work(part: int) -> int:
        if os.getpid() == here:
            raise KeyboardInterrupt
        while True:
            pass

    monkeypatch.setattr(forks, "_fork", fork)
    with pytest.raises(KeyboardInterrupt):
        in_processes(work, [0, 1, 2])
    for process, pipe in started:
        assert pipe.closed
        with pytest.raises(ChildProcessError):
            os.waitpid(process, os.WNOHANG)


def test_where_no_process_can_be_made_all_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left of those that there are: no process, no descriptor."""
    here, made, original = os.getpid(), [], os.fork

    def fork() -> int:
        if len(made) == 1:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        made.append(original())
        return made[-1]

    before = open_files() if sys.platform == "linux" else set()
    monkeypatch.setattr(os, "fork", fork)
    found = in_processes(lambda part: [part, os.getpid()], [0, 1, 2, 3])
    assert [part for part, _ in found] == [0, 1, 2, 3]
    assert [process == here for _, process in found] == [True, False, True, True]
    with pytest.raises(ChildProcessError):
        os.waitpid(made[0], os.WNOHANG)
    if sys.platform == "linux":
        assert not open_files() - before


AS_MANY = """
import json, os, sys
import torch
from fl_common.forks import in_processes

def work(part):
    # A convolution takes OpenMP's number of threads, whatever torch's is.
    torch.manual_seed(0)
    found = torch.nn.functional.conv2d(torch.rand(8, 16, 32, 32), torch.rand(32, 16, 3, 3))
    tasks = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
    return [found.double().sum().item(), torch.get_num_threads(), tasks]

torch.set_num_threads(1)  # as at the start of every process of ours
torch.set_num_threads(int(sys.argv[1]))
work(0)
print(json.dumps(in_processes(work, [0, 1, 2])))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_fork_has_as_many_threads_as_the_process(threads: int) -> None:
    """And does not wait for those that this one had.  Of a process of its own: gRPC, which other
    tests use, starts threads in every fork of one that it is in."""
    command = [sys.executable, "-c", AS_MANY, str(threads)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=100).stdout)
    assert [(total, count) for total, count, _ in found] == [(found[0][0], threads)] * 3
    if sys.platform == "linux":  # with several: the one that forked, the one that works, helpers
        assert [count for _, _, count in found[1:]] == [1 if threads == 1 else 1 + threads] * 2


FAULTS = """
from fl_common import determinism
determinism.prepare_process()
import json, resource, torch
from fl_common.forks import in_processes

def work(part):
    x, w = torch.rand(64, 8, 64, 64), torch.rand(32, 8, 3, 3, requires_grad=True)
    faults = []
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.nn.functional.conv2d(x, w).relu().square().mean().backward()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults

print(json.dumps(in_processes(work, [0, 1])[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc's allocator")
def test_a_fork_keeps_memory_that_it_has_used() -> None:
    """Large blocks do not go back to the system after every step: fresh ones cost page faults.

    In a process of its own, which is prepared at its start, as `flatfed run` is: in a long-lived
    one blocks may lie where glibc gives them back all the same.  Where blocks fit changes over the
    first steps, and at times in one later on; without the settings every step has thousands."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert sorted(found[3:])[3] < 100, found  # at least four of six have none to speak of


def test_what_ends_a_fork_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    here = os.getpid()

    def work(part: int) -> list[int]:
        if os.getpid() != here:
            sys.exit("a module of one's own gives up")
        return [part]

    assert in_processes(work, [0, 1]) == [[0], [1]]
    assert "SystemExit: a module of one's own gives up" in capfd.readouterr().err
