"""Who takes part: the roll call, and the draw of a round's cohort.

Clients are named by partition id.  Flower's node ids are random, and nothing that affects a
result depends on them or on the order of arrival.  With `clients.keys` a name is bound to a key:
the SuperLink lets in only who has the private key of a node, and tells the public one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fl_common import wire
from fl_common.determinism import seed_of
from fl_common.failures import harmless
from fl_common.fingerprint import code_sha256, versions
from fl_server.exchange import AWAITED, POLL_S, RunFailed, by_reason, reason_of
from fl_server.keys import of_flower

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from flwr.serverapp import Grid

    from fl_common.config import Clients
    from fl_server.exchange import Exchange

NOBODY = -1
"""The partition of a node whose key is no client's."""
AGAIN_S = 10.0
"""How long after an error a node is asked again [s]."""


@dataclass(frozen=True)
class Member:
    """A client as it answered the roll call."""

    node_id: int
    partition: int
    samples: int
    """n_i, training samples."""
    held_out: int
    """Samples that it evaluates on."""
    label_counts: tuple[int, ...]
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    """A sample's shape as the model receives it."""
    data: str
    """Digest of its data set."""
    code: str
    """Digest of its package code."""
    versions: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, reply: Message) -> Member:
        """Raises KeyError, OverflowError, TypeError or ValueError for a malformed answer."""
        numbers, words = reply.content[wire.METRICS], reply.content[wire.CONFIG]
        member = cls(
            node_id=reply.metadata.src_node_id,
            partition=int(numbers["partition-id"]),
            samples=int(numbers["num-examples"]),
            held_out=int(numbers["held-out"]),
            label_counts=tuple(numbers["label-counts"]),
            classes=tuple(map(str, words["classes"])),
            shape=tuple(map(int, words["shape"])),
            data=harmless(str(words["data"])),
            code=harmless(str(words["code"])),
            versions=tuple((name, harmless(str(words[name]))) for name in versions()),
        )
        counts = member.label_counts
        whole = len(counts) == len(member.classes) and sum(counts) == member.samples
        if not whole or min(counts, default=0) < 0:
            raise ValueError("its label counts are not those of its samples")
        return member


@dataclass(frozen=True)
class Cohort:
    """Some members, in partition order, seen as a grid that has no other nodes."""

    grid: Grid
    members: Sequence[Member]

    def get_node_ids(self) -> list[int]:
        return [member.node_id for member in self.members]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)


def _query(node: int, key: str, value: str | bool) -> Message:
    content = RecordDict({wire.CONFIG: ConfigRecord({key: value})})
    return Message(content, node, MessageType.QUERY, group_id="roll-call")


def judge(
    answers: Iterable[Member],
    present: Mapping[int, Member],
    number: int,
    code: str,
    owners: Mapping[int, int] | None = None,
) -> tuple[dict[int, Member], dict[int, str]]:
    """Members by partition, and the reasons of those refused by node id.

    `present`: the members so far, who keep their places.  The verdict depends on the set of
    answers, not on their order: of two newcomers with one partition neither is taken.
    `owners`: the partition of each node by its key; None: keys are not compared.
    """
    answers = sorted(answers, key=lambda member: (member.partition, member.node_id))
    refused: dict[int, str] = {}
    claims: dict[int, list[Member]] = {}
    for member in answers:
        if owners is not None and owners[member.node_id] != member.partition:
            refused[member.node_id] = (
                f"it says partition-id {member.partition}, but its key is that of client "
                f"{owners[member.node_id]} (clients.keys)"
            )
        elif member.code != code:
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
    """The same without members whose data do not fit those of the lowest partition."""
    good: dict[int, Member] = {}
    for partition in sorted(members):
        member = members[partition]
        first = good[min(good)] if good else member
        if member.classes != first.classes:
            refused[member.node_id] = (
                f"client {member.partition}'s classes {_few(member.classes)} differ from client "
                f"{first.partition}'s {_few(first.classes)}; name and order them alike"
            )
        elif member.shape != first.shape:
            refused[member.node_id] = (
                f"client {member.partition}'s samples have shape "
                f"{harmless(str(list(member.shape)))}, client "
                f"{first.partition}'s {list(first.shape)}"
            )
        else:
            good[partition] = member
    return good, refused


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(harmless, names[:6]))
    return f"({shown}, ... {len(names)} in all)" if len(names) > 6 else f"({shown})"


