"""Who holds which version: what a client keeps, what the server leaves out, what a loss costs."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch import nn

import fl_client.app
from fl_common import files, wire
from fl_common.groups import Groups
from fl_common.layout import COUNTERS, PARAMS, STATS
from fl_common.sync import CACHE, VERSIONS, Cache, Holdings, Incomplete, version_of
from fl_server.cli import main
from tests.memories import history, summary

EXPERIMENT = "abc"
Arrays = dict[str, torch.Tensor]


# Versions


def test_a_version_is_the_contents_name():
    x = torch.arange(6.0)
    assert version_of(x) == version_of(x.clone()) == version_of(torch.arange(12.0)[:6])
    assert version_of(x.reshape(2, 3).T.contiguous()) == version_of(x.reshape(2, 3).T)
    others = [
        x.double(), x.int(), x.reshape(2, 3), x[:5], x.flip(0), torch.zeros(()), torch.zeros(1),
        torch.zeros(0), torch.zeros(1).neg(), torch.tensor([torch.nan]),
    ]  # fmt: skip
    names = [version_of(tensor) for tensor in [x, *others]]
    assert len(set(names)) == len(names)
    assert all(0 <= name < 2**63 for name in names)  # Flower's numbers are int64
    # One bit of the last of many elements.
    long = torch.ones(100_000)
    changed = long.clone()
    changed[-1] = torch.nextafter(changed[-1], torch.tensor(2.0))
    assert version_of(long) != version_of(changed)


# A client's side


def arrays(seed: float = 0.0) -> Arrays:
    return {
        "a": torch.full((3,), seed), "b": torch.arange(4.0).double() + seed,
        STATS: torch.full((2,), seed + 0.5), COUNTERS: torch.tensor([int(seed), 7]),
    }  # fmt: skip


def message(means: Arrays, sends: set[str] | None = None, **more: torch.Tensor) -> RecordDict:
    """A message that means these arrays and has those named, and others besides."""
    sent = {name: t.clone() for name, t in means.items() if sends is None or name in sends}
    return RecordDict(
        {
            wire.ARRAYS: wire.pack(sent),
            VERSIONS: MetricRecord({name: version_of(t) for name, t in means.items()}),
            wire.CONFIG: ConfigRecord({wire.EXPERIMENT: EXPERIMENT}),
            **({"more": wire.pack(more)} if more else {}),
        }
    )


class Client:
    """Where one client's arrays are kept: "state" or "disk"."""

    def __init__(self, where: str, base: Path, partition: int = 3) -> None:
        self.base, self.partition = (str(base) if where == "disk" else ""), partition
        self.state = RecordDict()
        self.folder = base / EXPERIMENT / f"{partition:06d}" / CACHE

    def gets(self, content: RecordDict) -> Arrays:
        cache = Cache.of(self.base, self.partition, content, self.state)
        found = cache.complete(content)
        cache.keep(content, found)
        return found

    def lacks(self, content: RecordDict) -> int:
        with pytest.raises(Incomplete) as lacking:
            self.gets(content)
        return lacking.value.arrays


@pytest.fixture(params=["state", "disk"])
def client(request, tmp_path) -> Client:
    return Client(request.param, tmp_path)


def same(ours: Arrays, theirs: Arrays) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours
    )


def test_what_was_sent_need_not_be_sent_again(client):
    first = arrays()
    assert same(client.gets(message(first)), first)
    assert same(client.gets(message(first, set())), first)
    second = first | {"b": arrays(1)["b"], STATS: arrays(1)[STATS]}
    assert same(client.gets(message(second, {"b", STATS})), second)
    assert same(client.gets(message(second, set())), second)


def test_what_is_not_here_is_counted_and_nothing_changes(client):
    first, second = arrays(), arrays(1)
    assert client.lacks(message(first, set())) == 4
    assert client.lacks(message(first, {"a"})) == 3
    client.gets(message(first))
    assert client.lacks(message(second, {"a"})) == 3
    assert same(client.gets(message(first, set())), first)
    assert same(client.gets(message(second)), second)


def test_only_the_last_message_is_kept(client):
    """A model's worth, not one for every round."""
    first, second = arrays(), arrays(1) | {"a": arrays()["a"]}
    client.gets(message(first))
    client.gets(message(second))
    assert client.lacks(message(first, set())) == 3
    if client.base:
        assert len(list(client.folder.iterdir())) == 4
    else:
        assert [len(record) for record in client.state.values()] == [4]


