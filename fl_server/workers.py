"""Worker processes of the in-process engine: forked, resident, one training thread each.

They share the pages of the data set, get weights and give updates through shared memory, and end
with the process that forked them, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import traceback
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flwr.app import RecordDict

from fl_common import forks, machine, processes, shared_memory
from fl_common.assembly import training_device
from fl_common.config import AUTO
from fl_common.failures import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import torch

    from fl_common.config import CoreConfig

    Answer = Callable[[dict[str, Any], RecordDict, RecordDict], tuple[RecordDict, RecordDict]]

SLOTS = 3
"""Memory files in which a worker lays its replies: one that it writes, two that are read."""
WAIT_S = 30.0
"""How long `collect` waits at most; then its caller looks at the deadline [s]."""


@dataclass(frozen=True)
class Job:
    """A message and the state of its client on their way to a worker."""

    key: str
    header: dict[str, Any]
    content: RecordDict
    state: RecordDict


@dataclass(frozen=True)
class Done:
    """What became of a job: the reply and the client's new state, or why there is none."""

    key: str
    content: RecordDict = field(default_factory=RecordDict)
    state: RecordDict | None = None
    error: str = ""


@dataclass
class _Worker:
    process: int
    connection: socket.socket
    jobs: deque[tuple[Job, Sequence[torch.Tensor]]] = field(default_factory=deque)
    """Jobs that were sent to it, each with the tensors as sent; it works on the first."""
    lent: shared_memory.Lent = field(default_factory=list)
    """Slots of its replies; with the next job it is told which are free again."""


def count(config: CoreConfig) -> int:
    """Worker processes for a run.  Raises ValueError where there cannot be several."""
    given, cuda = config.engine.workers, training_device(config).type == "cuda"
    if given != AUTO:
        if cuda and int(given) > 1:
            raise ValueError(
                f"engine.workers = {given}: several processes slow each other down on a GPU; leave "
                "it out, and see engine.cohort"
            )
        if sys.platform != "linux" and int(given) > 1:
            raise ValueError(f"engine.workers = {given}: several work only on Linux; leave it out")
        return int(given)
    if cuda or sys.platform != "linux" or config.engine.cohort not in ("1", AUTO):
        return 1
    return max(1, min(machine.processors() // config.train.threads, config.cohort_size))


class Pool:
    """`count` forks of this process that answer jobs, with `threads` torch threads each; whoever is
    free takes the next one."""

    def __init__(self, count: int, answer: Answer, threads: int = 1) -> None:
        self.answer, self.threads = answer, threads
        self.jobs: deque[Job] = deque()
        self.common: shared_memory.Segment | None = None
        self.workers: list[_Worker] = []
        for _ in range(count):
            self.workers.append(self._fork())

    def put(self, jobs: Sequence[Job]) -> None:
        """Queue these; a tensor that several of them share goes into shared memory once."""
        seen: dict[int, torch.Tensor] = {}
        common: dict[int, torch.Tensor] = {}
        for job in jobs:
            for tensor in shared_memory.tensors_in([job.content]):
                (common if id(tensor) in seen else seen)[id(tensor)] = tensor
        if not self.jobs:  # else jobs that wait still need the old segment
            if self.common:
                self.common.close()
            self.common = shared_memory.Segment(common.values()) if common else None
        self.jobs.extend(jobs)
        self._hand_out()

    def withdraw(self, keys: Collection[str]) -> None:
        """Forget these jobs, for which nobody waits any more.  A worker that is busy with one may
        be so for ever: a new one takes its place."""
        for worker in self.workers:
            if worker.jobs and worker.jobs[0][0].key in keys:
                worker.jobs.popleft()
                self._replace(worker)
        self.jobs = deque(job for job in self.jobs if job.key not in keys)
        self._hand_out()

    def collect(self) -> list[Done]:
        """Finished jobs; at least one if any is under way, unless that takes longer than WAIT_S."""
        working = {worker.connection: worker for worker in self.workers if worker.jobs}
        if not working:
            return []
        ready, _, _ = select.select(list(working), [], [], WAIT_S)
        done = [self._take(working[connection]) for connection in ready]
        self._hand_out()
        return done

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self.workers:
            self._end(worker)
        self.workers.clear()
        self.jobs.clear()
        if self.common:
            self.common.close()
            self.common = None

    def _hand_out(self) -> None:
        """Give every worker a job and, while many are left, a second one, which it can begin
        without waiting for us; towards the end another worker may be free for it sooner."""
        for ahead in (1, 2):
            for i in range(len(self.workers)):
                plenty = ahead == 1 or len(self.jobs) > 2 * len(self.workers)
                while self.jobs and plenty and len(self.workers[i].jobs) < ahead:
                    if not self._send(i):
                        break

    def _send(self, i: int) -> bool:
        """Give worker i the next job; False if it died at an earlier one, which `_take` reports."""
        worker, job = self.workers[i], self.jobs[0]
        records = [job.content, job.state]
        header = {"job": job.header, "released": shared_memory.given_back(worker.lent)}
        try:
            sent = shared_memory.send(worker.connection, header, records, self.common)
        except (BrokenPipeError, ConnectionResetError):
            if worker.jobs:
                return False
            self._replace(worker)
            return True
        worker.jobs.append((self.jobs.popleft(), sent))
        return True

    def _take(self, worker: _Worker) -> Done:
        job, sent = worker.jobs.popleft()
        try:
            header, (content, state), _ = shared_memory.receive(
                worker.connection, sent, worker.lent
            )
        except (EOFError, OSError):
            return Done(job.key, error=f"its worker process died ({_how(self._replace(worker))})")
        return Done(job.key, content, state, header.get("error", ""))

    def _replace(self, worker: _Worker) -> int:
        """End it and start another; jobs that it had not begun are queued again.  Gives its
        status."""
        status = self._end(worker)
        self.jobs.extendleft(job for job, _ in reversed(worker.jobs))
        self.workers[self.workers.index(worker)] = self._fork()
        return status

    def _fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        process = forks.fork()
        if process:
            theirs.close()
            return _Worker(process, ours)
        try:
            # Inherited.  Open here too, a sibling's socket would not tell it that we are gone.
            for worker in self.workers:
                worker.connection.close()
            ours.close()
            if processes.end_with(parent, signal.SIGKILL):
                forks.beginning(lambda: _serve(theirs, self.answer), self.threads)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    @staticmethod
    def _end(worker: _Worker) -> int:
        """End it and give its status."""
        worker.connection.close()
        try:
            os.kill(worker.process, signal.SIGKILL)
            return os.waitpid(worker.process, 0)[1]
        except (ProcessLookupError, ChildProcessError):
            return 0


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hint = "; out of memory?" if number == signal.SIGKILL else ""
        return f"{signal.Signals(number).name}{hint}"
    return f"exit code {os.WEXITSTATUS(status)}"


def _serve(connection: socket.socket, answer: Answer) -> None:
    """Answer jobs until the other side is gone."""
    slots, maps = shared_memory.Slots(SLOTS), {}
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            header, (content, state), tensors = shared_memory.receive(connection, kept=maps)
            slots.free += header["released"]
            try:
                reply, state, error = *answer(header["job"], content, state), {}
            except Exception as failure:
                reply, error = RecordDict(), {"error": reason(failure)}
            shared_memory.send(connection, error, [reply, state], known=tensors, slots=slots)
            del content, state, reply, tensors  # their memory goes back before more comes
