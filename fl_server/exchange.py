"""Messages out, replies in: polled, guarded, and handed on in partition order as they come."""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flwr.app import Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fl_common import wire
from fl_common.failures import harmless
from fl_common.guards import objection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from flwr.serverapp import Grid

    from fl_common.guards import Expected

    GiveBack = Callable[[int, MetricRecord], RecordDict | None]

POLL_S = 0.1
"""Pause between two looks for replies that have not come yet [s]."""

LOOK_S = 1.0
"""How often the nodes of those who have yet to answer are looked at, if they are not asked [s]."""
GONE = ErrorCode.NODE_UNAVAILABLE
"""The error by which Flower says that a node is away when its reply is asked for."""
HELD_BYTES = 64_000_000
"""The most that replies which come before their turn may take up here; others wait at the
SuperLink [bytes]."""
RETURNS = 3
"""How often a client is asked again in a round because its node went away and came back."""
AWAITED = -1
SPARE_S = 600.0
"""The least time beyond the deadline for which a message lives: to fetch replies that came in time,
and for clocks that differ [s]."""


class RunFailed(RuntimeError):
    """The run cannot go on; the message is one line for its user."""


class Unresumable(RunFailed):
    """Nor can it be resumed."""


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
    """Bytes of the second message to clients that had lost something: their memory, or a part of
    the model that the first message left out."""
    bytes_down: int = 0
    """What the algorithm sends; not what is sent again because a client lost something."""
    bytes_up: int = 0


@dataclass
class _Phase:
    """One phase's messages under way."""

    name: str
    asked: dict[int, Message]
    """The newest message to each client."""
    outcome: Outcome
    at_least: int
    give_back: GiveBack | None
    pending: dict[str, int] = field(default_factory=dict)
    """Who has yet to answer, by message id."""
    sent: dict[str, int] = field(default_factory=dict)
    """Who was asked, by the ids of all messages."""
    expires: dict[str, float] = field(default_factory=dict)
    """When each message expires, by the monotonic clock [s]."""
    since: dict[str, str] = field(default_factory=dict)
    """Since when the node of each message has been there, by its id and the SuperLink's clock."""
    looked: float = 0.0
    """When it was last looked whether these nodes are there, by the monotonic clock [s]."""
    away: set[int] = field(default_factory=set)
    """Clients whose node was not there then."""
    gone: set[int] = field(default_factory=set)
    """Clients whose node went away with the message, or before it, and that may come back."""
    needed: set[int] = field(default_factory=set)
    """Of these, the ones that are waited for until the deadline: without them there are too few."""
    left: Counter[int] = field(default_factory=Counter)
    """How often each client's node was found gone."""

    def spare(self) -> int:
        """How many more clients may still give a good reply than the phase needs."""
        able = self.asked.keys() - self.outcome.failed.keys() - self.outcome.rejected.keys()
        return len(able) - self.at_least