def test_redelivery_changes_nothing(client):
    """Even if it is late: what the newer message shares with the older is still there."""
    first = arrays()
    client.gets(message(first))
    second = first | {"b": arrays(1)["b"]}
    slim = message(second, {"b"})
    for _ in range(3):
        assert same(client.gets(slim), second)
    late = message(first, {"b"})
    assert same(client.gets(late), first)
    assert same(client.gets(slim), second)


def test_an_array_that_changes_back_is_known_by_its_contents(client):
    """After a server's rollback: equal versions are equal bytes."""
    first, second = arrays(), arrays(1)
    client.gets(message(second))
    again = {name: tensor.clone() for name, tensor in second.items()}
    assert same(client.gets(message(again, set())), second)
    client.gets(message(first))
    assert client.lacks(message(second, set())) == 4


def test_equal_arrays_of_two_names(client):
    twins = {"a": torch.zeros(3), "b": torch.zeros(3)}
    client.gets(message(twins))
    assert same(client.gets(message(twins, set())), twins)


def test_what_has_no_version_is_given_on_and_not_kept(client):
    first = arrays()
    c = torch.ones(5)
    assert same(client.gets(message(first, None, c=c)), first | {"c": c})
    assert same(client.gets(message(first, set(), c=2 * c)), first | {"c": 2 * c})
    assert same(client.gets(message(first, set())), first)


def test_a_memory_given_back_is_no_part_of_the_model(client):
    content = message(arrays())
    content[wire.MEMORY] = wire.pack({"strategy.h": torch.ones(3)})
    assert same(client.gets(content), arrays())


def test_without_versions_nothing_is_kept(client):
    content = message(arrays())
    del content[VERSIONS]
    assert same(client.gets(content), arrays())
    assert not client.state and not client.folder.exists()


def test_clients_of_one_node_have_their_own(tmp_path):
    first, second = Client("disk", tmp_path, 0), Client("disk", tmp_path, 1)
    first.gets(message(arrays()))
    second.gets(message(arrays(1)))
    assert same(first.gets(message(arrays(), set())), arrays())
    assert same(second.gets(message(arrays(1), set())), arrays(1))


# On the disk


@pytest.fixture
def on_disk(tmp_path) -> Client:
    return Client("disk", tmp_path)


def file_of(client: Client, tensor: torch.Tensor) -> Path:
    (path,) = client.folder.glob(f"{version_of(tensor):016x}-*.safetensors")
    return path


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "renamed"])
def test_a_damaged_file_is_as_one_that_is_not_there(on_disk, damage):
    first = arrays()
    on_disk.gets(message(first))
    path = file_of(on_disk, first["b"])
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1  # of the last element
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-8])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "gone":
        path.unlink()
    else:
        path.rename(path.with_name(f"{path.name[:16]}-{'0' * 32}.safetensors"))
    assert on_disk.lacks(message(first, {"a"})) == 1
    assert same(on_disk.gets(message(first)), first)  # what the server sends then
    assert same(on_disk.gets(message(first, set())), first)


def test_only_what_is_new_is_written(on_disk):
    first = arrays()
    on_disk.gets(message(first))
    for name in first:
        os.utime(file_of(on_disk, first[name]), (0, 0))
    second = first | {"b": arrays(1)["b"]}
    on_disk.gets(message(second, {"b"}))
    new = {name for name in second if file_of(on_disk, second[name]).stat().st_mtime}
    assert new == {"b"}


def test_a_write_that_a_crash_cut_short_leaves_nothing_wrong(on_disk, monkeypatch):
    """After any number of the new files: what is there is whole, the rest is asked for."""
    first, second = arrays(), arrays(1)
    write = files.write_atomically
    for done in range(5):
        on_disk.gets(message(first))
        count = 0

        def crashing(path, data, done=done):
            nonlocal count
            count += 1
            if count > done:
                path.with_name(f".{path.name}.4711").write_bytes(data[:10])
                raise KeyboardInterrupt
            write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_atomically", crashing)
            if done < 4:
                with pytest.raises(KeyboardInterrupt):
                    on_disk.gets(message(second))
                assert list(on_disk.folder.glob(".*"))
                assert on_disk.lacks(message(second, set())) == 4 - done
            else:
                on_disk.gets(message(second))
        assert same(on_disk.gets(message(second)), second)
        assert not list(on_disk.folder.glob(".*"))
        assert len(list(on_disk.folder.iterdir())) == 4


# The server's side


SIZES = (3, 4, 5)
GROUPS = Groups({"a": (0, 2), "b": (1,)}, SIZES)


