"""Whatever is lost, late, repeated or forgotten: every local round starts from the server's model.

Real runs over a grid that misbehaves, with a server that falls and goes on from its checkpoint.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from torch import nn

import fl_client.app
import fl_client.client
import fl_server.exchange
from fl_common import wire
from fl_common.config import resolve
from fl_common.layout import PARAMS, concatenate, tensors_of
from fl_common.sync import VERSIONS
from fl_server.app import app as server_app
from fl_server.inprocess import InProcessGrid
from fl_server.rounds import Rounds
from tests.clock import Clock
from tests.memories import summary

CLIENTS, ROUNDS = 4, 14
HERE = "tests.fl_server.test_sync_faults"
Arrays = dict[str, torch.Tensor]

# Shares of messages, replies, deliveries and looks for replies that meet with it.
LOST, LATE, TWICE = 0.10, 0.05, 0.05
REPLY_LOST, REPLY_LATE, REPLY_TWICE = 0.12, 0.08, 0.05
FORGETS, FALLS = 0.04, 0.01


def tiny(path: str, seed: int):
    """4 samples of 5 features for each client, of 2 classes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * CLIENTS + 4, 5)).astype(np.float32)
    y = np.arange(len(x)) % 2
    return (x[4:], y[4:]), (x[:4], y[:4]), ("a", "b")


