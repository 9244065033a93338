"""What a client remembers is there for every checkpoint that the server may go back to."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_common.snapshots import InContext, OnDisk, Snapshots, needed

EXPERIMENT = "e1"


@pytest.fixture(params=["disk", "context"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Snapshots:
    return OnDisk(tmp_path) if request.param == "disk" else InContext(RecordDict(), EXPERIMENT)


def memory(value: float) -> dict[str, torch.Tensor]:
    return {"strategy.c": torch.full((3,), value), "optimizer.momentum.00000": torch.ones(2, 2)}


def value_of(found: dict[str, torch.Tensor] | None) -> float | None:
    return None if found is None else float(found["strategy.c"][0])


def versions(store: Snapshots) -> set[int]:
    if isinstance(store, OnDisk):
        return {int(path.name[:6]) for path in store.folder.glob("*.safetensors")}
    return {int(key.removeprefix(f"memory-{EXPERIMENT}-")) for key in store.state}


def test_needed_is_what_any_checkpoint_may_ask_for():
    # The client took part in rounds 2, 5, 6 and 9, each starting from the one before.
    made = [2, 5, 6]
    assert needed(made, 9, 6, [7, 8]) == {9, 6}
    assert needed(made, 9, 6, [6, 8]) == {9, 6}
    # A server that starts again from round 5 asks for the version of round 5, from 4 for that of 2.
    assert needed(made, 9, 6, [5, 8]) == {9, 6, 5}
    assert needed(made, 9, 6, [4, 5]) == {9, 6, 5, 2}
    assert needed(made, 9, 6, [0, 4]) == {9, 6, 2}


def test_needed_forgets_what_was_not_accepted():
    # Round 4's reply was lost: round 5 starts from round 2 again, and nobody will ask for 4.
    assert needed([2, 4], 5, 2, [3, 4]) == {2, 5}
    # A first round that is played again leaves nothing of the first attempt.
    assert needed([1, 3], 2, 0, [0, 1]) & {1, 3} == set()


def test_what_was_saved_is_loaded(store: Snapshots):
    assert store.load(1) is None
    saved = {
        "strategy.h": torch.tensor([1.5, -0.0, float("inf"), 1e-45]),
        "optimizer.step.00000": torch.tensor(7, dtype=torch.int64),
        "strategy.d": torch.linspace(0, 1, 5, dtype=torch.float64),
    }
    store.save(1, saved, 0, [0])
    found = store.load(1)
    assert set(found) == set(saved)
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_nothing_to_remember_is_not_a_loss(store: Snapshots):
    """Momentum 0: the optimizer has no state, and the client has taken part all the same."""
    store.save(1, {}, 0, [0])
    assert store.load(1) == {}


def test_a_round_that_is_played_again_replaces_its_version(store: Snapshots):
    store.save(1, memory(1), 0, [0])
    store.save(2, memory(2), 1, [0])
    store.save(2, memory(3), 0, [0])
    assert value_of(store.load(2)) == 3
    assert versions(store) == {2}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_version_is_lost_and_the_others_are_not(tmp_path: Path, damage: str):
    store = OnDisk(tmp_path)
    for made in (1, 2, 3):
        store.save(made, memory(made), made - 1, [1, 2])
    (path,) = tmp_path.glob("000002-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    contents = {"flip": data, "truncate": data[:-1], "empty": b""}
    path.unlink() if damage == "remove" else path.write_bytes(contents[damage])
    assert store.load(2) is None
    assert value_of(store.load(1)) == 1
    assert value_of(store.load(3)) == 3
    store.save(2, memory(5), 1, [1])
    assert value_of(store.load(2)) == 5


def test_a_write_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = OnDisk(tmp_path)
    store.save(1, memory(1), 0, [0])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.save(2, memory(2), 1, [1])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_experiments_memory_is_not_used_and_not_kept():
    state = RecordDict({"somebody-elses": ArrayRecord()})
    InContext(state, "e1").save(1, memory(1), 0, [0])
    other = InContext(state, "e2")
    assert other.load(1) is None
    other.save(1, memory(2), 0, [0])
    assert value_of(other.load(1)) == 2
    assert set(state) == {"somebody-elses", "memory-e2-000001"}


class Server:
    """What matters here of a server: the version that counts, and its two checkpoints."""

    def __init__(self) -> None:
        self.round, self.base, self.value = 0, 0, 0.0
        self.checkpoints = [(0, 0, 0.0)]

    def checkpoint(self) -> None:
        self.checkpoints = [*self.checkpoints, (self.round, self.base, self.value)][-2:]

    def crash(self, newest_is_damaged: bool) -> None:
        if newest_is_damaged and len(self.checkpoints) > 1:
            del self.checkpoints[1]
        self.round, self.base, self.value = self.checkpoints[-1]


EVENTS = st.lists(
    st.one_of(
        # A round: does the client take part, is its reply accepted, is a checkpoint written?
        st.tuples(st.just("round"), st.booleans(), st.booleans(), st.booleans()),
        st.tuples(st.just("crash"), st.booleans()),
    ),
    max_size=40,
)


@contextmanager
def a_store(kind: str):
    if kind == "context":
        yield InContext(RecordDict(), EXPERIMENT)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield OnDisk(Path(folder))


@pytest.mark.parametrize("kind", ["disk", "context"])
@settings(max_examples=60, deadline=None)
@given(events=EVENTS)
def test_whatever_happens_a_client_finds_what_its_round_starts_from(kind: str, events: list):
    """Lost replies, crashes of the server and damaged checkpoints, in any order.

    Every training leaves a value of its own, so that a version of an abandoned course of events
    would be told from the one that counts.  Of versions that no checkpoint needs none is kept.
    """
    server, trainings = Server(), 0
    with a_store(kind) as store:
        for event, *how in events:
            if event == "crash":
                server.crash(*how)
                continue
            takes_part, accepted, checkpoint = how
            server.round += 1
            if takes_part:
                if server.base:
                    assert value_of(store.load(server.base)) == server.value
                checkpoints = [made for made, _, _ in server.checkpoints]
                trainings += 1
                store.save(server.round, memory(trainings), server.base, checkpoints)
                assert len(versions(store)) <= 2 + len(checkpoints)
                assert all(made <= server.round for made in versions(store))
                if accepted:
                    server.base, server.value = server.round, trainings
            if checkpoint:
                server.checkpoint()


def test_what_a_crash_left_of_a_write_goes_with_the_next(tmp_path: Path):
    store = OnDisk(tmp_path)
    store.save(1, memory(1), 0, [0])
    (tmp_path / ".000002-00ff.safetensors.4242").write_bytes(b"half")
    store.save(2, memory(2), 1, [0])
    assert not list(tmp_path.glob(".*"))