def model(a: float = 0.0, b: float = 0.0, stats: float = 0.0) -> Arrays:
    params = torch.tensor([*3 * [a], *4 * [b], *5 * [a]], dtype=torch.float32)
    return {PARAMS: params, STATS: torch.full((2,), float(stats))}


def asked(holdings: Holdings, name: int, **options) -> RecordDict:
    config = ConfigRecord({"server-round": 1})
    return holdings.content(name, RecordDict({wire.CONFIG: config}), **options)


def has(holdings: Holdings, name: int, **options) -> set[str]:
    content = asked(holdings, name, **options)
    assert set(content[VERSIONS]) == {"a", "b", STATS}
    sent = wire.unpack(content[wire.ARRAYS])
    assert all(content[VERSIONS][key] == version_of(tensor) for key, tensor in sent.items())
    return set(sent)


def test_a_client_is_sent_what_it_lacks():
    holdings = Holdings(GROUPS, tracked=True)
    holdings.offer(model())
    everything = {"a", "b", STATS}
    assert has(holdings, 0) == has(holdings, 1) == everything
    holdings.answered(0)
    assert has(holdings, 0) == set()
    assert has(holdings, 0, whole=True) == has(holdings, 1) == everything
    holdings.offer(model(a=1, stats=1))
    assert has(holdings, 0) == {"a", STATS}
    # The group's parameters in one flat array.
    sent = wire.unpack(asked(holdings, 0)[wire.ARRAYS])["a"]
    assert torch.equal(sent, torch.ones(8))
    holdings.offer(model(a=1, b=1, stats=2))  # 0 did not take part meanwhile
    assert has(holdings, 0) == everything
    assert has(holdings, 1) == everything


def test_payload_is_that_of_the_missing_groups():
    holdings = Holdings(GROUPS, tracked=True)
    holdings.offer(model())
    holdings.answered(0)
    holdings.offer(model(a=1, stats=1))
    assert wire.payload_bytes(asked(holdings, 0)[wire.ARRAYS]) == 4 * (8 + 2)
    assert wire.payload_bytes(asked(holdings, 1)[wire.ARRAYS]) == 4 * (12 + 2)


def test_no_answer_means_no_change_in_what_is_known():
    """What is sent again is too much, never too little."""
    holdings = Holdings(GROUPS, tracked=True)
    holdings.offer(model())
    holdings.answered(0)
    before = dict(holdings.held)
    holdings.offer(model(a=1))
    asked(holdings, 0)
    asked(holdings, 0, whole=True)
    assert holdings.held == before
    holdings.offer(model())  # the round failed
    assert has(holdings, 0) == set()
    holdings.offer(model(a=1))
    assert has(holdings, 0) == {"a"}


def test_nothing_is_known_that_was_not_current_once():
    holdings = Holdings(GROUPS, tracked=True)
    current: dict[str, set[int]] = {"a": set(), "b": set(), STATS: set()}
    draws = np.random.default_rng(0)
    for _ in range(50):
        holdings.offer(model(*draws.integers(0, 5, 3).astype(float)))
        for name, (version, tensor) in holdings.current.items():
            assert version == version_of(tensor)
            current[name].add(version)
        holdings.answered(int(draws.integers(0, 3)))
        for held in holdings.held.values():
            assert all(held[name] in current[name] for name in current)


def test_what_is_offered_is_the_servers_no_longer():
    """And an array that did not change stays the one that all clients of a process share."""
    holdings = Holdings(GROUPS, tracked=True)
    mine = model()
    holdings.offer(mine)
    first = {name: tensor for name, (_, tensor) in holdings.current.items()}
    holdings.offer(model(a=1))
    assert holdings.current["b"][1] is first["b"]
    assert holdings.current["a"][1] is not first["a"]
    for vector in mine.values():
        vector.fill_(9.0)
    assert same(first, {"a": torch.zeros(8), "b": torch.zeros(4), STATS: torch.zeros(2)})


def test_what_clients_have_goes_through_json():
    holdings = Holdings(GROUPS, tracked=True)
    holdings.offer(model(a=1))
    for name in (11, 2):
        holdings.answered(name)
    stored = json.loads(json.dumps(holdings.state()))
    other = Holdings(GROUPS, tracked=True)
    other.load_state(stored)
    assert other.held == holdings.held
    other.offer(model(a=1, b=1))
    assert has(other, 2) == has(other, 11) == {"b"}
    assert has(other, 3) == {"a", "b", STATS}


