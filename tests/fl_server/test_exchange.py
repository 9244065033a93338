"""Every client that is asked is accepted, failed or rejected, whatever comes back and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from fl_common import wire
from fl_common.guards import Expected, Spec
from fl_server.exchange import AWAITED, Exchange, Outcome, reason_of
from tests.clock import Clock

GOOD = MetricRecord({"server-round": 1, "num-examples": 3})


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose messages these are, which Flower wants to know."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Answers by `answer`, which sees the message; a node in `unknown` is not there when asked."""

    def __init__(self, answer: Callable[[Message], RecordDict]) -> None:
        self.answer, self.unknown, self.sent, self.ids = answer, set(), {}, count()
        self.pulled: list[int] = []
        """How many replies came at each look."""

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=10 + name) for name in range(6)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            known = message.metadata.dst_node_id not in self.unknown
            ids.append(f"m{next(self.ids)}" if known else "")
            if known:
                message.metadata.__dict__["_message_id"] = ids[-1]
                self.sent[ids[-1]] = message
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        asked = [self.sent.pop(i) for i in list(ids) if i in self.sent]
        self.pulled.append(len(asked))
        return [Message(self.answer(message), reply_to=message) for message in asked]


def model(size: int = 3) -> ArrayRecord:
    return wire.pack({"params": torch.zeros(size)})


def ask(grid: Grid, clients: int = 3, size: int = 3, deadline_s: float = 10.0, **more):
    """After how many looks each good reply was handed on, and the outcome."""
    exchange = more.pop("exchange", None) or Exchange(grid, deadline_s, lambda text: None)
    vars(exchange).update({k: more.pop(k) for k in ("held_bytes", "locate") if k in more})
    messages = {
        name: Message(
            RecordDict({wire.ARRAYS: model(size), wire.CONFIG: ConfigRecord({})}),
            10 + name, "train", group_id="1",
        )
        for name in range(clients)
    }  # fmt: skip
    expected = Expected({wire.ARRAYS: {"params": Spec((3,), "float32")}}, 1, 3, frozenset())
    outcome = Outcome()
    replies = exchange.replies(messages, "round 1", outcome, lambda name: expected, **more)
    return [len(grid.pulled) for _ in replies], outcome


@pytest.mark.parametrize(
    ("dtype", "shape", "there"),
    [("bfloat16", (3,), 2), ("garbage", (3,), 2), ("float32", (10**15, 10**9), 2),
     ("float32", (-3,), 2), ("float32", (1 << 40,), 0)],
)  # fmt: skip
def test_an_array_that_says_what_cannot_be_is_rejected(dtype: str, shape, there: int):
    """And its bytes are those that came."""

    def answer(message: Message) -> RecordDict:
        liar = message.metadata.dst_node_id == 11
        arrays = ArrayRecord({"params": Array(dtype, shape, "numpy.ndarray", b"x" * there)})
        return RecordDict({wire.ARRAYS: arrays if liar else model(), wire.METRICS: GOOD})

    handed_on, outcome = ask(Grid(answer))
    assert len(handed_on) == 2
    assert list(outcome.accepted) == [0, 2] and list(outcome.rejected) == [1]
    assert outcome.bytes_up == 2 * 12 + there


def test_replies_are_fetched_by_what_they_may_have_not_by_what_was_sent():
    """Messages may leave out all of the model; replies are whole ones."""

    def answer(message: Message) -> RecordDict:
        return RecordDict({wire.ARRAYS: model(), wire.METRICS: GOOD})

    for large, at_once in ((0, 6), (12, 2)):
        grid = Grid(answer)
        _, outcome = ask(grid, clients=6, size=0, held_bytes=24.0, large=large)
        assert len(outcome.accepted) == 6
        assert sum(grid.pulled[: at_once and 1]) <= at_once
        assert max(grid.pulled) == (6 if large == 0 else 1)


