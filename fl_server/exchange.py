"""Messages out, replies in: polled, guarded, and handed on in partition order as they come."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord

from fl_common import wire
from fl_common.guards import objection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flwr.app import Message, MetricRecord
    from flwr.serverapp import Grid

    from fl_common.guards import Expected

POLL_S = 0.1
"""Pause between two looks for replies that have not come yet [s]."""


class RunFailed(RuntimeError):
    """The run cannot go on; the message is one line for its user."""


class RoundFailed(RuntimeError):
    """Too few good replies: the round changes nothing."""


@dataclass
class Outcome:
    """What became of one phase's messages, by partition."""

    accepted: dict[int, MetricRecord] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    """Error replies, and silence until the deadline."""
    rejected: dict[int, str] = field(default_factory=dict)
    """Replies to which the guards object."""
    bytes_down: int = 0
    bytes_up: int = 0


class Exchange:
    """All traffic of a run.  Messages of an earlier round stay known, so that a late reply is
    told from a good one; it is dropped, and `note` says so."""

    def __init__(self, grid: Grid, deadline_s: float, note: Callable[[str], None] = print) -> None:
        self.grid, self.deadline_s, self.note = grid, deadline_s, note
        self._late: dict[str, str] = {}
        """What was sent in vain, by message id."""

    def replies(
        self,
        messages: Sequence[Message],
        names: Sequence[int],
        phase: str,
        outcome: Outcome,
        expected: Callable[[int], Expected] | None = None,
        at_least: int = 0,
    ) -> Iterator[Message]:
        """Push `messages` and yield every good reply, in the order of `names`.

        `names` says what each receiver is called, `expected` what its reply must be.  A reply
        that comes before its turn waits; who has not answered by the deadline is left out.
        Raises RoundFailed at the end if fewer than `at_least` replies were good.
        """
        early: dict[int, Message] = {}
        waiting = deque(sorted(names))
        for name, reply in self._arrivals(messages, names, phase, outcome):
            if reply.has_error():
                outcome.failed[name] = reason_of(reply)
            elif expected and (problem := objection(reply.content, expected(name))):
                outcome.rejected[name] = problem
            else:
                early[name] = reply
            while waiting and (waiting[0] in early or _settled(waiting[0], outcome)):
                yield from _accept(waiting.popleft(), early, outcome)
        for name in waiting:
            yield from _accept(name, early, outcome)
        if len(outcome.accepted) < at_least:
            raise RoundFailed(_shortage(phase, outcome, at_least))

    def _arrivals(
        self, messages: Sequence[Message], names: Sequence[int], phase: str, outcome: Outcome
    ) -> Iterator[tuple[int, Message]]:
        """Replies as they come, errors included, until all are there or time is up."""
        end = time.monotonic() + self.deadline_s
        silence = f"no reply within {self.deadline_s:g} s (clients.deadline-s)"
        ids = list(self.grid.push_messages(list(messages))) if messages else []
        if len(ids) != len(messages):
            raise RunFailed(f"{phase}: the grid took {len(ids)} of {len(messages)} messages")
        outcome.bytes_down += sum(map(payload_bytes, messages))
        pending = dict(zip(ids, names, strict=True))
        sent = dict(pending)
        while pending:
            arrived = list(self.grid.pull_messages([*pending, *self._late]))
            expired = time.monotonic() > end
            for reply in arrived:
                to = reply.metadata.reply_to_message_id
                if to in self._late:
                    self.note(f"{phase}: dropped a late reply: {self._late.pop(to)}")
                elif to not in pending:
                    who = f"client {sent[to]}" if to in sent else "nobody who was asked"
                    self.note(f"{phase}: dropped a repeated or unknown reply of {who}")
                elif expired:
                    outcome.failed[pending.pop(to)] = silence
                else:
                    if reply.has_content():
                        outcome.bytes_up += payload_bytes(reply)
                    yield pending.pop(to), reply
            if expired:
                outcome.failed.update(dict.fromkeys(pending.values(), silence))
                self._late |= {i: f"{phase}, client {name}" for i, name in pending.items()}
                return
            if not arrived:
                time.sleep(min(POLL_S, self.deadline_s))


def _settled(name: int, outcome: Outcome) -> bool:
    return name in outcome.failed or name in outcome.rejected


def _accept(name: int, early: dict[int, Message], outcome: Outcome) -> Iterator[Message]:
    if name in early:
        reply = early.pop(name)
        outcome.accepted[name] = reply.content[wire.METRICS]
        yield reply


def payload_bytes(message: Message) -> int:
    """numel x itemsize of all arrays of a message."""
    # Not content.array_records: that view and its content would keep each other, and the model in
    # them, alive until the next sweep of the garbage collector.
    records = (record for record in message.content.values() if isinstance(record, ArrayRecord))
    return sum(map(wire.payload_bytes, records))


def reason_of(reply: Message) -> str:
    """The last line of an error's text: the exception, without its traceback."""
    lines = [line.strip() for line in (reply.error.reason or "").splitlines() if line.strip()]
    text = next((line for line in reversed(lines) if ": " in line), lines[-1] if lines else "")
    text = text.removeprefix("Exception ClientAppException occurred. Message: ").removesuffix("'>")
    return text or f"error code {reply.error.code}"


def _shortage(phase: str, outcome: Outcome, at_least: int) -> str:
    wrong = outcome.failed | outcome.rejected
    return (
        f"{phase}: {len(outcome.accepted)} good replies, clients.min-replies = {at_least}"
        + "".join(f"; {who}: {reason}" for reason, who in by_reason(wrong, "client"))
    )


def by_reason(reasons: dict[int, str], word: str) -> Iterator[tuple[str, str]]:
    """Each reason once, with whom it concerns: "client 3", "clients 1, 2, 3 and 7 more"."""
    for reason in dict.fromkeys(reasons[name] for name in sorted(reasons)):
        names = [str(name) for name in sorted(reasons) if reasons[name] == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield reason, f"{word}{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}"