class Exchange:
    """All traffic of a run.  Messages that had no reply stay known as long as they live, so that a
    late reply is told from a good one; it is dropped, and `note` says so."""

    def __init__(self, grid: Grid, deadline_s: float, note: Callable[[str], None] = print) -> None:
        self.grid, self.deadline_s, self.note = grid, deadline_s, note
        self.locate: Callable[[Collection[int]], dict[int, int | None]] | None = None
        """The node ids of clients; AWAITED for one that may still come back, None for one that is
        gone for good."""
        self.held_bytes: float | None = None
        """HELD_BYTES where the grid is another process, None where replies wait in this one."""
        self._late: dict[str, tuple[str, float]] = {}
        """A name for each message whose reply did not come in time, and when the message expires,
        by message id."""

    def replies(
        self,
        asked: Mapping[int, Message],
        phase: str,
        outcome: Outcome,
        expected: Callable[[int], Expected],
        at_least: int = 0,
        give_back: GiveBack | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        large: int = 0,
    ) -> Iterator[tuple[int, Message]]:
        """Push messages and yield every good reply with the name of its client, names ascending.

        `asked`: each client's message, by its name; `expected`: what its reply must be.  A reply
        that comes before its turn waits.  Who has not answered by the deadline is left out.
        A client that lacks something is asked once more, with the content that `give_back` makes;
        for a request without cause that is None, and the guards reject the request.
        `meanwhile` is called once the messages are on their way.  `large`: the bytes of the largest
        reply, if it may be larger than the messages.
        Raises RoundFailed at the end if fewer than `at_least` replies were good.
        """
        early: dict[int, Message] = {}
        waiting = deque(sorted(asked))
        under_way = _Phase(phase, dict(asked), outcome, at_least, give_back)
        for name, reply in self._arrivals(under_way, meanwhile, large):
            if reply.has_error():
                outcome.failed[name] = reason_of(reply)
            elif problem := objection(reply.content, expected(name)):
                outcome.rejected[name] = harmless(problem)
            else:
                early[name] = reply
            del reply  # as below: no large model is kept while the next one comes
            while waiting and (waiting[0] in early or _settled(waiting[0], outcome)):
                yield from _accept(waiting.popleft(), early, outcome)
        for name in waiting:
            yield from _accept(name, early, outcome)
        if len(outcome.accepted) < at_least:
            raise RoundFailed(_shortage(phase, outcome, at_least))

    def _arrivals(
        self, phase: _Phase, meanwhile: Callable[[], None], large: int
    ) -> Iterator[tuple[int, Message]]:
        """Replies as they come, errors included, until all are there or time is up.

        A client whose node is gone is given up after its time (clients.return-s), unless the phase
        would have too few replies without it.
        """
        self._push(phase, phase.asked)
        phase.looked = time.monotonic()
        meanwhile()
        end = time.monotonic() + self.deadline_s
        outcome, sizes = phase.outcome, list(map(payload_bytes, phase.asked.values()))
        outcome.bytes_down += sum(sizes)
        at_once = self._at_once(max([large, *sizes]), len(sizes))
        # A reply that waits at the SuperLink came in time, however late it is fetched; one of this
        # process is made when it is fetched, and is as late as that.
        elsewhere = self.held_bytes is not None
        while phase.pending or phase.gone:
            again: dict[int, Message] = {}
            any_came = False
            expired = elsewhere and time.monotonic() > end
            turn = self._turn(phase, None if expired else at_once)
            back = self._back(phase, turn, end) if phase.gone and not expired else {}
            arrived = self._pulled(phase, turn | back.keys(), at_once)
            if not elsewhere:
                arrived, expired = list(arrived), time.monotonic() > end
            for reply in arrived:
                any_came = True
                name = self._sender(reply, phase)
                if name is None:
                    pass
                elif expired and not elsewhere:
                    outcome.failed[name] = self._silence()
                elif _node_left(reply) and self._may_come_back(name, phase):
                    pass
                elif message := self._completed(name, reply, phase):
                    again[name] = message
                else:
                    if reply.has_content():
                        outcome.bytes_up += payload_bytes(reply)
                    yield name, reply
                del reply
            del arrived
            if expired:
                self._give_up(phase, again)
                return
            again |= self._repeated(phase, back)
            if again:
                phase.asked |= again
                self._push(phase, again)
            if phase.gone or again or not any_came:
                time.sleep(min(POLL_S, self.deadline_s))

    def _push(self, phase: _Phase, messages: dict[int, Message]) -> None:
        """Send these, by the names of their receivers, and expect their replies."""
        # Flower's own 12 hours may be less than the deadline; and a node that was silent for many
        # rounds would have to work through the messages of them all.
        life = self.deadline_s + max(self.deadline_s, SPARE_S)
        expires = time.monotonic() + life
        for message in messages.values():
            message.metadata.ttl = life
        there = {}
        if self.held_bytes is not None:
            there = self._there()
            wire.share(messages.values())
        ids = list(self.grid.push_messages(list(messages.values()))) if messages else []
        if self.held_bytes is not None:
            wire.forget_serialised(messages.values())
        if len(ids) != len(messages):
            raise RunFailed(f"{phase.name}: the grid took {len(ids)} of {len(messages)} messages")
        for message_id, name in zip(ids, messages, strict=True):
            if message_id:
                phase.pending[message_id] = phase.sent[message_id] = name
                phase.expires[message_id] = expires
                node = messages[name].metadata.dst_node_id
                if node in there:
                    phase.since[message_id] = there[node]
            # Flower gives no id to a message for a node that it does not know.
            elif not self._may_come_back(name, phase):
                phase.outcome.failed[name] = "its node is gone"

    def _at_once(self, size: int, number: int) -> int | None:
        """How many of `number` replies of this size may be here at once; None: all."""
        if self.held_bytes is None or size * number <= self.held_bytes:
            return None
        return max(1, int(self.held_bytes // size))

    def _turn(self, phase: _Phase, at_once: int | None) -> set[int]:
        """Clients whose replies are asked for: with `at_once` as many as may be here, of those
        whose turn is next, so that the others wait where they are."""
        order = sorted(phase.asked)
        first = order.index(min([*phase.pending.values(), *phase.gone]))
        return set(order[first:][:at_once])

    def _pulled(self, phase: _Phase, names: set[int], at_once: int | None) -> Iterator[Message]:
        """Replies of these clients that have come; with `at_once`, one by one.

        Flower hands a message to a node once.  Who asks for the reply while the node is away is
        told so, and the reply, if there is one, is deleted; it is not asked for then.
        """
        now = time.monotonic()
        self._late = {i: late for i, late in self._late.items() if now < late[1]}
        self._look(phase, now)
        names = names - phase.away
        due = {i: name for i, name in phase.pending.items() if name in names}
        if at_once is None:
            phase.looked = now
            yield from self.grid.pull_messages([*due, *self._late])
        else:
            for i in [*sorted(due, key=due.get), *self._late]:
                yield from self.grid.pull_messages([i])

    def _look(self, phase: _Phase, now: float) -> None:
        """Whether the nodes of those who have yet to answer are there, and have been since they
        were asked; not where nodes stay, or where all were looked at a moment ago."""
        if self.held_bytes is None or not phase.pending or now < phase.looked + LOOK_S:
            return
        there, phase.looked, phase.away = self._there(), now, set()
        for i, name in list(phase.pending.items()):
            node = phase.asked[name].metadata.dst_node_id
            if node not in there:
                phase.away.add(name)
            # A node that was away when it was asked has the message since it is there.
            elif there[node] == phase.since.setdefault(i, there[node]):
                continue
            if name not in phase.gone and not self._may_come_back(name, phase):
                self._lost(name, phase)
                phase.outcome.failed[name] = "its node is gone"

    def _lost(self, name: int, phase: _Phase) -> None:
        """No reply is expected of this client any more; one that comes is late."""
        for i in [i for i, who in phase.pending.items() if who == name]:
            del phase.pending[i]
            self._late[i] = f"{phase.name}, client {name}", phase.expires[i]

    def _there(self) -> dict[int, str]:
        """The nodes that are connected, by id, and since when: a node with a key has the same id
        after a restart."""
        return {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}

    def _sender(self, reply: Message, phase: _Phase) -> int | None:
        """Whose pending reply this is, no longer pending then; None, and a note, for any other."""
        to = reply.metadata.reply_to_message_id
        if to in phase.pending:
            name = phase.pending.pop(to)
            phase.gone.discard(name)
            return name
        if to in self._late:
            whose, _ = self._late.pop(to)
            if not _node_left(reply):
                self.note(f"{phase.name}: dropped a late reply: {whose}")
        else:
            who = f"client {phase.sent[to]}" if to in phase.sent else "nobody who was asked"
            self.note(f"{phase.name}: dropped a repeated or unknown reply of {who}")
        return None

    def _silence(self) -> str:
        return f"no reply within {self.deadline_s:g} s (clients.deadline-s)"

    def _give_up(self, phase: _Phase, again: dict[int, Message]) -> None:
        """Time is up, for those too who were about to be asked `again`."""
        silent = [*phase.pending.values(), *phase.gone, *again]
        phase.outcome.failed.update(dict.fromkeys(silent, self._silence()))
        for name in again:
            del phase.outcome.restored[name]
        for name in silent:
            self._lost(name, phase)

    def _completed(self, name: int, reply: Message, phase: _Phase) -> Message | None:
        """The client's message completed by what it lacks, if it asks for that; once a phase."""
        if not phase.give_back or name in phase.outcome.restored:
            return None
        request = _request(reply)
        content = phase.give_back(name, request) if request else None
        if content is None:
            return None
        asked = phase.asked[name]
        message = addressed(asked.metadata.dst_node_id, asked, content)
        phase.outcome.restored[name] = payload_bytes(message)
        what = (
            "its memory was lost and is given back"
            if wire.MEMORY_LOST in request
            else "it lacks a part of the model and is sent all of it"
        )
        self.note(f"{phase.name}, client {name}: {what}")
        return message

    def _may_come_back(self, name: int, phase: _Phase) -> bool:
        """Whether a client whose node is not there is waited for; it then counts as gone."""
        if not self.locate or phase.left[name] >= RETURNS:
            return False
        phase.left[name] += 1
        phase.gone.add(name)
        return True

    def _back(self, phase: _Phase, turn: set[int], end: float) -> dict[int, int]:
        """The gone clients that are back, and their nodes.  Of those whose time to come back is up,
        once it is their turn, as many are given up as can be spared; the others are waited for all
        the same."""
        back, needed, spare = {}, set(), phase.spare()
        for name, where in self.locate(sorted(phase.gone)).items():
            if where is None and name in turn and spare > 0:
                spare -= 1
                phase.gone.remove(name)
                self._lost(name, phase)
                phase.outcome.failed[name] = "its node is gone (clients.return-s)"
            elif where is None:
                needed |= {name} & turn
            elif where != AWAITED:
                back[name] = where
                if where == phase.asked[name].metadata.dst_node_id:
                    phase.away.discard(name)
        if needed - phase.needed:
            self.note(
                f"{phase.name}: without client {', '.join(map(str, sorted(needed)))} there are "
                f"too few (clients.min-replies = {phase.at_least}); waiting, "
                f"{end - time.monotonic():.0f} s at most (clients.deadline-s)"
            )
        phase.needed = needed
        return back

    def _repeated(self, phase: _Phase, back: Mapping[int, int]) -> dict[int, Message]:
        """Messages for the clients that are back and whose reply was asked for since: a node that
        has answered the roll call works on nothing else, and what is not there by then was lost."""
        again = {}
        for name in sorted(back.keys() & phase.gone):
            phase.gone.remove(name)
            phase.away.discard(name)
            self._lost(name, phase)
            self.note(f"{phase.name}, client {name}: its node is back and is asked again")
            asked = phase.asked[name]
            again[name] = addressed(back[name], asked, asked.content)
        return again


def _node_left(reply: Message) -> bool:
    return reply.has_error() and reply.error.code == GONE


def addressed(node_id: int, message: Message, content: RecordDict) -> Message:
    """A message like `message`, to this node and with this content."""
    metadata = message.metadata
    return Message(content, node_id, metadata.message_type, group_id=metadata.group_id)


def _request(reply: Message) -> MetricRecord | None:
    """The metrics of a reply that asks for a memory, or for what a message left out; None if the
    reply asks for nothing."""
    metrics = reply.content.get(wire.METRICS) if reply.has_content() else None
    asks = isinstance(metrics, MetricRecord) and {wire.MEMORY_LOST, wire.GROUPS_LOST} & {*metrics}
    return metrics if asks else None


def _settled(name: int, outcome: Outcome) -> bool:
    return name in outcome.failed or name in outcome.rejected


def _accept(
    name: int, early: dict[int, Message], outcome: Outcome
) -> Iterator[tuple[int, Message]]:
    if name in early:
        reply = early.pop(name)
        outcome.accepted[name] = reply.content[wire.METRICS]
        yield name, reply


def payload_bytes(message: Message) -> int:
    """numel x itemsize of all arrays of a message."""
    return sum(map(wire.payload_bytes, wire.array_records(message.content).values()))


def reason_of(reply: Message) -> str:
    """The last line of an error's text: the exception, without its traceback."""
    if reply.error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION:
        # A copy of the app that a full disk or a power cut left unfinished is never completed.
        return (
            "the app cannot be loaded there; its log says why; if its copy of the app is "
            "incomplete, delete $FLWR_HOME/apps (~/.flwr/apps) on that machine"
        )
    lines = [line.strip() for line in (reply.error.reason or "").splitlines() if line.strip()]
    text = next((line for line in reversed(lines) if ": " in line), lines[-1] if lines else "")
    text = text.removeprefix("Exception ClientAppException occurred. Message: ")
    text = re.sub(r"^<class '[\w.]+'>:<'", "", text).removesuffix("'>")
    return harmless(text) or f"error code {reply.error.code}"


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
