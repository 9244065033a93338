"""Who takes part: the roll call, the draw of a round's cohort, and the exchange of messages.

Clients are named by partition id.  Flower's node ids are random, and nothing that affects a
result depends on them or on the order of arrival.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from fl_common import wire
from fl_common.determinism import seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flwr.serverapp import Grid

    from fl_common.config import Clients, CoreConfig

POLL_S = 0.1
"""Pause between two looks for replies that have not come yet [s]."""


class RunFailed(RuntimeError):
    """The run cannot go on; the message is one line for its user."""


@dataclass(frozen=True)
class Member:
    """A client as the roll call found it."""

    partition: int
    node_id: int
    samples: int
    """n_i, training samples."""
    label_counts: tuple[int, ...]


@dataclass(frozen=True)
class Cohort:
    """A round's clients, in partition order, seen as a grid that has no other nodes."""

    grid: Grid
    members: Sequence[Member]

    def get_node_ids(self) -> list[int]:
        return [member.node_id for member in self.members]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)


@dataclass
class Exchange:
    """Messages out, replies in, and what became of each: all by the names of the receivers."""

    grid: Grid
    deadline_s: float

    def __post_init__(self) -> None:
        self.accepted: dict[int, MetricRecord] = {}
        self.failed: dict[int, str] = {}
        self.bytes_down = self.bytes_up = 0

    def replies(self, messages: Sequence[Message], names: Sequence[int]) -> Iterator[Message]:
        """Every good reply to `messages`, in the order of `names` (what each receiver is called).

        A reply that comes before its turn waits; one that has not come by the deadline never
        holds up the others beyond it.
        """
        early: dict[int, Message] = {}
        waiting = deque(names)
        for name, reply in self._arrivals(messages, names):
            early[name] = reply
            while waiting and (waiting[0] in early or waiting[0] in self.failed):
                yield from self._accept(waiting.popleft(), early)
        for name in waiting:
            yield from self._accept(name, early)

    def _accept(self, name: int, early: dict[int, Message]) -> Iterator[Message]:
        if name in early:
            reply = early.pop(name)
            self.accepted[name] = reply.content[wire.METRICS]
            yield reply

    def _arrivals(
        self, messages: Sequence[Message], names: Sequence[int]
    ) -> Iterator[tuple[int, Message]]:
        end = time.monotonic() + self.deadline_s
        ids = list(self.grid.push_messages(messages))
        if len(ids) != len(messages):
            raise RunFailed(f"the grid took {len(ids)} of {len(messages)} messages")
        self.bytes_down += sum(_payload(message) for message in messages)
        pending = dict(zip(ids, names, strict=True))
        while pending:
            arrived = list(self.grid.pull_messages(list(pending)))
            for reply in arrived:
                name = pending.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    self.failed[name] = _reason(reply)
                else:
                    self.bytes_up += _payload(reply)
                    yield name, reply
            if pending and time.monotonic() > end:
                late = f"no reply within {self.deadline_s:g} s (clients.deadline-s)"
                self.failed.update(dict.fromkeys(pending.values(), late))
                return
            if not arrived:
                time.sleep(POLL_S)


def _payload(message: Message) -> int:
    # Not content.array_records: that view and its content would keep each other, and the model in
    # them, alive until the next sweep of the garbage collector.
    records = (record for record in message.content.values() if isinstance(record, ArrayRecord))
    return sum(map(wire.payload_bytes, records))


def _reason(reply: Message) -> str:
    """The last line of an error's text: the exception, without its traceback."""
    lines = [line.strip() for line in (reply.error.reason or "").splitlines() if line.strip()]
    text = next((line for line in reversed(lines) if ": " in line), lines[-1] if lines else "")
    return text.rstrip("'>") or f"error code {reply.error.code}"


def roll_call(grid: Grid, config: CoreConfig, *, nodes_may_come: bool) -> list[Member]:
    """Ask every node who it is; members in partition order.

    In a simulation all nodes are there from the start, so a wrong number is an error at once;
    with `nodes_may_come` they are waited for until the deadline.  Raises RunFailed.
    """
    number, deadline_s = config.clients.number, config.clients.deadline_s
    end = time.monotonic() + deadline_s
    nodes = sorted(grid.get_node_ids())
    while nodes_may_come and len(nodes) < number and time.monotonic() < end:
        time.sleep(POLL_S)
        nodes = sorted(grid.get_node_ids())
    if len(nodes) != number:
        raise RunFailed(
            f"clients.number = {number} but the federation has {len(nodes)} nodes; pass "
            f'--federation-config "num-supernodes={number} client-resources-num-cpus=1" '
            f"or set clients.number={len(nodes)}"
        )
    ask = RecordDict({wire.CONFIG: ConfigRecord({"roll-call": True})})
    messages = [Message(ask, node, MessageType.QUERY, group_id="roll-call") for node in nodes]
    exchange = Exchange(grid, deadline_s)
    members = {}
    for reply in exchange.replies(messages, nodes):
        answer = reply.content[wire.METRICS]
        partition = int(answer["partition-id"])
        if partition in members:
            raise RunFailed(f"two nodes say that they hold partition {partition}")
        members[partition] = Member(
            partition=partition,
            node_id=reply.metadata.src_node_id,
            samples=int(answer["num-examples"]),
            label_counts=tuple(answer["label-counts"]),
        )
    if exchange.failed:
        reasons = list(dict.fromkeys(exchange.failed.values()))
        raise RunFailed(
            f"roll call: {len(members)} of {number} clients answered; the others: "
            + "; ".join(reasons)
        )
    return [members[partition] for partition in sorted(members)]


def draw(clients: Clients, seed: int, server_round: int) -> list[int]:
    """The partitions of a round, ascending, from the stream (seed, round)."""
    rng = np.random.default_rng(seed_of("cohort", seed, server_round))
    size = clients.per_round or clients.number
    if size == clients.number:
        return list(range(clients.number))
    if clients.sampling == "fixed":
        return sorted(rng.choice(clients.number, size, replace=False).tolist())
    drawn: list[int] = []
    while not drawn:
        drawn = np.flatnonzero(rng.random(clients.number) < size / clients.number).tolist()
    return drawn
