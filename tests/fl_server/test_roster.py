"""The roll call's verdicts, the draw of cohorts, and nodes that come, go and come back."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import pytest
from clock import Clock
from flwr.proto.node_pb2 import NodeInfo

import fl_server.inprocess
import fl_server.roster
from fl_common import wire
from fl_common.config import Clients
from fl_server.exchange import AWAITED, Exchange, RunFailed
from fl_server.inprocess import InProcessGrid
from fl_server.roster import Member, Roster, _query, draw, judge

FIRST = Member(
    node_id=100,
    partition=0,
    samples=5,
    held_out=0,
    label_counts=(2, 3),
    classes=("cat", "dog"),
    shape=(3, 8, 8),
    data="d1",
    code="abc",
    versions=(("torch", "2"),),
)


def member(partition: int, node: int | None = None, **changes) -> Member:
    return replace(FIRST, partition=partition, node_id=node or 100 + partition, **changes)


def verdict(*answers: Member, present=None, number=3):
    members, refused = judge(answers, present or {}, number, "abc")
    return sorted(members), refused


def test_good_answers_become_members():
    assert verdict(member(2), member(0), member(1)) == ([0, 1, 2], {})


def test_two_with_one_partition_are_both_refused_in_any_order():
    answers = [member(0), member(1, 7), member(1, 8), member(2)]
    for order in itertools.permutations(answers):
        members, refused = verdict(*order)
        assert members == [0, 2]
        assert set(refused) == {7, 8}
        assert "another node has partition-id 1 too" in refused[7]


def test_a_member_keeps_its_place_before_a_newcomer():
    members, refused = judge([member(1, 8)], {1: member(1, 7)}, 3, "abc")
    assert members[1].node_id == 7
    assert set(refused) == {8}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"code": "xyz"}, "package code differs"),
        (
            {"classes": ("cat", "cow")},
            "client 1's classes (cat, cow) differ from client 0's (cat, dog)",
        ),
        ({"classes": ("dog", "cat")}, "name and order them alike"),
        ({"shape": (1, 8, 8)}, "client 1's samples have shape [1, 8, 8], client 0's [3, 8, 8]"),
        ({"samples": 0}, "no training samples"),
        # What a terminal would obey, and what would fill it, is shown as it is written.
        (
            {"classes": ("\x1b[2J", "b" * 10**6)},
            rf"classes (\x1b[2J, {'b' * 500} ...) differ from",
        ),
    ],
)
def test_who_differs_is_refused_with_the_reason(changes, reason):
    members, refused = verdict(member(0), member(1, **changes), member(2))
    assert members == [0, 2]
    assert reason in refused[101]


def test_partitions_beyond_the_number_are_refused():
    members, refused = verdict(member(0), member(3))
    assert members == [0]
    assert refused[103] == "it has partition-id 3, but clients.number = 3"


def test_draw_is_fixed_by_seed_and_round():
    clients = Clients(number=50, per_round=7)
    cohort = draw(clients, 1, 1)
    assert len(set(cohort)) == 7
    assert cohort == sorted(cohort) == draw(clients, 1, 1)
    assert draw(clients, 1, 2) != cohort != draw(clients, 2, 1)
    assert draw(Clients(number=4), 1, 1) == [0, 1, 2, 3]


def test_fixed_draw_takes_every_client_equally_often():
    clients, rounds = Clients(number=10, per_round=3), 3000
    counts = [0] * 10
    for server_round in range(rounds):
        for client in draw(clients, 0, server_round):
            counts[client] += 1
    # Binomial(3000, 0.3) has mean 900 and standard deviation 25.
    assert all(abs(count - 900) < 5 * 25 for count in counts)


def test_bernoulli_draw_varies_in_size_and_is_never_empty():
    clients = Clients(number=10, per_round=1, sampling="bernoulli")
    sizes = [len(draw(clients, 0, server_round)) for server_round in range(2000)]
    assert min(sizes) == 1
    assert max(sizes) > 3
    # Redrawn while empty: the mean of Binomial(10, 0.1) given that it is positive.
    assert sum(sizes) / len(sizes) == pytest.approx(1 / (1 - 0.9**10), rel=0.05)


class Changing(InProcessGrid):
    """A grid whose nodes are listed by the test."""

    listed: list[int]
    looks = starts = 0

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.since: dict[int, str] = {}
        """Since when nodes are there that were restarted; with keys, these have their ids again."""

    def get_nodes(self):
        return [
            NodeInfo(node_id=node, last_activated_at=self.since.get(node, ""))
            for node in self.get_node_ids()
        ]

    def restart(self, node: int) -> None:
        self.starts += 1
        self.since[node] = f"start {self.starts}"

    def get_node_ids(self):
        self.looks += 1
        return self.listed


@pytest.fixture
def grid(runner):
    import fl_client.app
    from fl_common.config import resolve

    config = resolve({"clients.number": 3, "train.device": "cpu"})
    grid = Changing(fl_client.app.app, 3, config.flat())
    grid.all = list(grid._contexts)
    grid.listed = list(grid.all)
    return grid


def test_members_come_go_and_come_back(grid, caplog):
    said: list[str] = []
    roster = Roster(Exchange(grid, 10.0, said.append), 3)
    roster.assemble(nodes_may_come=False)
    assert sorted(roster.members) == [0, 1, 2]

    grid.listed = grid.all[:2]
    roster.refresh()
    here, absent = roster.drawn([0, 1, 2])
    assert [m.partition for m in here] == [0, 1]
    assert absent == {2: "not connected"}

    # The third returns under another node id, as an unauthenticated node does.
    context = grid._contexts.pop(grid.all[2])
    grid._contexts[999] = context
    context.node_id = 999
    grid.listed = [*grid.all[:2], 999]
    roster.refresh()
    assert roster.members[2].node_id == 999

    # A node that died without a word is listed for a while beside its successor.
    twin = type(context)(
        run_id=1,
        node_id=1001,
        node_config={"partition-id": 2},
        state=context.state,
        run_config=context.run_config,
    )
    grid._contexts[1001] = twin
    grid.listed = [*grid.all[:2], 999, 1001]
    roster.refresh()
    assert roster.members[2].node_id == 999
    grid.listed = [*grid.all[:2], 1001]
    roster.refresh()
    assert roster.members[2].node_id == 1001
    grid._contexts[999].node_id = 999
    grid.listed = [*grid.all[:2], 999]
    roster.refresh()
    assert roster.members[2].node_id == 999

    # A stranger that claims partition 0 is refused and asked once only, and told why.
    stranger = type(context)(
        run_id=1, node_id=1000, node_config={"partition-id": 0}, state=context.state,
        run_config=context.run_config,
    )  # fmt: skip
    grid._contexts[1000] = stranger
    grid.listed = [*grid.listed, 1000]
    roster.refresh()
    roster.refresh()
    assert roster.members[0].node_id == grid.all[0]
    why = "another node has partition-id 0 too; give each its own"
    assert [line for line in said if "1000" in line] == [f"roll call: refused node 1000: {why}"]
    (message,) = (m for m in grid._queue.values() if m.metadata.dst_node_id == 1000)
    grid.send_and_receive([message])
    assert caplog.messages == [f"the server refuses this node: {why}"]


def test_what_a_server_tells_a_node_does_nothing_to_its_terminal(grid, caplog):
    told = _query(grid.all[0], wire.REFUSED, "\x1b[2J" + "b" * 10**6)
    (reply,) = grid.send_and_receive([told])
    assert not reply.has_error() and not reply.content
    (line,) = caplog.messages
    assert line == rf"the server refuses this node: \x1b[2J{'b' * 496} ..."


def test_who_answered_and_left_before_the_verdict_is_no_member(grid):
    roster = Roster(Exchange(grid, 10.0, lambda text: None), 3)
    roster.ask()
    grid.listed = grid.all[:2]
    roster.refresh()
    assert sorted(roster.members) == [0, 1]


def test_who_left_before_answering_is_not_waited_for(grid, monkeypatch):
    """A node dies at the roll call, and is started again under another id."""
    pull, seen = Changing.pull_messages, iter([[*grid.all[:2], 77]] * 2)

    def silent(self, ids):
        return pull(self, [i for i in ids if self._queue[i].metadata.dst_node_id != 77])

    monkeypatch.setattr(Changing, "pull_messages", silent)
    monkeypatch.setattr(grid, "get_node_ids", lambda: next(seen, grid.all))
    started = time.monotonic()
    Roster(Exchange(grid, 20.0, lambda text: None), 3).assemble(nodes_may_come=True)
    assert time.monotonic() - started < 10


def test_missing_nodes_are_waited_for_and_both_numbers_said(grid):
    grid.listed = grid.all[:2]
    roster = Roster(Exchange(grid, 1.0, lambda text: None), 3)
    with pytest.raises(
        RunFailed,
        match=r"clients.number = 3, but 2 can take part after 1 s \(clients.deadline",
    ):
        roster.assemble(nodes_may_come=True)


def test_a_node_that_does_not_answer_holds_up_no_round(grid, monkeypatch):
    roster = Roster(Exchange(grid, 1000.0, lambda text: None), 3)
    roster.assemble(nodes_may_come=False)
    grid.listed = [*grid.all, 77]  # nobody is there: no answer ever comes
    monkeypatch.setattr(Changing, "pull_messages", lambda self, ids: [])
    clock = Clock()
    monkeypatch.setattr(fl_server.roster, "time", clock)
    roster.refresh()
    roster.refresh()
    assert clock.now == 0.0
    assert sorted(roster.members) == [0, 1, 2]


def test_a_simulation_of_another_size_ends_at_once(grid):
    grid.listed = grid.all[:2]
    with pytest.raises(RunFailed, match=r"clients.number = 3 but the federation has 2 nodes.*num-"):
        Roster(Exchange(grid, 1000.0), 3).assemble(nodes_may_come=False)


@pytest.mark.parametrize("samples", [None, math.inf, math.nan])
def test_an_answer_that_cannot_be_read_is_a_refusal(grid, monkeypatch, samples):
    import fl_client.client

    describe = fl_client.client.Clients.describe

    def broken(self, partition):
        content = describe(self, partition)
        if partition == 1:
            del content["metrics"]["num-examples"]
            if samples is not None:
                content["metrics"]["num-examples"] = samples
        return content

    monkeypatch.setattr(fl_client.client.Clients, "describe", broken)
    with pytest.raises(RunFailed, match=r"clients.number = 3, but 2 can take part.*cannot be read"):
        Roster(Exchange(grid, 1.0), 3).assemble(nodes_may_come=False)


@pytest.mark.parametrize("counts", [[], [1, 428], [43] * 10, [-1, 430, *[0] * 8], [math.nan] * 10])
def test_label_counts_of_other_samples_are_a_refusal(grid, monkeypatch, counts):
    """Pictures of them would end the run when all its rounds are done."""
    import fl_client.client

    describe = fl_client.client.Clients.describe

    def broken(self, partition):
        content = describe(self, partition)
        if partition == 1:
            assert sum(content["metrics"]["label-counts"]) == 429
            content["metrics"]["label-counts"] = counts
        return content

    monkeypatch.setattr(fl_client.client.Clients, "describe", broken)
    with pytest.raises(RunFailed, match=r"but 2 can take part; .* label counts are not those of"):
        Roster(Exchange(grid, 1.0), 3).assemble(nodes_may_come=False)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("classes", list(range(1, 11)), r"client 1's classes \(1, 2, .* differ from client 0's"),
        ("classes", [b"x"] * 10, r"client 1's classes \(b'x', .* differ from client 0's"),
        ("shape", ["x" * 10**6], "its answer cannot be read: ValueError"),
        ("shape", [1] * 10**6, r"client 1's samples have shape \[1, 1, .* \.\.\., client 0's"),
    ],
)
def test_words_of_other_types_are_a_refusal(grid, monkeypatch, key, value, reason):
    """What a node says of itself is shown, so that nothing of it may end the run."""
    import fl_client.client

    describe = fl_client.client.Clients.describe

    def broken(self, partition):
        content = describe(self, partition)
        if partition == 1:
            content["config"][key] = value
        return content

    monkeypatch.setattr(fl_client.client.Clients, "describe", broken)
    with pytest.raises(
        RunFailed, match=f"clients.number = 3, but 2 can take part.*{reason}"
    ) as end:
        Roster(Exchange(grid, 1.0), 3).assemble(nodes_may_come=False)
    assert len(str(end.value)) < 2000


def test_an_error_that_passes_keeps_nobody_out(grid, monkeypatch):
    """Client 1 answers twice with an error, of which the log has one line; then it is taken."""
    import fl_client.client

    describe, errors, said = fl_client.client.Clients.describe, [], []

    def failing(self, partition):
        if partition == 1 and len(errors) < 2:
            errors.append(partition)
            raise OSError("its trainer died")
        return describe(self, partition)

    monkeypatch.setattr(fl_client.client.Clients, "describe", failing)
    monkeypatch.setattr(fl_server.roster, "AGAIN_S", 0.01)
    roster = Roster(Exchange(grid, 60.0, said.append), 3)
    roster.assemble(nodes_may_come=True)
    assert sorted(roster.members) == [0, 1, 2] and len(errors) == 2
    assert len([line for line in said if "its trainer died" in line]) == 1


def test_a_lost_client_is_named_and_the_rest_goes_on(runner, monkeypatch):
    class Losing(InProcessGrid):
        def get_node_ids(self):
            nodes = super().get_node_ids()
            self.asked = getattr(self, "asked", 0) + 1
            return nodes if self.asked < 4 else nodes[1:]

    monkeypatch.setattr(fl_server.inprocess, "InProcessGrid", Losing)
    result = runner("clients.number=3", "run.rounds=4", "clients.return-s=0.5")
    assert result.code == 0
    assert result.history[0]["failed"] == {}
    assert result.history[-1]["failed"] == {"0": "not connected"}
    assert result.history[-1]["replies"] == [1, 2]


def test_who_comes_back_with_other_data_is_refused_and_the_others_stay(grid, monkeypatch):
    said: list[str] = []
    roster = Roster(Exchange(grid, 10.0, said.append), 3)
    roster.assemble(nodes_may_come=False)
    grid.listed = grid.all[1:]
    roster.refresh()
    assert sorted(roster.members) == [1, 2]

    of = Member.of
    changed = {"classes": ("x", "y"), "data": "other"}
    monkeypatch.setattr(Member, "of", lambda reply: replace(of(reply), **changed))
    grid.listed = grid.all
    roster.refresh()
    assert sorted(roster.members) == [1, 2]
    assert any("client 0 came back with other data" in line for line in said)


def test_a_refused_node_that_is_corrected_between_two_looks_is_taken(grid, monkeypatch):
    of, second = Member.of, grid.all[1]
    wrong = {"samples": 1, "data": "other"}
    monkeypatch.setattr(
        Member, "of", lambda reply: replace(m := of(reply), **wrong if m.node_id == second else {})
    )
    roster = Roster(Exchange(grid, 10.0, lambda text: None), 3)
    roster.assemble(nodes_may_come=False)
    facts, right = roster.known[1], dict(wrong)
    wrong["data"] = "yet another"
    grid.restart(second)
    roster.refresh()
    assert sorted(roster.members) == [0, 2]
    assert "client 1 came back with other data" in roster.refused[second]
    roster.refresh()
    assert sorted(roster.members) == [0, 2]

    wrong |= right
    grid.restart(second)
    roster.refresh()
    assert roster.members[1] == facts and not roster.refused


def test_a_member_that_restarts_between_two_looks_is_asked_again(grid, monkeypatch):
    """It may be another client then; and it may come back, as one that was seen to be away."""
    first, second, third = grid.all
    said: list[str] = []
    roster = Roster(Exchange(grid, 10.0, said.append), 3, return_s=60.0)
    roster.assemble(nodes_may_come=False)
    grid._contexts[first].node_config["partition-id"] = 1
    grid._contexts[second].node_config["partition-id"] = 0
    grid.restart(first)
    grid.restart(second)
    assert roster.locate([0, 1, 2]) == {0: second, 1: first, 2: third}

    monkeypatch.setattr(Changing, "pull_messages", lambda self, ids: [])
    grid.restart(third)
    assert roster.locate([2]) == {2: AWAITED}
    roster.return_s = 0.0  # it is at work on what it was asked before
    assert roster.locate([2]) == {2: AWAITED} and roster.awaited([2]) == []
    grid.listed = grid.all[:2]
    assert roster.locate([2]) == {2: None}


def test_a_question_to_a_node_that_restarts_is_repeated(grid, monkeypatch):
    """The process that had it has ended."""
    roster = Roster(Exchange(grid, 10.0, lambda text: None), 3)
    pull, lost = Changing.pull_messages, set()

    def pull_messages(self, ids):
        return pull(self, [i for i in ids if i not in lost])

    monkeypatch.setattr(Changing, "pull_messages", pull_messages)
    push = grid.push_messages

    def push_messages(messages):
        ids = push(messages)
        if not lost:
            lost.add(ids[1])
        return ids

    monkeypatch.setattr(grid, "push_messages", push_messages)
    roster.refresh()
    roster.refresh()
    assert sorted(roster.members) == [0, 2]
    grid.restart(grid.all[1])
    roster.refresh()
    assert sorted(roster.members) == [0, 1, 2]


def test_a_node_that_is_corrected_before_the_run_begins_takes_part(grid, monkeypatch):
    """Its operator stops it while others have not come yet, and starts it with other data."""
    of, second = Member.of, grid.all[1]
    seen = iter([[], [second], [], [second], grid.all])
    answers = iter([{"samples": 1, "data": "other"}])
    monkeypatch.setattr(grid, "get_node_ids", lambda: next(seen, grid.all))
    monkeypatch.setattr(Member, "of", lambda reply: replace(of(reply), **next(answers, {})))
    roster = Roster(Exchange(grid, 10.0, lambda text: None), 3)
    roster.assemble(nodes_may_come=True)
    assert {p: m.node_id for p, m in roster.members.items()} == dict(enumerate(grid.all))
    assert "other" not in {member.data for member in roster.known.values()}


def test_a_client_whose_node_went_away_is_waited_for(grid, monkeypatch):
    said: list[str] = []
    roster = Roster(Exchange(grid, 10.0, said.append), 3, return_s=0.5)
    roster.assemble(nodes_may_come=False)
    grid.listed = grid.all[:2]
    clock = Clock()
    monkeypatch.setattr(fl_server.roster, "time", clock)
    roster.wait_for([0, 1, 2])
    assert 0.5 <= clock.now < 0.7
    assert "waiting for client 2 to come back, 0.5 s at most (clients.return-s)" in said
    waited = clock.now
    roster.wait_for([0, 1, 2])  # its time is up: the next rounds do not wait again
    assert clock.now == waited
    grid.listed = grid.all
    roster.wait_for([0, 1, 2])
    assert sorted(roster.members) == [0, 1, 2]
    grid.listed = grid.all[:2]  # its time begins anew
    roster.refresh()
    assert roster.awaited([0, 1, 2]) == [2]


def test_clients_that_went_away_are_located_by_one_look_at_the_nodes(grid):
    roster = Roster(Exchange(grid, 10.0, lambda text: None), 3, return_s=60.0)
    roster.assemble(nodes_may_come=False)
    grid.listed, before = grid.all[:1], grid.looks
    assert roster.locate([0, 1, 2]) == {0: grid.all[0], 1: AWAITED, 2: AWAITED}
    assert grid.looks == before + 1
    roster.return_s = 0.0
    assert roster.locate([1, 2]) == {1: None, 2: None}
