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

    The lists must go through JSON.  The part of a fork that fails is done here.
    """
    forks: list[tuple[int, IO[bytes]] | None] = []
    try:
        for part in parts[1:]:
            forks.append(_fork(work, part))
        done = [work(part) for part in parts[:1]]
        for part, fork in zip(parts[1:], forks, strict=True):
            found = None
            if fork:
                with contextlib.suppress(ValueError):  # it ended in the middle of a word
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
    """As `os.fork`; in the child SIGINT does nothing and SIGTERM ends it.

    Ctrl-C is for the process that forked, which ends the child.  From its first moment: a handler
    that raised there would have it go on as if it were the process that forked.
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
    """A process that writes what `work` gives into a pipe; None where there can be none."""
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
    """In a fork: `work`, in which torch uses so many threads.  What it raises is printed.

    OpenMP's threads are not in a fork, and the thread that forked would wait for them for ever; so
    with several, a new thread does the work, which starts its own.
    """

    def begin() -> None:
        try:
            torch.set_num_threads(threads)
            work()
        except BaseException:
            traceback.print_exc()

    if threads == 1:  # and keep to the memory that the allocator has: a new thread has other
        begin()
        return
    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