class Roster:
    """The members of a run; asks every node that appears, and waits only for clients that were
    here and may come back."""

    def __init__(
        self,
        exchange: Exchange,
        number: int,
        return_s: float = 0.0,
        keys: Mapping[int, str] | None = None,
    ) -> None:
        """`return_s`: how long a client whose node is gone is waited for [s]; `keys`: public keys
        by partition, None: not compared."""
        self.exchange, self.number, self.return_s = exchange, number, return_s
        self._partition_of = None if keys is None else {key: i for i, key in keys.items()}
        self.members: dict[int, Member] = {}
        self.refused: dict[int, str] = {}
        """Why nodes are refused, by node id."""
        self.known: dict[int, Member] = {}
        """Everyone who has been a member since the roll call ended, each as first seen."""
        self._told: set[str] = set()
        """Reasons of refusals that were noted: each is noted once."""
        self._again: dict[int, float] = {}
        """When to ask a node again that answered with an error, by the monotonic clock [s]."""
        self._left: dict[int, float] = {}
        """When it was seen that a client's node is gone, by partition."""
        self._nodes: dict[int, int] = {}
        """Which node that was."""
        self._listed: dict[int, str] = {}
        """The nodes that were connected at the last look, and since when."""
        self._asked: dict[str, int] = {}
        """Nodes that were asked and have not answered yet, by message id."""
        self._answers: dict[int, Member] = {}
        """Answers without a verdict yet, by node id."""
        self._owners: dict[int, int] | None = None if keys is None else {}
        """The partitions whose keys the listed nodes have, by node id."""

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
            self.ask()
            self.known = dict(self.members)  # until all are here, one may come back changed
            late = time.monotonic() > end
            if late or not self._asked:
                self.judge()
            if len(self.members) == self.number:
                return
            if late or not (nodes_may_come or self._asked):
                raise RunFailed(self._absence(waited=late))
            if nodes_may_come and told != len(self.members):
                told = len(self.members)
                self.exchange.note(
                    f"waiting for clients: {told} of {self.number} are here, "
                    f"{end - time.monotonic():.0f} s left (clients.deadline-s)"
                )
            time.sleep(POLL_S)

    def _absence(self, waited: bool) -> str:
        when = f" after {self.exchange.deadline_s:g} s (clients.deadline-s)" if waited else ""
        return (
            f"roll call: clients.number = {self.number}, but {len(self.members)} can take part"
            f"{when}" + "".join(f"; {who}: {why}" for why, who in by_reason(self.refused, "node"))
        )

    def refresh(self) -> None:
        """Between rounds: take in who has answered, forget who is gone."""
        self.ask()
        self.judge()

    def ask(self) -> None:
        """Ask the nodes that are new and collect the answers that have come.

        A node that was refused is asked again once any node has gone, since the place that it
        claimed may be free; one that answered with an error, after AGAIN_S.  A node with an unknown
        key is refused without being asked.
        """
        grid = self.exchange.grid
        left = self._look()
        for partition in [p for p, m in self.members.items() if m.node_id in left]:
            self._nodes[partition] = self.members.pop(partition).node_id
            self._left[partition] = time.monotonic()
        self._answers = {n: m for n, m in self._answers.items() if n not in left}
        self._asked = {i: n for i, n in self._asked.items() if n not in left}
        for node in [n for n, when in self._again.items() if when < time.monotonic()]:
            del self._again[node]
            self.refused.pop(node, None)
        known = {member.node_id for member in self.members.values()}
        known |= {*self.refused, *self._answers, *self._asked.values()}
        new = sorted(self._listed.keys() - known)
        if new:
            # The id of a message to a node that has just left is "".
            ids = grid.push_messages([_query(node, "roll-call", True) for node in new])
            self._asked |= {i: node for i, node in zip(ids, new, strict=True) if i}
        while self._asked and (replies := list(grid.pull_messages(list(self._asked)))):
            for reply in replies:
                self._take(reply)

    def _look(self) -> set[int]:
        """List the nodes that are connected; those that have left since the last look, among them
        who is there again.  Once any node has left, all refusals are forgotten: see `ask`."""
        nodes = list(self.exchange.grid.get_nodes())
        if self._partition_of is not None:
            keys = {node.node_id: of_flower(node.public_key) for node in nodes}
            self._owners = {n: self._partition_of.get(key, NOBODY) for n, key in keys.items()}
        # A node with a key has the same id after a restart.
        there = {node.node_id: node.last_activated_at for node in nodes}
        left = {node for node, since in self._listed.items() if there.get(node) != since}
        if left:
            self.refused.clear()
            self._told.clear()
        self._listed = there
        strangers = {n for n, owner in (self._owners or {}).items() if owner == NOBODY}
        self._refuse(
            dict.fromkeys(
                sorted(strangers - self.refused.keys()),
                "its key was not in clients.keys when the run began; start it with the --auth-key "
                "made for it, or add the key there and start the run again",
            )
        )
        return left

    def _take(self, reply: Message) -> None:
        node = self._asked.pop(reply.metadata.reply_to_message_id, None)
        if node is None:
            return
        if reply.has_error():
            self._refuse({node: reason_of(reply)})
            self._again[node] = time.monotonic() + AGAIN_S
            return
        try:
            self._answers[node] = replace(Member.of(reply), node_id=node)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            self._refuse({node: f"its answer cannot be read: {error!r}"})

    def judge(self) -> None:
        """A verdict on all answers that have come."""
        answers = list(self._answers.values())
        if not answers:
            return
        self._answers = {}
        changed = {
            member.node_id: f"client {member.partition} came back with other data "
            f"({member.samples} training samples); give it the same data again, or start a new run"
            for member in answers
            if not self._as_before(member)
        }
        fitting = [member for member in answers if member.node_id not in changed]
        self.members, refused = judge(
            fitting, self.members, self.number, code_sha256(), self._owners
        )
        self.known = {**self.members, **self.known}
        refused |= changed
        self._refuse(refused)
        if refused:  # they are told, and nobody waits for an answer
            told = [_query(node, wire.REFUSED, refused[node]) for node in sorted(refused)]
            self.exchange.grid.push_messages(told)
        own = tuple(versions().items())
        for member in answers:
            if member.versions != own and member.node_id not in refused:
                self.exchange.note(
                    f"roll call: client {member.partition} has {dict(member.versions)}, the "
                    f"server {dict(own)}: bits may differ"
                )

    def _as_before(self, member: Member) -> bool:
        before = self.known.get(member.partition, member)
        return (before.samples, before.data, before.classes, before.shape) == (
            member.samples, member.data, member.classes, member.shape
        )  # fmt: skip

    def _refuse(self, reasons: dict[int, str]) -> None:
        for reason, who in by_reason(reasons, "node"):
            if reason not in self._told:
                self._told.add(reason)
                self.exchange.note(f"roll call: refused {who}: {reason}")
        self.refused |= reasons

    def awaited(self, partitions: Iterable[int]) -> list[int]:
        """Those of `partitions` that are not here and may still come back in time."""
        since = time.monotonic() - self.return_s
        return [p for p in partitions if p not in self.members and self._left.get(p, since) > since]

    def wait_for(self, partitions: Sequence[int]) -> None:
        """Wait until these are here, or their time to come back is up."""
        self.refresh()
        awaited = self.awaited(partitions)
        if awaited:
            who = ", ".join(map(str, awaited))
            self.exchange.note(
                f"waiting for client {who} to come back, {self.return_s:g} s at most "
                "(clients.return-s)"
            )
        while self.awaited(partitions):
            time.sleep(POLL_S)
            self.refresh()

    def locate(self, partitions: Collection[int]) -> dict[int, int | None]:
        """The node ids of clients that went away in a round, by one look at all nodes; AWAITED for
        one that may still come back, None for one whose time is up.

        A node that is there again and silent is at work on what it was asked before, and has until
        the round's deadline like everyone."""
        self.refresh()
        found: dict[int, int | None] = dict.fromkeys(partitions)
        at_work = {p for p, node in self._nodes.items() if node in self._asked.values()}
        found |= dict.fromkeys([*self.awaited(partitions), *at_work & found.keys()], AWAITED)
        return found | {p: self.members[p].node_id for p in partitions if p in self.members}

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