class Slow(Grid):
    """Time is up before the first replies are looked at."""

    def pull_messages(self, ids):
        if not self.pulled:
            time.sleep(0.3)
            self.pulled.append(0)
            return []
        return super().pull_messages(ids)


@pytest.mark.parametrize("held_bytes", [12.0, 1e9])
def test_what_came_to_a_superlink_while_the_server_was_busy_came_in_time(held_bytes: float):
    grid = Slow(lambda message: RecordDict({wire.ARRAYS: model(), wire.METRICS: GOOD}))
    _, outcome = ask(grid, deadline_s=0.2, held_bytes=held_bytes)
    assert list(outcome.accepted) == [0, 1, 2] and not outcome.failed


class Silent(Grid):
    """Client 1 never answers."""

    def __init__(self) -> None:
        super().__init__(lambda message: RecordDict({wire.ARRAYS: model(), wire.METRICS: GOOD}))
        self.asked: set[str] = set()

    def pull_messages(self, ids):
        ids = list(ids)
        self.asked |= set(ids)
        there = (i for i in ids if i in self.sent)
        return super().pull_messages([i for i in there if self.sent[i].metadata.dst_node_id != 11])


@pytest.mark.parametrize("held_bytes", [None, 1.0, 1e9])
def test_replies_that_never_come_are_not_asked_for_for_ever(held_bytes: float | None, monkeypatch):
    monkeypatch.setattr("fl_server.exchange.time", Clock())
    monkeypatch.setattr("fl_server.exchange.SPARE_S", 0.0)
    grid = Silent()
    exchange = Exchange(grid, 0.2, lambda text: None)
    exchange.held_bytes = held_bytes
    for _ in range(6):
        grid.asked.clear()
        _, outcome = ask(grid, exchange=exchange)
        assert list(outcome.failed) == [1]
    assert len(grid.asked) == 4  # three of this round, and one of the round before


@pytest.mark.parametrize("held_bytes", [None, 1.0, 1e9])
def test_a_reply_is_late_for_as_long_as_its_message_lives(held_bytes: float | None):
    """Not fetched, it would stay at the SuperLink until the run ends."""
    notes: list[str] = []
    grid = Silent()
    exchange = Exchange(grid, 0.2, notes.append)
    exchange.held_bytes = held_bytes
    for _ in range(3):
        ask(grid, exchange=exchange)
    grid.pull_messages = partial(Grid.pull_messages, grid)  # client 1 answers all that it was asked
    exchange.deadline_s = 10.0
    _, outcome = ask(grid, exchange=exchange)
    assert list(outcome.accepted) == [0, 1, 2]
    assert notes == ["round 1: dropped a late reply: round 1, client 1"] * 3


@pytest.mark.parametrize("deadline_s", [1.0, 3600.0, 86400.0])
def test_a_message_lives_longer_than_its_deadline(deadline_s: float):
    """But not for many of them, which a node that was silent would have to work through."""
    lives = []

    def answer(message: Message) -> RecordDict:
        lives.append(message.metadata.ttl)
        return RecordDict({wire.ARRAYS: model(), wire.METRICS: GOOD})

    ask(Grid(answer), deadline_s=deadline_s)
    assert len(lives) == 3
    assert all(1.5 * deadline_s < life <= max(2 * deadline_s, 700) for life in lives)


def test_nobody_waits_for_one_that_was_rejected():
    """Replies come one by one; that of client 0 is no good."""

    class OneByOne(Grid):
        def pull_messages(self, ids):
            return super().pull_messages(list(ids)[:1])

    def answer(message: Message) -> RecordDict:
        size = 4 if message.metadata.dst_node_id == 10 else 3
        return RecordDict({wire.ARRAYS: model(size), wire.METRICS: GOOD})

    handed_on, outcome = ask(OneByOne(answer))
    assert list(outcome.rejected) == [0]
    assert handed_on == [2, 3]


