"""Who takes part: the roll call, and the draw of a round's cohort.

Clients are named by partition id.  Flower's node ids are random, and nothing that affects a
result depends on them or on the order of arrival.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fl_common import wire
from fl_common.determinism import seed_of
from fl_common.fingerprint import code_sha256, versions
from fl_server.exchange import Outcome, RunFailed, by_reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from flwr.serverapp import Grid

    from fl_common.config import Clients
    from fl_server.exchange import Exchange

WAIT_S = 0.5
"""Pause between two looks for nodes that have not come yet [s]."""


@dataclass(frozen=True)
class Member:
    """A client as it answered the roll call."""

    node_id: int
    partition: int
    samples: int
    """n_i, training samples."""
    label_counts: tuple[int, ...]
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    """A sample's shape as the model receives it."""
    code: str
    """Digest of its package code."""
    versions: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, reply: Message) -> Member:
        numbers, words = reply.content[wire.METRICS], reply.content[wire.CONFIG]
        return cls(
            node_id=reply.metadata.src_node_id,
            partition=int(numbers["partition-id"]),
            samples=int(numbers["num-examples"]),
            label_counts=tuple(numbers["label-counts"]),
            classes=tuple(words["classes"]),
            shape=tuple(words["shape"]),
            code=str(words["code"]),
            versions=tuple((name, str(words[name])) for name in versions()),
        )


@dataclass(frozen=True)
class Cohort:
    """Some members, in partition order, seen as a grid that has no other nodes."""

    grid: Grid
    members: Sequence[Member]

    def get_node_ids(self) -> list[int]:
        return [member.node_id for member in self.members]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)


def judge(
    answers: Iterable[Member], present: Mapping[int, Member], number: int, code: str
) -> tuple[dict[int, Member], dict[int, str]]:
    """Members by partition, and the reasons of those refused by node id.

    `present`: the members so far, who keep their places.  The verdict depends on the set of
    answers, not on their order: of two newcomers with one partition neither is taken.
    """
    answers = sorted(answers, key=lambda member: (member.partition, member.node_id))
    refused: dict[int, str] = {}
    claims: dict[int, list[Member]] = {}
    for member in answers:
        if member.code != code:
            refused[member.node_id] = "its package code differs from the server's; update it"
        elif not 0 <= member.partition < number:
            refused[member.node_id] = (
                f"it has partition-id {member.partition}, but clients.number = {number}"
            )
        elif member.samples < 1:
            refused[member.node_id] = "it has no training samples"
        else:
            claims.setdefault(member.partition, []).append(member)
    members = dict(present)
    for partition, claimants in claims.items():
        if partition in present or len(claimants) > 1:
            for member in claimants:
                refused[member.node_id] = (
                    f"another node has partition-id {partition} too; give each its own"
                )
        else:
            members[partition] = claimants[0]
    return _like_first(members, refused)


def _like_first(
    members: dict[int, Member], refused: dict[int, str]
) -> tuple[dict[int, Member], dict[int, str]]:
    """Without those whose data do not fit the lowest partition's."""
    good: dict[int, Member] = {}
    for partition in sorted(members):
        member = members[partition]
        first = good[min(good)] if good else member
        if member.classes != first.classes:
            refused[member.node_id] = (
                f"its classes {_few(member.classes)} differ from client {first.partition}'s "
                f"{_few(first.classes)}; name and order them alike"
            )
        elif member.shape != first.shape:
            refused[member.node_id] = (
                f"its samples have shape {list(member.shape)}, client {first.partition}'s "
                f"{list(first.shape)}"
            )
        else:
            good[partition] = member
    return good, refused


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"({shown}, ... {len(names)} in all)" if len(names) > 6 else f"({shown})"


class Roster:
    """The members of a run; asks every node that appears."""

    def __init__(self, exchange: Exchange, number: int) -> None:
        self.exchange, self.number = exchange, number
        self.members: dict[int, Member] = {}
        self.refused: dict[int, str] = {}
        """Reasons by node id."""

    def assemble(self, *, nodes_may_come: bool) -> None:
        """The roll call before the first round.  Raises RunFailed unless all clients are there.

        In a simulation all nodes are there from the start, so a wrong number is an error at
        once; with `nodes_may_come` they are waited for until the deadline.
        """
        end = time.monotonic() + self.exchange.deadline_s
        nodes = list(self.exchange.grid.get_node_ids())
        if not nodes_may_come and len(nodes) != self.number:
            raise RunFailed(
                f"clients.number = {self.number} but the federation has {len(nodes)} nodes; pass "
                f'--federation-config "num-supernodes={self.number} client-resources-num-cpus=1" '
                f"or set clients.number={len(nodes)}"
            )
        told = -1
        while True:
            self.refresh()
            if len(self.members) == self.number:
                return
            if not nodes_may_come or time.monotonic() > end:
                raise RunFailed(self._absence(waited=nodes_may_come))
            if told != len(self.members):
                told = len(self.members)
                self.exchange.note(f"waiting for clients: {told} of {self.number} are here")
            time.sleep(WAIT_S)

    def _absence(self, waited: bool) -> str:
        reasons = list(dict.fromkeys(self.refused.values()))
        if waited:
            reasons.append(f"waited {self.exchange.deadline_s:g} s (clients.deadline-s)")
        return (
            f"roll call: clients.number = {self.number}, but {len(self.members)} can take part"
            + "".join(f"; {reason}" for reason in reasons)
        )

    def refresh(self) -> None:
        """Ask the nodes that are new, forget those that are gone.

        A refused node is asked again only after it was away.
        """
        nodes = set(self.exchange.grid.get_node_ids())
        self.members = {p: m for p, m in self.members.items() if m.node_id in nodes}
        self.refused = {n: reason for n, reason in self.refused.items() if n in nodes}
        known = {member.node_id for member in self.members.values()} | self.refused.keys()
        if not nodes - known:
            return
        answers, refused = self._ask(sorted(nodes - known))
        self.members, unfit = judge(answers, self.members, self.number, code_sha256())
        refused |= unfit
        for reason, who in by_reason(refused, "node"):
            self.exchange.note(f"roll call: refused {who}: {reason}")
        self.refused |= refused
        own = tuple(versions().items())
        for member in answers:
            if member.versions != own and member.node_id not in refused:
                self.exchange.note(
                    f"roll call: client {member.partition} has {dict(member.versions)}, the "
                    f"server {dict(own)}: bits may differ"
                )

    def _ask(self, nodes: Sequence[int]) -> tuple[list[Member], dict[int, str]]:
        """The answers of these nodes, and by node why some gave none."""
        ask = RecordDict({wire.CONFIG: ConfigRecord({"roll-call": True})})
        messages = [Message(ask, node, MessageType.QUERY, group_id="roll-call") for node in nodes]
        outcome, answers = Outcome(), []
        for reply in self.exchange.replies(messages, nodes, "roll call", outcome):
            try:
                answers.append(Member.of(reply))
            except (KeyError, TypeError, ValueError) as error:
                node = reply.metadata.src_node_id
                outcome.failed[node] = f"its answer cannot be read: {error!r}"
        return answers, outcome.failed

    def drawn(self, partitions: Sequence[int]) -> tuple[list[Member], dict[int, str]]:
        """The members of a cohort, and those of it who are not connected, with the reason."""
        here = [self.members[p] for p in partitions if p in self.members]
        return here, {p: "not connected" for p in partitions if p not in self.members}


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
