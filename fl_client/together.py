"""Messages to several clients, answered together: who is trained beside whom, and how many at once.

Where clients cannot be trained at once, or memory is too small, the log says so and they are
trained one by one, or in smaller cohorts: the replies are the same but for rounding.
"""

from __future__ import annotations

import logging
import sys
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import RecordDict

from fl_client.cohort import Known, Member, bytes_of, cohort_round, why_alone
from fl_client.graphs import BeginAnew
from fl_common import machine
from fl_common.failures import Failed, first_line, reason
from fl_common.local import correction_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_client.client import Clients, Job
    from fl_common.config import Train

    Request = tuple[int, RecordDict, RecordDict]
    """The partition, the message's content, and what Flower keeps for the client."""

TRIAL_STEPS = 3
"""Steps whose time `auto` compares."""
WIN = 0.95
"""Training at once is chosen if it takes less than this share of the time one by one."""
SHARE = 0.5
"""Share of the free memory that a cohort may take, by estimate."""

_log = logging.getLogger(__name__)


class Together:
    """Answers messages to train for `Clients`, as many of them at once as can be."""

    def __init__(self, clients: Clients) -> None:
        self.clients: Clients = weakref.proxy(clients)  # or both would outlive their last use
        self.most = sys.maxsize
        """The most clients that can be trained at once, as far as is known before one tries."""
        self.held: dict[tuple[str, ...], tuple[int, int]] = {}
        """The most that a card has held at once, and the fewest that it has not, by active
        groups."""
        self.measured: dict[tuple[str, ...], int] = {}
        """The largest batch size whose memory was measured, by active groups."""
        self.known = Known()
        self.said: set[str] = set()
        """Lines that were logged."""

    def train(
        self, requests: Sequence[Request], at_once: int
    ) -> list[RecordDict | Exception | None]:
        """The reply to each request, or why there is none.

        If some ask for what they lack, nobody is trained, and the others get None, to wait for
        them: who is trained beside whom decides on the last bits.
        """
        begun = [_attempt(self.clients.begin, *request) for request in requests]
        if any(isinstance(each, RecordDict) for each in begun):
            return [None if _is_job(each) else each for each in begun]
        kinds = [self._kind(each) for each in begun]
        for kind in dict.fromkeys(kinds):
            left = [i for i, own in enumerate(kinds) if own == kind and _is_job(begun[i])]
            while left:
                jobs = [begun[i] for i in left]
                size = 1 if kind is None else self._size(jobs, at_once)
                replies = self._replies(jobs[:size])
                for i, reply in zip(left, replies, strict=False):
                    begun[i] = reply
                left = left[len(replies) :]
        return begun

    def choose(self, requests: Sequence[Request], workers: int) -> tuple[int, str]:
        """How many clients to train at once for engine.cohort=auto, and why, in words: as many of
        these as memory holds, or 1 where that is no faster than one by one in `workers` processes.

        A few steps of these very requests are timed both ways; no result is kept.
        """
        begun = [_attempt(self.clients.begin, *request) for request in requests]
        jobs = [each for each in begun if _is_job(each) and self._kind(each) is not None]
        alike = [job for job in jobs if self._kind(job) == self._kind(jobs[0])]
        jobs = alike[: self._size(alike, len(alike))] if alike else []
        if len(jobs) < 2:
            return 1, "engine.cohort = auto: 1; no two of these clients can be trained at once"
        trial = self.clients.config.train.model_copy(update={"epochs": 1})
        short = [_shortened(job, TRIAL_STEPS * trial.batch_size) for job in jobs]
        try:
            alone = min(self._seconds(self._one_by_one, short[:2], trial) for _ in range(2))
        except Exception as error:  # training will report it again, client by client
            return 1, f"engine.cohort = auto: 1; training one client fails ({first_line(error)})"
        together = None
        self._make_room(short)
        try:
            together = min(self._seconds(self._at_once, short, trial) for _ in range(2))
        except torch.OutOfMemoryError:
            pass
        except BeginAnew:
            return self.choose(requests, workers)
        except Exception as error:
            why = f"training several at once fails ({first_line(error)})"
            return 1, f"engine.cohort = auto: 1; {why}"
        if together is None:  # after the `try`, where the tensors that were too many are freed
            self._too_many(jobs)
            return self.choose(requests, workers)
        self._fit(jobs)
        if self._size(alike, len(alike)) > len(jobs):
            return self.choose(requests, workers)
        chosen = len(jobs) if together < WIN * alone / workers else 1
        beside = f" (in {workers} processes beside each other)" if workers > 1 else ""
        return chosen, (
            f"engine.cohort = auto: {chosen}; a step took {1000 * alone:.2f} ms one by one{beside} "
            f"and {1000 * together:.2f} ms as one of {len(jobs)}"
        )

    def _kind(self, job: Any) -> Any:
        """What clients must share to be trained at once; None for one that trains alone."""
        if not _is_job(job):
            return None
        clients = self.clients
        with clients.training(job):
            why = why_alone(clients.net, job.methods, len(job.data.y), clients.config.train)
        if why:
            self._say(f"some clients are trained alone: {why}")
            return None
        return job.server_round, job.active, clients.steps_taken(job.remembered)

    def _size(self, jobs: list[Job], at_once: int) -> int:
        """How many of these jobs are trained at once: `at_once`, or as many as memory holds."""
        clients, largest = self.clients, max(jobs, key=lambda job: len(job.data.y))
        free = free_bytes(clients.device)
        batch = min(clients.config.train.batch_size, len(largest.data.y))
        if batch > self.measured.get(largest.active, 0) and free < sys.maxsize:
            try:
                with clients.training(largest):
                    each = bytes_of(clients.net, largest.data, clients.config.train)
            except Exception:  # its own round tells why, and is not that of the others
                return 1
            self.measured[largest.active] = batch
            self.most = min(self.most, max(1, int(SHARE * free / each)))
            if self.most < min(at_once, len(jobs)):
                self._say(f"memory holds {self.most} of these clients at once, not {at_once}")
        size = max(1, min(at_once, self.most, len(jobs)))
        most, too_many = self.held.get(largest.active, (1, sys.maxsize))
        return size if size < too_many else (most + too_many) // 2

    def _replies(self, jobs: list[Job]) -> list[RecordDict | Exception]:
        """The replies to these jobs; none if they are to be tried again, or fewer of them."""
        clients = self.clients
        if len(jobs) == 1:
            return [_attempt(clients.train_alone, jobs[0])]
        started = time.process_time()
        for job in jobs:
            clients.evaluate_job(job, job.start, "-before")
        members, refused = self._tried(jobs)
        if refused:
            return [_attempt(clients.train_alone, job) for job in jobs]
        if not members:
            return []
        for job, member in zip(jobs, members, strict=True):
            clients.evaluate_job(job, member.trained, "-after")
        spent = time.process_time() - started
        steps = sum(member.result.steps for member in members)
        for job, member in zip(jobs, members, strict=True):
            job.cpu_s += spent * member.result.steps / steps
        return [
            _attempt(clients.finish, job, member.trained, member.result, member.optimizer)
            for job, member in zip(jobs, members, strict=True)
        ]

    def _tried(self, jobs: list[Job]) -> tuple[list[Member], bool]:
        """The trained members, and whether training at once failed, so that these clients must be
        trained one by one.  No members and no failure: try again, with fewer where memory was too
        small.  When this returns, the error and the memory that it held are gone.
        """
        self._make_room(jobs)
        try:
            members = self._at_once(jobs, self.clients.config.train)
            self._fit(jobs)
            return members, False
        except BeginAnew:
            return [], False
        except torch.OutOfMemoryError:
            pass
        except Exception as error:
            self.most = 1
            self._say(
                "clients are trained one by one: training several at once fails "
                f"({first_line(error)})"
            )
            return [], True
        self._too_many(jobs)
        return [], False

    def _fit(self, jobs: Sequence[Job]) -> None:
        """The card has held these jobs at once; if it cannot hold one more, that is said."""
        most, too_many = self.held.get(jobs[0].active, (1, sys.maxsize))
        most = max(most, len(jobs))
        self.held[jobs[0].active] = most, too_many
        if most == too_many - 1:
            self._say(f"the card holds {most} of these clients at once, not {too_many}")

    def _make_room(self, jobs: Sequence[Job]) -> None:
        """Before more are tried than ever since some were too many: not beside what fewer
        recorded."""
        most, too_many = self.held.get(jobs[0].active, (1, sys.maxsize))
        if most < len(jobs) and too_many < sys.maxsize:
            self._forget()

    def _forget(self) -> None:
        """Let go of the card's memory that is kept for later passes."""
        if self.clients.graphs:
            self.clients.graphs.forget()
        torch.cuda.empty_cache()

    def _too_many(self, jobs: Sequence[Job]) -> None:
        """The card's memory was too small for these jobs at once: the largest number that fits is
        between the most that it held and theirs."""
        self._forget()
        most, _ = self.held.get(jobs[0].active, (1, 0))
        most = most if most < len(jobs) else 1  # larger clients than before, or less is free
        self.held[jobs[0].active] = most, len(jobs)
        fewer = (most + len(jobs)) // 2
        self._say(f"the card cannot hold {len(jobs)} clients at once; trying {fewer}")

    def _at_once(self, jobs: Sequence[Job], settings: Train) -> list[Member]:
        """The members of these jobs, trained in one pass for all; see `cohort_round`."""
        clients = self.clients
        members = [
            Member(
                job.partition,
                job.data,
                job.methods,
                correction_of(job.methods, job.sent, job.remembered),
                job.start,
                clients.kept(job.remembered),
            )
            for job in jobs
        ]
        with clients.training(jobs[0]):
            cohort_round(
                clients.net,
                members,
                clients.optimizer,
                settings,
                seed=clients.config.run.seed,
                server_round=jobs[0].server_round,
                norms=clients.config.eval.grad_norm,
                known=self.known,
                graphs=clients.graphs,
            )
        return members

    def _one_by_one(self, jobs: Sequence[Job], settings: Train) -> None:
        for job in jobs:
            self.clients.local_round(job, settings)

    @staticmethod
    def _seconds(run: Callable[..., Any], jobs: list[Job], settings: Train) -> float:
        """The wall time of `run` per step of one client [s]."""
        started = time.perf_counter()
        run(jobs, settings)
        steps = sum(settings.steps(len(job.data.y)) for job in jobs)
        return (time.perf_counter() - started) / steps

    def _say(self, text: str) -> None:
        """Log this line, unless the log has it."""
        if text not in self.said:
            self.said.add(text)
            _log.warning(text)


def free_bytes(device: torch.device) -> int:
    """Free memory [bytes]; of a GPU no bound, since it raises an error when it is full."""
    return sys.maxsize if device.type == "cuda" else machine.free_bytes()


def _shortened(job: Job, samples: int) -> Job:
    """The same job with its first samples only."""
    data = job.data
    return replace(job, data=replace(data, x=data.x[:samples], y=data.y[:samples]))


def _is_job(begun: Any) -> bool:
    return not isinstance(begun, RecordDict | Exception)


def _attempt(act: Callable[..., Any], *args: Any) -> Any:
    """The result, or a `Failed` with the reason: the error's frames would hold the client's
    tensors."""
    try:
        return act(*args)
    except Exception as error:
        return Failed(reason(error))