def test_untracked_messages_are_whole():
    holdings = Holdings(GROUPS, tracked=False)
    for _ in range(2):
        holdings.offer(model())
        content = asked(holdings, 0)
        assert set(content[wire.ARRAYS]) == {"a", "b", STATS}
        assert VERSIONS not in content
        assert not holdings.withholds(content)
        holdings.answered(0)
    assert holdings.held == {}


def test_which_messages_leave_something_out():
    holdings = Holdings(GROUPS, tracked=True)
    holdings.offer(model())
    assert not holdings.withholds(asked(holdings, 0))
    holdings.answered(0)
    holdings.offer(model(a=1))
    assert holdings.withholds(asked(holdings, 0))
    assert not holdings.withholds(asked(holdings, 0, whole=True))
    assert not holdings.withholds(asked(holdings, 1))


# Runs


CLIENTS = 3


def tiny(path: str, seed: int):
    """4 samples of 5 features for each client, of 2 classes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * CLIENTS + 6, 5)).astype(np.float32)
    y = np.arange(len(x)) % 2
    return (x[6:], y[6:]), (x[:6], y[:6]), ("a", "b")


def small(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.Linear(4, classes))


N = (5 * 6 + 6) + (6 + 6) + (6 * 4 + 4) + (4 * 2 + 2)
WHOLE = 4 * N + 4 * 12 + 8
"""Bytes of the small network with its statistics and its counter."""
HERE = "tests.fl_common.test_sync"
TINY = [
    f"data.source={HERE}:tiny",
    f"model.name={HERE}:small",
    "data.partition=iid",
    "train.device=cpu",
    f"clients.number={CLIENTS}",
]
SIX = "run.rounds=6"
FEDPART = [
    "strategy.name=fedpart",
    "fedpart.warm-up=1",
    "fedpart.rounds-per-group=1",
]
WAYS = {
    "fedpart": FEDPART,
    "local statistics": [*FEDPART, "fedpart.bn-stats=local"],
    "fedavg": ["eval.on=clients"],
    "scaffold": ["strategy.name=scaffold", "eval.on=both"],
}


@pytest.fixture(autouse=True)
def only_the_rounds(monkeypatch):
    """What is not looked at here: pictures, and waiting for the disk."""
    monkeypatch.setattr("fl_server.recorder.Recorder._draw", lambda self: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class Sent:
    """Every message of a run: (round, kind, partition), its arrays, and all contexts."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.messages: list[tuple[tuple[str, str, int], set[str]]] = []
        self.contents: list[RecordDict] = []
        self.contexts: dict[int, RecordDict] = {}
        answer = fl_client.app.app

        def app(message, context):
            partition = context.node_config["partition-id"]
            self.contexts[partition] = context.state
            kind = message.metadata.message_type
            if kind != "query":
                key = str(message.content[wire.CONFIG]["server-round"]), kind, partition
                self.messages.append((key, set(message.content[wire.ARRAYS])))
                self.contents.append(message.content)
            return answer(message, context)

        patch.setattr(fl_client.app, "app", app)

    def more_than_once(self) -> dict[tuple[str, str, int], int]:
        counts = Counter(key for key, _ in self.messages)
        return {key: count for key, count in counts.items() if count > 1}


def forgetting(patch: pytest.MonkeyPatch, *when: tuple[str, str, int]) -> None:
    """A client has lost all it had when its first message of (round, kind, partition) comes."""
    answer, left = fl_client.app.app, set(when)

    def app(message, context):
        partition = context.node_config["partition-id"]
        key = message.metadata.group_id, message.metadata.message_type, partition
        if key in left:
            left.discard(key)
            for name in [*context.state]:
                del context.state[name]
        return answer(message, context)

    patch.setattr(fl_client.app, "app", app)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_costs_one_message_and_changes_nothing(runner, monkeypatch, way):
    quiet = runner(*TINY, SIX, *WAYS[way])
    with monkeypatch.context() as patch:
        sent = Sent(patch)
        forgetting(patch, ("3", "train", 1), ("5", "train", 0), ("5", "train", 2))
        result = runner(*TINY, SIX, *WAYS[way])
    assert result.code == 0
    lost = [("3", "train", 1), ("5", "train", 0), ("5", "train", 2)]
    assert sent.more_than_once() == dict.fromkeys(lost, 2)
    everything = set().union(*(keys for _, keys in sent.messages))
    for key in lost:
        first, second = (keys for k, keys in sent.messages if k == key)
        assert first < second == everything - {"memory"}
    assert result.summary["model_sha256"] == quiet.summary["model_sha256"]
    # The history has what the algorithm sends; what was lost is told in the summary.
    assert result.history_less_times == quiet.history_less_times
    told = result.summary["memory_given_back"]
    assert [(str(row["round"]), row["client"]) for row in told] == [(r, i) for r, _, i in lost]
    memory = {"local statistics": 4 * 12, "scaffold": 4 * N}.get(way, 0)
    control = 4 * N if way == "scaffold" else 0
    assert {row["bytes"] for row in told} == {WHOLE + control + memory}
    assert "memory_given_back" not in quiet.summary


