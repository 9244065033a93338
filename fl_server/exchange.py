"""Messages out, replies in: polled, guarded, and handed on in partition order as they come."""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fl_common import wire
from fl_common.guards import objection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flwr.serverapp import Grid

    from fl_common.guards import Expected

POLL_S = 0.1
"""Pause between two looks for replies that have not come yet [s]."""

GONE = ErrorCode.NODE_UNAVAILABLE
"""The error by which Flower says that a node went away before it answered."""
HELD_BYTES = 64_000_000
"""Large replies stay at the SuperLink until it is their turn; of smaller ones, those that come
before it may be this much together."""
RETURNS = 3
"""How often a client is asked again in a round because its node went away and came back."""
AWAITED = -1


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
    restored: dict[int, int] = field(default_factory=dict)
    """Bytes sent to those who were given back a memory that they had lost."""
    bytes_down: int = 0
    """What the algorithm sends; not what is sent again because a client lost something."""
    bytes_up: int = 0


class Exchange:
    """All traffic of a run.  Messages of an earlier round stay known, so that a late reply is
    told from a good one; it is dropped, and `note` says so."""

    def __init__(self, grid: Grid, deadline_s: float, note: Callable[[str], None] = print) -> None:
        self.grid, self.deadline_s, self.note = grid, deadline_s, note
        self.locate: Callable[[int], int | None] | None = None
        """The node id of a client; AWAITED while it may still come back; None if it is gone."""
        self.held_bytes: float | None = None
        """HELD_BYTES where the grid is another process, None where replies wait in this one."""
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
        give_back: Callable[[int, MetricRecord], RecordDict | None] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        large: int = 0,
    ) -> Iterator[Message]:
        """Push `messages` and yield every good reply, in the order of `names`.

        `names` says what each receiver is called, `expected` what its reply must be.  A reply
        that comes before its turn waits; who has not answered by the deadline is left out.
        A client that lacks something is asked once more, with the content that `give_back` makes;
        it makes None for a request without a reason, which the guards then reject.
        `meanwhile` is done once they are on their way.  `large`: what a reply may have, if that is
        more than a message has [bytes].
        Raises RoundFailed at the end if fewer than `at_least` replies were good.
        """
        early: dict[int, Message] = {}
        waiting = deque(sorted(names))
        arrivals = self._arrivals(
            messages, names, phase, outcome, at_least, give_back, meanwhile, large
        )
        for name, reply in arrivals:
            if reply.has_error():
                outcome.failed[name] = reason_of(reply)
            elif expected and (problem := objection(reply.content, expected(name))):
                outcome.rejected[name] = problem
            else:
                early[name] = reply
            del reply  # here as below: a large model is not held on to while the next one comes
            while waiting and (waiting[0] in early or _settled(waiting[0], outcome)):
                yield from _accept(waiting.popleft(), early, outcome)
        for name in waiting:
            yield from _accept(name, early, outcome)
        if len(outcome.accepted) < at_least:
            raise RoundFailed(_shortage(phase, outcome, at_least))

    def _arrivals(
        self,
        messages: Sequence[Message],
        names: Sequence[int],
        phase: str,
        outcome: Outcome,
        at_least: int,
        give_back: Callable[[int, MetricRecord], RecordDict | None] | None,
        meanwhile: Callable[[], None],
        large: int,
    ) -> Iterator[tuple[int, Message]]:
        """Replies as they come, errors included, until all are there or time is up.

        A client whose node is gone is given up after its time, unless `at_least` needs it.
        """
        silence = f"no reply within {self.deadline_s:g} s (clients.deadline-s)"
        asked = dict(zip(names, messages, strict=True))
        pending: dict[str, int] = {}
        left: list[int] = []
        gone: set[int] = set()
        """Clients whose node went away with the message, or before it."""
        needed: set[int] = set()
        """Those of them that are waited for until the end."""

        def push(new: dict[int, Message]) -> None:
            """Send these, and note whose node is not there."""
            for name in self._push(new, pending, phase):
                if self.locate and left.count(name) < RETURNS:
                    left.append(name)
                    gone.add(name)
                else:
                    outcome.failed[name] = "its node is gone"

        push(asked)
        meanwhile()
        end = time.monotonic() + self.deadline_s
        sizes = list(map(payload_bytes, messages))
        outcome.bytes_down += sum(sizes)
        at_once = self._at_once(max([large, *sizes]), len(sizes))
        sent = dict(pending)
        while pending or gone:
            again: dict[int, Message] = {}
            any_came = False
            # What waits at the SuperLink has come in time; what was asked of this process has not.
            expired = at_once is not None and time.monotonic() > end
            for reply in self._pulled(pending, gone, sorted(names), at_once, expired):
                if at_once is None and not any_came:
                    expired = time.monotonic() > end
                any_came = True
                to = reply.metadata.reply_to_message_id
                if to in self._late:
                    self.note(f"{phase}: dropped a late reply: {self._late.pop(to)}")
                elif to not in pending:
                    who = f"client {sent[to]}" if to in sent else "nobody who was asked"
                    self.note(f"{phase}: dropped a repeated or unknown reply of {who}")
                elif expired and at_once is None:
                    outcome.failed[pending.pop(to)] = silence
                elif (
                    self.locate
                    and reply.has_error()
                    and reply.error.code == GONE
                    and left.count(pending[to]) < RETURNS
                ):
                    left.append(pending[to])
                    gone.add(pending.pop(to))
                elif (
                    give_back
                    and pending[to] not in outcome.restored
                    and (request := _request(reply)) is not None
                    and (content := give_back(pending[to], request)) is not None
                ):
                    name = pending.pop(to)
                    again[name] = addressed(asked[name].metadata.dst_node_id, asked[name], content)
                    outcome.restored[name] = payload_bytes(again[name])
                    what = (
                        "its memory was lost and is given back"
                        if wire.MEMORY_LOST in request
                        else "it lacks a part of the model and is sent all of it"
                    )
                    self.note(f"{phase}, client {name}: {what}")
                else:
                    if reply.has_content():
                        outcome.bytes_up += payload_bytes(reply)
                    yield pending.pop(to), reply
                del reply
            if at_once is None and not any_came:
                expired = time.monotonic() > end
            if expired:
                silent = [*pending.values(), *gone, *again]
                outcome.failed.update(dict.fromkeys(silent, silence))
                for name in again:
                    del outcome.restored[name]
                self._late |= {i: f"{phase}, client {name}" for i, name in pending.items()}
                return
            if gone:
                able = asked.keys() - outcome.failed.keys() - outcome.rejected.keys()
                kept = self._come_back(gone, again, asked, phase, outcome, len(able) - at_least)
                if kept - needed:
                    self.note(
                        f"{phase}: without client {', '.join(map(str, sorted(kept)))} there are "
                        f"too few (clients.min-replies = {at_least}); waiting, "
                        f"{end - time.monotonic():.0f} s at most (clients.deadline-s)"
                    )
                needed = kept
            if again:
                asked |= again
                push(again)
                sent |= pending
            if gone or again or not any_came:
                time.sleep(min(POLL_S, self.deadline_s))

    def _push(self, messages: dict[int, Message], pending: dict[str, int], phase: str) -> list[int]:
        """Send these, by the names of their receivers, and expect their replies.  Gives those
        whose node is not there any more."""
        if self.held_bytes is not None:
            wire.share(messages.values())
        ids = list(self.grid.push_messages(list(messages.values()))) if messages else []
        if self.held_bytes is not None:
            wire.forget_serialised(messages.values())
        if len(ids) != len(messages):
            raise RunFailed(f"{phase}: the grid took {len(ids)} of {len(messages)} messages")
        # Flower gives no id to a message for a node that it does not know.
        pending |= {i: name for i, name in zip(ids, messages, strict=True) if i}
        return [name for i, name in zip(ids, messages, strict=True) if not i]

    def _at_once(self, size: int, number: int) -> int | None:
        """How many replies as large as the messages may be here at once; None: as many as come."""
        if self.held_bytes is None or size * number <= self.held_bytes:
            return None
        return max(1, int(self.held_bytes // size))

    def _pulled(
        self,
        pending: dict[str, int],
        gone: set[int],
        order: list[int],
        at_once: int | None,
        last: bool,
    ) -> Iterator[Message]:
        """Replies that have come.  With `at_once`, one by one, those of the next in `order` only,
        so that the others wait where they are; `last`: of all."""
        if at_once is None:
            yield from self.grid.pull_messages([*pending, *self._late])
            return
        first = order.index(min([*pending.values(), *gone]))
        turn = order if last else order[first : first + at_once]
        due = sorted((name, i) for i, name in pending.items() if name in turn)
        for i in [*(i for _, i in due), *self._late]:
            yield from self.grid.pull_messages([i])

    def _come_back(
        self,
        gone: set[int],
        again: dict[int, Message],
        asked: dict[int, Message],
        phase: str,
        outcome: Outcome,
        spare: int,
    ) -> set[int]:
        """Into `again`, messages for those who are here again.  Of those whose time to come back is
        up, `spare` at most are left out; gives the others, who are waited for all the same."""
        kept = set()
        for name in sorted(gone):
            where = self.locate(name)
            if where is None and spare > 0:
                spare -= 1
                outcome.failed[name] = "its node is gone (clients.return-s)"
            elif where is None:
                kept.add(name)
            elif where != AWAITED:
                self.note(f"{phase}, client {name}: its node is back and is asked again")
                again[name] = addressed(where, asked[name], asked[name].content)
        gone -= outcome.failed.keys() | again.keys()
        return kept


def addressed(node_id: int, message: Message, content: RecordDict) -> Message:
    """A message like `message`, to this node and with this content."""
    metadata = message.metadata
    return Message(content, node_id, metadata.message_type, group_id=metadata.group_id)


def _request(reply: Message) -> MetricRecord | None:
    """The numbers of a reply that asks for a memory, or for what a message left out."""
    metrics = reply.content.get(wire.METRICS) if reply.has_content() else None
    asks = isinstance(metrics, MetricRecord) and {wire.MEMORY_LOST, wire.GROUPS_LOST} & {*metrics}
    return metrics if asks else None


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
    text = text.removeprefix("Exception ClientAppException occurred. Message: ")
    text = re.sub(r"^<class '[\w.]+'>:<'", "", text).removesuffix("'>")
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