def test_who_asks_for_more_when_time_is_up_has_failed():
    """Its request is read at the last look, after the deadline."""
    lost = MetricRecord({"server-round": 1, wire.GROUPS_LOST: 1})
    grid = Slow(lambda message: RecordDict({wire.METRICS: lost}))

    def give_back(name: int, request: MetricRecord) -> RecordDict:
        return RecordDict({wire.ARRAYS: model()})

    handed_on, outcome = ask(grid, deadline_s=0.2, held_bytes=12.0, give_back=give_back)
    assert not handed_on
    assert sorted(outcome.failed) == [0, 1, 2]
    assert all("no reply within 0.2 s" in reason for reason in outcome.failed.values())
    assert not outcome.restored


@pytest.mark.parametrize("held", [None, 12.0])
@pytest.mark.parametrize("returns", [False, True])
def test_a_node_that_left_before_it_was_asked(returns: bool, held: float | None):
    """Flower gives messages to such nodes no id: each is a failure, or awaited if it may return,
    where replies are fetched one by one too."""
    grid = Grid(lambda message: RecordDict({wire.ARRAYS: model(), wire.METRICS: GOOD}))
    grid.unknown = {10, 11}
    places = iter([AWAITED, AWAITED, 20, 21])
    locate = (lambda names: {name: next(places) for name in names}) if returns else None
    _, outcome = ask(grid, locate=locate, held_bytes=held)
    if returns:
        assert list(outcome.accepted) == [0, 1, 2] and not outcome.failed
    else:
        assert list(outcome.accepted) == [2]
        assert outcome.failed == {0: "its node is gone", 1: "its node is gone"}


