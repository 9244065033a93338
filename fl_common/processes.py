"""Processes of this machine: who descends from whom, and ending whole trees of them.

Only the standard library is used.  A process is known by its id and its start time together, so
that an id that was given to another process meanwhile is never taken for the old one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

FLOWER = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "MKL_CBWR": "AUTO,STRICT",
}
"""Environment of every Flower process that we start."""

GRACE = 3.0  # s, between SIGTERM and SIGKILL
LIMIT = 15.0  # s, after which a process that even SIGKILL does not end is given up
POLL = 0.025  # s
AS_ONE = 1.0  # s, within which a repeated signal counts once


class Process(NamedTuple):
    """A living process."""

    parent: int
    started: str  # in the system's own form; only ever compared


def living() -> dict[int, Process]:
    """Every process of the machine by its id, less those that are dead but not waited for."""
    return dict(_linux() if sys.platform == "linux" else _ps())


def _linux() -> Iterator[tuple[int, Process]]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, parent, *rest = stat.read_text(errors="replace").rpartition(")")[2].split()
            if state not in "ZX":
                yield int(stat.parent.name), Process(int(parent), rest[17])


def _ps() -> Iterator[tuple[int, Process]]:
    command = ["ps", "-A", "-o", "pid=,ppid=,state=,lstart="]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ps:
        for line in ps.stdout:
            process, parent, state, started = line.split(maxsplit=3)
            if int(process) != ps.pid and not state.startswith("Z"):
                yield int(process), Process(int(parent), started.strip())


def boot() -> str:
    """Names the present boot of the machine; start times of different boots do not compare."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def identify(process: int) -> str:
    """The start time of a living process; ProcessLookupError if it is dead."""
    try:
        return living()[process].started
    except KeyError:
        raise ProcessLookupError(process) from None


def present(known: Mapping[int, str]) -> dict[int, str]:
    """Those of `known` (id to start time) that live."""
    table = living()
    return {p: s for p, s in known.items() if p in table and table[p].started == s}


def marked(name: str, value: str) -> dict[int, str]:
    """Processes of this user that started with `name` = `value` in their environment, id to start
    time (on Linux; elsewhere none): they are found wherever their ancestors are."""
    entry, found = f"{name}={value}\0".encode(), {}
    for process, row in living().items():
        with contextlib.suppress(OSError):
            if entry in Path(f"/proc/{process}/environ").read_bytes():
                found[process] = row.started
    return found


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent dies (on Linux)."""
    if sys.platform == "linux":
        import ctypes

        subreaper = 36  # PR_SET_CHILD_SUBREAPER
        if ctypes.CDLL(None, use_errno=True).prctl(subreaper, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def end_with(parent: int, number: int) -> bool:
    """Have the kernel (Linux) send this process a signal when its parent ends; returns whether
    `parent` is still its parent."""
    if sys.platform == "linux":
        import ctypes

        parent_death = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death, number, 0, 0, 0)
    return os.getppid() == parent


def at_signal(number: int, act: Callable[[], object]) -> Any:
    """Have a signal call `act`, once for all that come within `AS_ONE` s; returns the handler that
    it replaces.

    `timeout -s INT` sends two, and Linux sends a child of `end_with` as many as its killed parent
    had threads: the second must not interrupt the orderly end that the first has begun.
    """
    last = -AS_ONE

    def handle(*_: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= AS_ONE:
            last = now
            act()

    return signal.signal(number, handle)


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


def end_descendants(grace: float = GRACE) -> None:
    """End every process below this one: SIGTERM, then SIGKILL to what lives after `grace` s."""
    _end({}, grace, below=[os.getpid()])


def end(known: Mapping[int, str], grace: float = GRACE) -> set[int]:
    """End the processes of `known` (id to start time) and all below them; returns those that still
    live, none unless the system cannot end them."""
    return _end(dict(known), grace, below=())


def _end(known: dict[int, str], grace: float, below: Iterable[int]) -> set[int]:
    start, told = time.monotonic(), set()
    while True:
        table = living()
        known = {p: s for p, s in known.items() if p in table and table[p].started == s}
        known |= {p: table[p].started for p in _descendants(table, [*below, *known])}
        waited = time.monotonic() - start
        if not known or waited > grace + LIMIT:
            return set(known)
        for process in known if waited > grace else known.keys() - told:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL if waited > grace else signal.SIGTERM)
        told |= known.keys()
        time.sleep(POLL)
        with contextlib.suppress(ChildProcessError):  # reap those that this process has adopted
            while below and os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _descendants(table: Mapping[int, Process], ancestors: Iterable[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for process, row in table.items():
        children.setdefault(row.parent, []).append(process)
    found, queue = set(), list(ancestors)
    while queue:
        new = [child for child in children.get(queue.pop(), []) if child not in found]
        found.update(new)
        queue += new
    return found