def test_so_it_is_in_an_evaluation(runner, monkeypatch):
    settings = [*TINY, SIX, *FEDPART, "eval.on=both", "eval.every=2"]
    quiet = runner(*settings)
    with monkeypatch.context() as patch:
        sent = Sent(patch)
        forgetting(patch, ("4", "evaluate", 2))
        result = runner(*settings)
    assert sent.more_than_once() == {("4", "evaluate", 2): 2}
    assert result.history_less_times == quiet.history_less_times
    assert result.summary["model_sha256"] == quiet.summary["model_sha256"]


def replying(patch, numbers, when):
    """Client 1 answers with these numbers alone in the rounds `when`, thrice at most in each."""
    answer, left = fl_client.app.app, Counter(dict.fromkeys(when, 3))

    def app(message, context):
        key = message.metadata.message_type, context.node_config["partition-id"]
        t = int(message.content[wire.CONFIG]["server-round"]) if key == ("train", 1) else 0
        if left[t]:
            left[t] -= 1
            metrics = MetricRecord(numbers(t))
            return Message(RecordDict({wire.METRICS: metrics}), reply_to=message)
        return answer(message, context)

    patch.setattr(fl_client.app, "app", app)


def asks(t):
    return {"server-round": t, wire.GROUPS_LOST: 1}


