"""Forks of this process in which torch works as it does here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import traceback
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch

from fl_common.processes import end_with

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


def in_processes(work: Callable[[T], list[Any]], parts: Sequence[T]) -> list[list[Any]]:
    """`work` of each part: of the first in this process, of every other in a fork of it.

    The lists must survive JSON.  A part whose fork fails is done here.
    """
    forks: list[tuple[int, IO[bytes]] | None] = []
    try:
        for part in parts[1:]:
            forks.append(_fork(work, part))
        done = [work(part) for part in parts[:1]]
        for part, fork in zip(parts[1:], forks, strict=True):
            found = None
            if fork:
                with contextlib.suppress(ValueError):  # it ended before it had written all
                    found = json.loads(fork[1].read())
            done.append(work(part) if found is None else found)
        return done
    finally:
        for process, pipe in filter(None, forks):
            pipe.close()
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def fork() -> int:
    """As `os.fork`; the child ignores SIGINT, and SIGTERM ends it.

    Ctrl-C is for the parent, which ends the child.  Both signals wait until the child has these
    handlers: one of the parent's that raised in it would make it go on as if it were the parent.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        process = os.fork()
        if not process:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _fork(work: Callable[[T], list[Any]], part: T) -> tuple[int, IO[bytes]] | None:
    """A process that writes what `work` returns to a pipe, and that pipe; None if it cannot be
    made."""
    parent = os.getpid()
    try:
        ours, theirs = os.pipe()
    except OSError:
        return None
    try:
        process = fork()
    except OSError:
        os.close(ours)
        os.close(theirs)
        return None
    if process:
        os.close(theirs)
        return process, os.fdopen(ours, "rb")
    try:
        if end_with(parent, signal.SIGKILL):
            with os.fdopen(theirs, "wb") as pipe:
                threads = torch.get_num_threads()
                beginning(lambda: pipe.write(json.dumps(work(part)).encode()), threads)
    finally:
        os._exit(0)


def beginning(work: Callable[[], Any], threads: int) -> None:
    """In a fork: do `work` with `threads` torch threads.  What it raises is printed.

    A fork has none of OpenMP's threads, and the thread that forked would wait for them for ever; so
    with several threads, a new one does the work and starts its own.
    """

    def begin() -> None:
        try:
            torch.set_num_threads(threads)
            work()
        except BaseException:
            traceback.print_exc()

    if threads == 1:  # in this thread, whose memory the allocator reuses; a new one has its own
        begin()
        return
    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