def small(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three groups."""
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.Linear(4, classes))


BASE = {
    "data.source": f"{HERE}:tiny",
    "model.name": f"{HERE}:small",
    "data.partition": "iid",
    "train.device": "cpu",
    "clients.number": CLIENTS,
    "clients.per-round": 2,
    "clients.deadline-s": 0.5,
    "run.rounds": ROUNDS,
    "run.name": "run",
}
FEDPART = {
    "strategy.name": "fedpart",
    "fedpart.warm-up": 1,
    "fedpart.rounds-per-group": 1,
    "eval.every": ROUNDS,
}
WAYS = [
    FEDPART,
    FEDPART | {"fedpart.order": "random", "server.checkpoint-every": 2, "eval.on": "both"},
    {"eval.on": "clients", "eval.every": 2, "server.checkpoint-every": 2},
    FEDPART | {"fedpart.bn-stats": "local", "clients.sampling": "bernoulli"},
    {"strategy.name": "scaffold", "eval.on": "both", "eval.every": 2},
]


class Fallen(Exception):
    """The server's process."""


class World(InProcessGrid):
    """Loses, delays and repeats what passes, makes clients forget, and lets the server fall."""

    def __init__(self, values: dict, seed: int, state_dir: Path | None) -> None:
        super().__init__(fl_client.app.app, CLIENTS, values)
        self.draws = random.Random(seed)
        self.state_dir = state_dir
        self.seen: Counter[str] = Counter()
        self.truth: Arrays = {}
        """The model of the server that speaks now."""
        self.meant: dict[str, Arrays] = {}
        """The model that each message means, by message id."""
        self.working: Message | None = None
        """What a client works on now."""
        self.pushes = 0
        self.life = 0
        """How often the server has fallen."""
        self.to_whom: Counter[tuple] = Counter()
        self.delayed: list[tuple[int, Message]] = []
        self.held: list[tuple[int, Message]] = []

    def happens(self, what: str, share: float) -> bool:
        happened = self.draws.random() < share
        self.seen[what] += happened
        return happened

    def push_messages(self, messages) -> list[str]:
        pushed = list(messages)
        ids = super().push_messages(pushed)
        self.pushes += 1
        for message in pushed:
            kind, key = message.metadata.message_type, message.metadata.message_id
            if kind == "query":
                continue
            self.meant[key] = self.truth
            self.seen["whole"] += sum(map(len, self.truth.values()))
            arrays = {k: a for k, a in message.content[wire.ARRAYS].items() if k != "c"}
            self.seen["sent"] += sum(array.shape[0] for array in arrays.values())
            self.to_whom[
                self.life, kind, message.metadata.group_id, message.metadata.dst_node_id
            ] += 1
            if self.happens("lost", LOST):
                del self._queue[key]
            elif self.happens("late", LATE):
                del self._queue[key]
                self.delayed.append((self.pushes + self.draws.randint(1, 4), message))
        return ids

    def pull_messages(self, message_ids) -> list[Message]:
        ids = list(message_ids)
        self.draws.shuffle(ids)
        queued = [self._queue[key] for key in ids if key in self._queue]
        if any(message.metadata.message_type == "query" for message in queued):
            return super().pull_messages(ids)
        if self.happens("falls", FALLS):
            raise Fallen
        replies = []
        for due in [entry for entry in self.held if entry[0] <= self.pushes]:
            if due[1].metadata.reply_to_message_id in ids:
                self.held.remove(due)
                replies.append(due[1])
        for due in [entry for entry in self.delayed if entry[0] <= self.pushes]:
            self.delayed.remove(due)
            reply = self._answer(due[1])  # for nobody, or of an earlier round
            replies += [reply] * (due[1].metadata.message_id in ids)
        return replies + [each for reply in super().pull_messages(ids) for each in self.fate(reply)]

    def fate(self, reply: Message) -> list[Message]:
        if self.happens("reply lost", REPLY_LOST):
            return []
        if self.happens("reply late", REPLY_LATE):
            self.held.append((self.pushes + self.draws.randint(1, 3), reply))
            return []
        return [reply, reply] if self.happens("reply twice", REPLY_TWICE) else [reply]

    def _answer(self, message: Message) -> Message:
        if message.metadata.message_type == "query":
            return super()._answer(message)
        context = self._contexts[message.metadata.dst_node_id]
        if self.happens("forgets", FORGETS):
            self.forget(context)
        self.working = message
        reply = super()._answer(message)
        if self.happens("twice", TWICE):
            reply = super()._answer(message)
        self.working = None
        assert not reply.has_error(), reply.error.reason
        metrics = reply.content[wire.METRICS]
        self.seen["requests"] += wire.GROUPS_LOST in metrics
        self.seen["memories"] += wire.MEMORY_LOST in metrics
        return reply

    def forget(self, context: Context) -> None:
        """All of it, or one file."""
        for name in [*context.state]:
            del context.state[name]
        if self.state_dir and self.state_dir.exists():
            (experiment,) = self.state_dir.iterdir()
            own = experiment / f"{context.node_config['partition-id']:06d}"
            found = sorted(own.rglob("*.safetensors"))
            if found and self.draws.random() < 0.7:
                path = self.draws.choice(found)
                path.write_bytes(path.read_bytes()[:-1])
            elif own.exists():
                shutil.rmtree(own)


def play(seed: int, base: Path, patch: pytest.MonkeyPatch) -> tuple[Counter[str], Path]:
    """One run to its end, however often its server falls."""
    folder = base / str(seed)
    on_disk = seed % 2 == 1
    own = WAYS[seed % len(WAYS)] | {"run.seed": seed, "run.output-dir": str(folder)}
    state_dir = folder / "state" if on_disk else None
    values = resolve(BASE | own | ({"client.state-dir": str(state_dir)} if on_disk else {})).flat()
    fl_client.app.release()
    world = World(values, seed, state_dir)
    local_statistics = own.get("fedpart.bn-stats") == "local"

    def starts_from_the_servers_model(net: nn.Module, kind: str) -> None:
        message = world.working
        if message.metadata.message_type != kind:
            return
        meant = world.meant[message.metadata.message_id]
        for key, tensors in tensors_of(net).items():
            if local_statistics and kind == "train" and key != PARAMS:
                continue
            found = concatenate(tensors.values())
            assert found.dtype == meant[key].dtype
            if found.numpy().tobytes() != meant[key].numpy().tobytes():
                world.seen["wrong"] += 1
        world.seen[kind] += 1
        world.seen["slim"] += len(message.content.get(VERSIONS, ())) > len(
            [key for key in message.content[wire.ARRAYS] if key in message.content[VERSIONS]]
        )

    local_round, evaluate = fl_client.client.local_round, fl_client.client.evaluate

    def watched_round(net, *args, **kwargs):
        starts_from_the_servers_model(net, "train")
        return local_round(net, *args, **kwargs)

    def watched_evaluation(net, *args, **kwargs):
        starts_from_the_servers_model(net, "evaluate")
        return evaluate(net, *args, **kwargs)

    train, on_clients = Rounds.train, Rounds._on_clients

    def speaks(function):
        def call(self, *args):
            world.truth = {kind: vector.clone() for kind, vector in self.model.items()}
            return function(self, *args)

        return call

    patch.setattr(fl_client.client, "local_round", watched_round)
    patch.setattr(fl_client.client, "evaluate", watched_evaluation)
    patch.setattr(Rounds, "train", speaks(train))
    patch.setattr(Rounds, "_on_clients", speaks(on_clients))
    patch.setattr(fl_server.exchange, "time", Clock())
    for world.life in range(200):
        run_config = values | {"run.resume": world.life > 0}
        try:
            server_app(world, Context(1, 1, {}, RecordDict(), run_config))
        except Exception as error:  # it fell, or nobody answered in time
            silent = "good replies" in str(error) or "no client answered" in str(error)
            if not (silent or isinstance(error, Fallen)):
                raise
            continue
        break
    world.seen["restarts"] += world.life
    # A client that lacks something is asked again once, with everything.
    assert max(world.to_whom.values()) <= 2
    world.seen["asked again"] += sum(count - 1 for count in world.to_whom.values())
    fl_client.app.release()
    return world.seen, folder / "run"


@pytest.fixture(autouse=True)
def only_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not looked at here: pictures, and waiting for the disk."""
    monkeypatch.setattr("fl_server.recorder.Recorder._draw", lambda self: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize("seeds", [25, pytest.param(300, marks=pytest.mark.crash)])
def test_every_local_round_starts_from_exactly_the_servers_model(seeds, tmp_path):
    total: Counter[str] = Counter()
    for seed in range(seeds):
        with pytest.MonkeyPatch.context() as patch:
            seen, folder = play(seed, tmp_path, patch)
        assert not seen["wrong"], f"seed {seed}: {seen['wrong']} arrays were not the server's"
        assert summary(folder)["status"] == "completed"
        assert summary(folder)["rounds"] == ROUNDS
        total += seen
        shutil.rmtree(tmp_path / str(seed))
    # All that can happen has happened, and more than once.
    expected = {
        "lost", "late", "twice", "reply lost", "reply late", "reply twice", "forgets", "falls",
        "requests", "memories", "asked again", "slim",
    }  # fmt: skip
    assert all(total[what] > seeds // 5 for what in expected), total
    assert total["train"] > 20 * seeds
    assert total["sent"] < 0.9 * total["whole"]