REQUESTS = {
    "of a whole message": (FEDPART, asks, [1]),
    "of a whole message to fedavg": ([], asks, [1, 4]),
    "with sync.mode=full": ([*FEDPART, "sync.mode=full"], asks, [1, 4]),
    "again and again": (FEDPART, asks, [4]),
    "of another round": (FEDPART, lambda t: asks(t - 1), [4]),
    "without a round": (FEDPART, lambda t: {wire.GROUPS_LOST: 1}, [4]),
    "of a memory besides": (FEDPART, lambda t: {**asks(t), wire.MEMORY_LOST: 3}, [4]),
    "with more": (FEDPART, lambda t: {**asks(t), "loss": 1.0}, [4]),
    "of flower's": (["strategy.name=flwr:FedAvg"], asks, [1, 4]),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_without_a_reason_is_rejected(runner, monkeypatch, request_):
    settings, numbers, when = REQUESTS[request_]
    replying(monkeypatch, numbers, when)
    sent = Sent(monkeypatch)
    result = runner(*TINY, SIX, *settings)
    assert result.code == 0
    rejected = [
        t for t, row in enumerate(result.history, start=1) if list(row["rejected"]) == ["1"]
    ]
    assert rejected == when
    once_more = {("4", "train", 1): 2} if request_ == "again and again" else {}
    assert sent.more_than_once() == once_more


def test_who_is_rejected_is_not_taken_to_hold_anything(runner, monkeypatch):
    """Its next message has all that its last good answer did not have."""
    replying(monkeypatch, lambda t: {"server-round": t, "loss": float("nan")}, [1, 2, 4])
    sent = Sent(monkeypatch)
    assert runner(*TINY, SIX, *FEDPART).code == 0
    by_key = dict(sent.messages)
    buffers = {STATS, COUNTERS}
    everything = {"0", "2", "3", *buffers}
    assert [by_key[str(t), "train", 1] for t in range(1, 7)] == [
        everything, everything, everything,  # no good answer yet
        {"2", *buffers},  # active in round 3
        {"2", "3", *buffers},  # and in round 4, which it held after round 3
        {*everything},  # all of them in round 5
    ]  # fmt: skip
    assert [by_key[str(t), "train", 0] for t in range(1, 7)] == [
        everything, everything, {"0", *buffers}, {"2", *buffers}, {"3", *buffers}, everything,
    ]  # fmt: skip


def test_a_round_without_a_good_reply_moves_no_version(runner, monkeypatch):
    answer = fl_client.app.app
    seen: dict[str, dict[str, int]] = {}

    def app(message, context):
        reply = answer(message, context)
        if message.metadata.message_type == "train":
            t = message.metadata.group_id
            seen[t] = dict(message.content[VERSIONS])
            if t in ("2", "3"):
                reply.content[wire.METRICS]["loss"] = float("nan")
        return reply

    monkeypatch.setattr(fl_client.app, "app", app)
    result = runner(*TINY, SIX, *FEDPART)
    assert result.code == 0
    assert seen["2"] == seen["3"] == seen["4"]
    assert {name for name in seen["5"] if seen["5"][name] != seen["4"][name]} == {
        "3", STATS, COUNTERS,
    }  # fmt: skip
    # They hold what they worked on in vain as well as the server knows.
    rows = result.history
    assert rows[2]["bytes_down"] == rows[1]["bytes_down"] == rows[3]["bytes_down"]


@pytest.mark.parametrize("way", WAYS)
def test_full_messages_give_the_same_model(runner, monkeypatch, way):
    sparing = runner(*TINY, SIX, *WAYS[way])
    sent = Sent(monkeypatch)
    full = runner(*TINY, SIX, *WAYS[way], "sync.mode=full")
    assert full.code == 0
    assert full.summary["model_sha256"] == sparing.summary["model_sha256"]
    assert len({frozenset(keys) for _, keys in sent.messages if "c" not in keys}) == 1
    assert not any(VERSIONS in content for content in sent.contents)
    assert not any(CACHE in state for state in sent.contexts.values())
    # FedPart's rounds 1 and 5 change everything; the others evaluate what they train from next.
    spared = {3, 4, 5} if "fedpart" in WAYS[way][0] else {2, 3, 4, 5, 6}
    for ours, theirs in zip(sparing.history_less_times, full.history_less_times, strict=True):
        less = theirs.pop("bytes_down") - ours.pop("bytes_down")
        assert (less > 0) == (ours["round"] in spared)
        assert ours == theirs


@pytest.mark.parametrize("every", [1, 2])
def test_clients_that_evaluate_have_the_next_rounds_model(runner, every):
    """FedAvg's model goes down once in such a round, not twice."""
    settings = [*TINY, SIX, "eval.on=clients", f"eval.every={every}"]
    down = [row["bytes_down"] // CLIENTS for row in runner(*settings).history]
    train = [1, 0, 0, 0, 0, 0] if every == 1 else [1, 1, 0, 1, 0, 1]
    evaluation = [1] * 6 if every == 1 else [0, 1] * 3
    assert down == [WHOLE * (t + e) for t, e in zip(train, evaluation, strict=True)]
    full = [row["bytes_down"] // CLIENTS for row in runner(*settings, "sync.mode=full").history]
    assert full == [WHOLE * (1 + e) for e in evaluation]


def test_a_model_that_changes_as_a_whole_is_not_kept(runner, monkeypatch):
    """Nothing of it could be left out: no versions, and no memory for them."""
    sent = Sent(monkeypatch)
    assert runner(*TINY, SIX).code == 0
    assert not any(VERSIONS in content for content in sent.contents)
    assert not any(state for state in sent.contexts.values())


@pytest.mark.parametrize("where", ["memory", "disk", "damaged"])
@pytest.mark.parametrize("way", ["fedpart", "local statistics", "fedavg"])
def test_a_run_that_is_resumed_has_the_same_history(runner, tmp_path, monkeypatch, way, where):
    """Bytes included; clients that lost what they had are sent it once more."""
    state = tmp_path / "state"
    settings = [*TINY, *WAYS[way], *([] if where == "memory" else [f"client.state-dir={state}"])]
    whole = runner(*settings, SIX)
    fl_client.app.release()
    cut = runner(*settings, "run.rounds=4")
    fl_client.app.release()
    if where == "damaged":
        (experiment,) = (
            folder for folder in state.iterdir() if folder.name == cut.summary["experiment"]
        )
        for path in (experiment / "000001" / CACHE).iterdir():
            path.write_bytes(path.read_bytes()[:-1])
    sent = Sent(monkeypatch)
    assert main(["resume", str(cut.folder), SIX]) == 0
    assert cut.summary["model_sha256"] == whole.summary["model_sha256"]
    assert history(cut.folder) == history(whole.folder)
    lost = {"memory": {0, 1, 2}, "disk": set(), "damaged": {1}}[where]
    assert {i for _, _, i in sent.more_than_once()} == lost
    told = summary(cut.folder).get("memory_given_back", [])
    assert {row["client"] for row in told} == lost
    assert len(told) == len(lost)