class Link(Grid):
    """As a SuperLink has it: a message goes once to who has the node's id, which a restarted node
    has again, and that a node is away is told to who asks for a reply while it is."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(lambda message: RecordDict({wire.ARRAYS: model(), wire.METRICS: GOOD}))
        self.clock, self.there = clock, {10: "a", 11: "b", 12: "c"}
        """Since when each node is there."""
        self.has: dict[str, str] = {}
        """The process that has each message."""
        self.asked: list[tuple[int, float]] = []
        """Each node that was sent a message, and when."""
        self.ready = {10: 5.0}
        """When each node has trained; 0: at once."""

    def get_nodes(self):
        return [NodeInfo(node_id=n, last_activated_at=when) for n, when in self.there.items()]

    def push_messages(self, messages):
        ids = super().push_messages(messages)
        for i, message in zip(ids, messages, strict=True):
            node = message.metadata.dst_node_id
            self.asked.append((node, self.clock.now))
            if node in self.there:
                self.has[i] = self.there[node]
        return ids

    def pull_messages(self, ids):
        replies, ready = [], []
        for i in [i for i in ids if i in self.sent]:
            node = self.sent[i].metadata.dst_node_id
            if node not in self.there:
                error = Error(ErrorCode.NODE_UNAVAILABLE, "gone")
                replies.append(Message(error, reply_to=self.sent.pop(i)))
            elif self.answered(i) or self.has.setdefault(i, self.there[node]) == self.there[node]:
                ready += [i] * (self.clock.now >= self.ready.get(node, 0.0))
        return replies + super().pull_messages(ready)

    def answered(self, message_id: str) -> bool:
        """Whether its reply waits here, whatever becomes of the node."""
        return False


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    monkeypatch.setattr("fl_server.exchange.time", clock := Clock())
    return Link(clock)


def places(link: Link, names: Iterable[int]) -> dict[int, int]:
    """Where clients are; 21 is client 1 too."""
    of = {node % 10: node for node in link.there}
    return {name: of.get(name, AWAITED) for name in names}


@pytest.mark.parametrize("held_bytes", [12.0, 24.0, 1e9])
@pytest.mark.parametrize("back", [11, 21, None])
def test_a_node_that_was_away_unseen_is_asked_again(link: Link, held_bytes: float, back):
    """While the server evaluates, and client 0 trains: at once, not when it is its turn."""
    notes: list[str] = []
    link.ready[10] = 50.0

    def meanwhile() -> None:
        del link.there[11]
        if back:
            link.there[back] = "d"
        link.clock.sleep(2.0)

    exchange = Exchange(link, 100.0, notes.append)
    exchange.locate = partial(places, link) if back else lambda names: dict.fromkeys(names)
    _, outcome = ask(link, exchange=exchange, held_bytes=held_bytes, meanwhile=meanwhile)
    if back:
        assert list(outcome.accepted) == [0, 1, 2] and not outcome.failed
        assert notes == ["round 1, client 1: its node is back and is asked again"]
        (again,) = link.asked[3:]
        assert again[0] == back and again[1] < 5.0
    else:
        assert list(outcome.accepted) == [0, 2]
        assert outcome.failed == {1: "its node is gone (clients.return-s)"}
        assert len(link.asked) == 3


@pytest.mark.parametrize("held_bytes", [12.0, 24.0])
def test_a_node_that_restarts_out_of_turn_is_asked_again(link: Link, held_bytes: float):
    """While the server asks for the reply of client 0, and the last of three may be lost too."""
    link.ready[10] = 50.0
    pull = link.pull_messages

    def pull_messages(ids):
        if link.clock.now > 20.0:
            link.there |= {11: "d", 12: "e"}
        return pull(ids)

    link.pull_messages, link.ready[11], link.ready[12] = pull_messages, 30.0, 30.0
    _, outcome = ask(link, held_bytes=held_bytes, deadline_s=60.0, locate=partial(places, link))
    assert list(outcome.accepted) == [0, 1, 2] and not outcome.failed
    assert sorted(node for node, _ in link.asked[3:]) == [11, 12]
    assert all(20.0 < when < 22.0 for _, when in link.asked[3:])


def test_a_restarted_node_that_cannot_come_back_has_failed(link: Link):
    _, outcome = ask(link, held_bytes=12.0, meanwhile=lambda: restart(link))
    assert list(outcome.accepted) == [0, 2]
    assert outcome.failed == {1: "its node is gone"}


def restart(link: Link) -> None:
    link.there[11] = "d"
    link.clock.sleep(2.0)


def test_what_a_node_answered_before_it_restarted_is_taken(link: Link, monkeypatch):
    monkeypatch.setattr(Link, "answered", lambda self, i: True)
    _, outcome = ask(
        link, held_bytes=12.0, meanwhile=lambda: restart(link), locate=partial(places, link)
    )
    assert list(outcome.accepted) == [0, 1, 2] and not outcome.failed
    assert len(link.asked) == 3


@pytest.mark.parametrize("held_bytes", [12.0, 24.0, 1e9])
@pytest.mark.parametrize("first", [5.0, 50.0])
@pytest.mark.parametrize("up", [False, True])
def test_a_reply_that_waits_is_taken_once_its_node_is_there_again(
    link: Link, monkeypatch, held_bytes: float, first: float, up: bool
):
    """Whether its turn, when client 0 has answered, comes before or after that.  Only in its turn,
    if it is asked for by turns, is it given up once its time to come back is `up`."""
    monkeypatch.setattr(Link, "answered", lambda self, i: True)
    link.ready[10] = first

    def meanwhile() -> None:
        del link.there[11]
        link.clock.sleep(2.0)

    def get_nodes():
        if link.clock.now > 20.0:
            link.there[11] = "d"
        return Link.get_nodes(link)

    def locate(names):
        get_nodes()
        absent = None if up and link.clock.now > 10.0 else AWAITED
        return {name: absent if at == AWAITED else at for name, at in places(link, names).items()}

    link.get_nodes = get_nodes
    _, outcome = ask(link, held_bytes=held_bytes, meanwhile=meanwhile, locate=locate,
                     deadline_s=100.0)  # fmt: skip
    by_turns = held_bytes == 12.0 and first == 50.0
    lost = up and not by_turns
    assert list(outcome.accepted) == ([0, 2] if lost else [0, 1, 2])
    assert outcome.failed == ({1: "its node is gone (clients.return-s)"} if lost else {})
    assert len(link.asked) == 3


@pytest.mark.parametrize("held_bytes", [12.0, 24.0, 1e9])
def test_a_node_that_was_only_cut_off_is_not_asked_again(link: Link, monkeypatch, held_bytes):
    """It answers the roll call once it has trained, and its reply is there then."""
    monkeypatch.setattr(Link, "answered", lambda self, i: True)
    link.ready |= {10: 20.0, 11: 40.0}

    def locate(names):
        return places(link, names) if link.clock.now >= 40.0 else dict.fromkeys(names, AWAITED)

    _, outcome = ask(link, held_bytes=held_bytes, meanwhile=lambda: restart(link), locate=locate,
                     deadline_s=100.0)  # fmt: skip
    assert list(outcome.accepted) == [0, 1, 2] and not outcome.failed
    assert len(link.asked) == 3


def test_a_node_that_comes_after_it_was_asked_is_asked_once(link: Link):
    del link.there[11]
    _, outcome = ask(
        link, held_bytes=12.0, meanwhile=lambda: restart(link), locate=partial(places, link)
    )
    assert list(outcome.accepted) == [0, 1, 2] and not outcome.failed
    assert len(link.asked) == 3


@pytest.mark.parametrize("held_bytes", [12.0, 1e9])
def test_nodes_are_looked_at_no_more_than_once_a_second(link: Link, held_bytes: float):
    """And not at all while all are asked all the time."""
    looks, get_nodes = [], link.get_nodes
    link.get_nodes = lambda: looks.append(link.clock.now) or get_nodes()
    ask(link, held_bytes=held_bytes)
    assert len(looks) == (1 if held_bytes == 1e9 else 5)


@pytest.mark.parametrize(("at_least", "given_up"), [(1, [0, 1]), (2, [0]), (3, [])])
def test_who_is_gone_too_long_is_given_up_only_if_it_can_be_spared(at_least, given_up):
    """The nodes of two clients are there again at the second look, when their time is up."""
    grid = Grid(lambda message: RecordDict({wire.ARRAYS: model(), wire.METRICS: GOOD}))
    grid.unknown = {10, 11}
    looks = iter([None, 20])
    _, outcome = ask(
        grid, locate=lambda names: dict.fromkeys(names, next(looks)), at_least=at_least
    )
    assert outcome.failed == dict.fromkeys(given_up, "its node is gone (clients.return-s)")
    assert list(outcome.accepted) == [name for name in range(3) if name not in given_up]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Traceback (most recent call last):\n  File x\nValueError: no luck",
            "ValueError: no luck",
        ),
        (
            "Exception ClientAppException occurred. Message: "
            "<class 'fl_common.data.errors.DataError'>:<'/nope does not exist'>",
            "/nope does not exist",
        ),
        ("Exception ClientAppException occurred. Message: KeyError: 'odd'", "KeyError: 'odd'"),
        ("<class 'fl_common.failures.Failed'>:<'KeyError: 'odd''>", "KeyError: 'odd'"),
        ("<class 'ValueError'>:<'no luck'>", "no luck"),
        ("ValueError: \x1b[2J\x07" + "x" * 10**6, rf"ValueError: \x1b[2J\x07{'x' * 483} ..."),
        ("", "error code 2"),
    ],
)
def test_the_reason_in_an_error_reply(text: str, reason: str):
    asked = Message(RecordDict(), 1, "train", group_id="1")
    assert reason_of(Message(Error(2, text), reply_to=asked)) == reason


def test_an_app_that_a_node_cannot_load():
    """As Flower tells it, which does not say why."""
    asked = Message(RecordDict(), 1, "query")
    asked.metadata.__dict__["_message_id"] = "1"
    text = "An exception was raised when attempting to load `ClientApp`"
    reason = reason_of(Message(Error(1, text), reply_to=asked))
    assert "is incomplete, delete $FLWR_HOME/apps (~/.flwr/apps) on that machine" in reason
