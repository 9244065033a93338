"""A client's memory: on disk or in Flower's context, the same; never another's, never a zero in
the place of one that is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fl_client.client import Clients
from fl_client.state import Memory, MemoryLost
from fl_common import wire
from fl_common.config import from_text, resolve
from fl_common.sync import Cache
from tests import toy

EXPERIMENT = "5f3c"


def message(server_round: int, base: int, **more) -> RecordDict:
    """As the server sends it to a client of SCAFFOLD on the toy: w = 1/2, c = 1/4."""
    told = {
        "server-round": server_round,
        wire.SAMPLES: 2,
        wire.EXPERIMENT: EXPERIMENT,
        wire.MEMORY_ROUND: base,
        wire.CHECKPOINTS: [0],
    } | {key.replace("_", "-"): value for key, value in more.items()}
    vectors = {"params": torch.tensor([0.5]), "c": torch.tensor([0.25])}
    down = wire.pack({name: vector.double() for name, vector in vectors.items()})
    return RecordDict({wire.ARRAYS: down, wire.CONFIG: ConfigRecord(told)})


def given_back(content: RecordDict, c: float) -> RecordDict:
    memory = wire.pack({"strategy.c": torch.tensor([c], dtype=torch.float64)})
    return RecordDict({**content, wire.MEMORY: memory})


def value(memory: dict[str, torch.Tensor]) -> float:
    return float(memory["strategy.c"])


def vector(c: float) -> dict[str, torch.Tensor]:
    return {"strategy.c": torch.tensor([c], dtype=torch.float64)}


@pytest.fixture(params=["disk", "context"])
def place(request: pytest.FixtureRequest, tmp_path: Path):
    """`place(content, partition)`: the memory as a message finds it."""
    states: dict[int, RecordDict] = {}
    state_dir = str(tmp_path) if request.param == "disk" else ""

    def memory(content: RecordDict, partition: int = 0) -> Memory:
        return Memory.of(state_dir, partition, content, states.setdefault(partition, RecordDict()))

    return memory


def test_the_version_that_the_server_names_is_taken(place):
    assert place(message(1, 0)).load() is None
    place(message(1, 0)).save(1, vector(1.0))
    place(message(2, 1)).save(2, vector(2.0))
    assert value(place(message(3, 2)).load()) == 2.0
    # Round 2 was not accepted: round 3 starts from round 1's.
    assert value(place(message(3, 1)).load()) == 1.0
    # The first of all rounds is played again: nothing is remembered, whatever is there.
    assert place(message(1, 0)).load() is None


def test_every_client_has_its_own(place):
    for partition in (0, 1, 10):
        place(message(1, 0), partition).save(1, vector(partition))
    for partition in (0, 1, 10):
        assert value(place(message(2, 1), partition).load()) == partition


def test_another_experiments_memory_is_lost_for_this_one(place):
    place(message(1, 0)).save(1, vector(1.0))
    with pytest.raises(MemoryLost):
        place(message(2, 1, experiment="another")).load()


@pytest.mark.parametrize("experiment", ["..", "../other", "/etc", "a/b", "", "a\0b"])
def test_a_servers_name_for_a_run_leads_to_no_other_folder(experiment: str, tmp_path: Path):
    content = message(2, 1, experiment=experiment)
    content["versions"] = MetricRecord({"params": 1})
    for kept in (Memory, Cache):
        with pytest.raises(ValueError, match="is not letters and digits"):
            kept.of(str(tmp_path), 0, content, RecordDict())


def test_a_lost_memory_is_told_and_what_is_given_back_is_taken(place):
    with pytest.raises(MemoryLost):
        place(message(5, 4)).load()
    back = given_back(message(5, 4), 4.0)
    assert value(place(back).load()) == 4.0
    place(back).save(5, vector(5.0))
    assert value(place(message(6, 5)).load()) == 5.0
    # What the client has itself goes before what is given back.
    assert value(place(given_back(message(6, 5), 9.0)).load()) == 5.0


def test_a_damaged_file_is_a_lost_memory(tmp_path: Path):
    memory = Memory.of(str(tmp_path), 3, message(1, 0), RecordDict())
    memory.save(1, vector(1.0))
    (path,) = tmp_path.glob(f"{EXPERIMENT}/000003/000001-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MemoryLost):
        Memory.of(str(tmp_path), 3, message(2, 1), RecordDict()).load()


# Through the whole client: SCAFFOLD on the toy, f_1 = x^2 / 2, one local step.


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch):
    """`clients(state_dir, "key=value", ...)` on the toy."""
    toy.install(monkeypatch)

    def make(state_dir: Path | str, *settings: str) -> Clients:
        chosen = [*toy.SETTINGS, "strategy.name=scaffold", *settings]
        pairs = dict(item.split("=", 1) for item in chosen)
        return Clients(resolve(from_text(pairs | {"client.state-dir": str(state_dir)})))

    return make


def theta(reply: RecordDict) -> float:
    return float(wire.unpack(reply[wire.ARRAYS])["params"])


def memory_of(clients: Clients, state: RecordDict, content: RecordDict) -> dict[str, torch.Tensor]:
    return Memory.of(clients.config.client.state_dir, 0, content, state).load()


def test_disk_and_context_give_the_same_bits(clients, tmp_path: Path):
    """Three rounds of one client, each trained on what the one before left."""
    found = []
    for state_dir in (tmp_path, ""):
        party, state = clients(state_dir, "train.epochs=7"), RecordDict()
        replies = [theta(party.train(0, message(r, r - 1), state)) for r in (1, 2, 3)]
        found.append((replies, value(memory_of(party, state, message(4, 3)))))
    assert found[0] == found[1]
    assert len(set(found[0][0])) == 3  # the memory takes part in what is computed


def test_one_step_by_hand(clients):
    """w = 0.5, c = 0.25, lr 0.1: theta = w - 0.1 (w + c - c_i), and with K = 1 option II's
    c_i+ = c_i - c + (w - theta) / 0.1 is the gradient at w, 0.5."""
    party, state = clients(""), RecordDict()
    assert theta(party.train(0, message(1, 0), state)) == pytest.approx(0.5 - 0.1 * 0.75)
    assert value(memory_of(party, state, message(2, 1))) == pytest.approx(0.5)
    assert theta(party.train(0, message(2, 1), state)) == pytest.approx(0.5 - 0.1 * (0.75 - 0.5))


def test_with_a_state_directory_nothing_is_left_in_the_context(clients, tmp_path: Path):
    """On Ray the context travels through the driver with every message."""
    party, state = clients(tmp_path), RecordDict()
    for server_round in (1, 2, 3):
        party.train(0, message(server_round, server_round - 1), state)
        assert len(state) == 0
    assert sorted(path.name[:6] for path in tmp_path.rglob("*.safetensors")) == ["000002", "000003"]
    without, state = clients(""), RecordDict()
    without.train(0, message(1, 0), state)
    assert len(state) == 1


def test_a_client_that_lost_its_memory_trains_nothing_and_asks_for_it(clients, tmp_path: Path):
    party = clients(tmp_path)
    asked = party.train(0, message(3, 2), RecordDict())
    assert set(asked) == {wire.METRICS}
    assert dict(asked[wire.METRICS]) == {"server-round": 3, wire.MEMORY_LOST: 2}
    assert not list(tmp_path.rglob("*.safetensors"))
    answer = party.train(0, given_back(message(3, 2), 0.5), RecordDict())
    assert theta(answer) == pytest.approx(0.5 - 0.1 * (0.75 - 0.5))
    assert set(answer) == {wire.ARRAYS, wire.METRICS}
    # It is its own again.
    again = party.train(0, message(4, 3), RecordDict())  # c_i is 0.5 still, as in one step by hand
    assert theta(again) == pytest.approx(theta(answer))


def test_a_strategy_without_memory_leaves_none(clients, tmp_path: Path):
    party, state = clients(tmp_path, "strategy.name=fedavg"), RecordDict()
    content = message(1, 0)
    del content[wire.ARRAYS]["c"]
    party.train(0, content, state)
    assert len(state) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("optimizer", [["train.momentum=0.9"], ["train.optimizer=adam"]])
def test_the_optimizer_is_kept_with_the_memory(clients, tmp_path: Path, optimizer: list[str]):
    """Two rounds of one step, kept: the second step has the first one's momentum."""

    def second(state_dir: Path | str, *settings: str) -> float:
        chosen = ["strategy.name=fedavg", *optimizer, *settings]
        state = RecordDict()
        for server_round in (1, 2):
            party = clients(state_dir, *chosen)  # another process: nothing is left in it
            content = message(server_round, server_round - 1)
            del content[wire.ARRAYS]["c"]
            reply = party.train(0, content, state)
        return theta(reply)

    kept = second(tmp_path, "train.keep-optimizer=true")
    assert kept == second("", "train.keep-optimizer=true")
    fresh = second("")
    assert kept != fresh
    if optimizer == ["train.momentum=0.9"]:  # gradient 0.5 in both rounds, buffer 0.9 * 0.5 + 0.5
        assert fresh == pytest.approx(0.5 - 0.1 * 0.5)
        assert kept == pytest.approx(0.5 - 0.1 * (0.9 * 0.5 + 0.5))
