"""What strategies with memory share: both sides hold the same, it advances once per accepted reply,
it is cheap on the wire, and it outlives a run that is cut."""

from __future__ import annotations

import copy
import gc
import json

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.common import Error

import fl_client.app
import fl_server.exchange
import fl_server.inprocess
from fl_common import assembly, wire
from fl_common.config import methods, resolve
from fl_common.local import Work
from fl_server.cli import main
from fl_server.inprocess import InProcessGrid
from fl_server.rounds import Rounds
from tests import toy
from tests.clock import Clock
from tests.strategies.test_scaffold import by_hand

OURS = [name for name in methods("strategies") if ":" not in name]
WITH_MEMORY = ["scaffold", "feddyn", "feddc", "fedspeed"]
DOWN = {"scaffold": 2, "feddc": 2, "mofedsam": 2}
"""Vectors of d floats to each client; one for all others."""
DIGITS = ["train.device=cpu", "train.lr=0.05", "data.alpha=5"]
TABULAR = ["train.device=cpu", "data.source=breast-cancer", "model.name=mlp"]
K10 = "train.epochs=10"


def omega(trace) -> np.ndarray:
    """(N, 1) client i's samples over their mean."""
    samples = json.loads((trace.result.folder / "clients.json").read_text())["samples"]
    return np.array(samples)[:, None] / np.mean(samples)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_in_float32_too_both_sides_hold_the_same_bits_and_the_server_their_mean(traced, name):
    trace = traced(
        5, *DIGITS, "model.norm=group", "clients.per-round=2", "run.rounds=5",
        f"strategy.name={name}",
    )  # fmt: skip
    drift = trace.memory("h")  # asserts that the ledger holds the clients' bits
    control = trace.memory("c")
    assert drift.dtype == control.dtype == np.float32
    assert {i for cohort in trace.cohorts for i in cohort} != set(trace.cohorts[0])
    if name != "scaffold":
        assert drift[-1].any()
        np.testing.assert_allclose(trace.kept("H"), drift.mean(axis=1), rtol=0, atol=2e-7)
    if name in ("scaffold", "feddc"):
        assert control[-1].any()
        mean = (omega(trace) * control).mean(axis=1)
        np.testing.assert_allclose(trace.kept("c"), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_memory_of_who_does_not_take_part_stays(on_toy, name):
    trace = on_toy(12, K10, f"strategy.name={name}", "clients.per-round=1", n=(3, 1))
    own = np.stack([trace.memory(key) for key in "hc"], axis=-1)
    for t, cohort in enumerate(trace.cohorts):
        (absent,) = {0, 1} - set(cohort)
        assert np.array_equal(own[t + 1, absent], own[t, absent])
    assert len({tuple(cohort) for cohort in trace.cohorts}) == 2


@pytest.mark.parametrize("name", OURS)
def test_every_strategy_runs_with_batchnorm_and_sends_what_it_declares(traced, name):
    trace = traced(
        3, *DIGITS, "clients.per-round=2", "run.rounds=2", f"strategy.name={name}",
        "eval.models=cloud,sel,all",
    )  # fmt: skip
    d, q, counters = (trace.moments[0].model[kind] for kind in ("params", "stats", "counters"))
    assert (q.dtype, counters.dtype) == (np.float32, np.int64)
    for row in trace.result.history:
        assert row["bytes_down"] == 2 * (DOWN.get(name, 1) * d.nbytes + q.nbytes + counters.nbytes)
        assert row["bytes_up"] == 2 * (d.nbytes + q.nbytes + counters.nbytes)
        assert all(
            np.isfinite(row[f"{what}{of}"])
            for what in ("accuracy", "loss")
            for of in ("", "_sel", "_all")
        )
    for key, tensor in trace.result.model.items():
        assert torch.isfinite(tensor).all(), key
    assert all(np.isfinite(vector).all() for vector in trace.moments[-1].kept.values())
    assert not np.array_equal(trace.w[0], trace.w[2])


@pytest.mark.parametrize("name", OURS)
def test_without_buffers_exactly_whole_vectors_travel(traced, name):
    trace = traced(3, *TABULAR, "run.rounds=1", f"strategy.name={name}")
    (row,) = trace.result.history
    d = 4 * sum(tensor.numel() for tensor in trace.result.model.values())
    assert (row["bytes_down"], row["bytes_up"]) == (3 * DOWN.get(name, 1) * d, 3 * d)


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        (["strategy.name=scaffold"], 1),
        (["strategy.name=feddc"], 1),
        (["strategy.name=feddc", "feddc.gradient-correction=false"], 0),
        (["strategy.name=scaffold", "model.norm=group"], 0),
        (["strategy.name=feddc", "model.norm=group"], 0),
    ],
)
def test_batchnorm_beside_control_variates_is_warned_of_once(runner, capsys, settings, warnings):
    assert runner(*DIGITS, "clients.number=2", "run.rounds=2", *settings).code == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(said) == warnings
    assert all("model.norm=group" in line for line in said)


def test_a_setting_of_control_variates_that_are_off_is_told_to_have_no_effect(runner, capsys):
    settings = ["feddc.gradient-correction=false", "feddc.legacy-beta=true", "model.norm=group"]
    assert runner(*DIGITS, "clients.number=2", "strategy.name=feddc", *settings).code == 0
    line = "feddc.legacy-beta = true has no effect without feddc.gradient-correction"
    assert f"warning: {line}" in capsys.readouterr().out.splitlines()


def warned(sizes: tuple[int, ...], name: str, **settings) -> list[str]:
    """The warnings of a run with so many samples per client, batches of 32 and the lr 0.1."""
    given = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    config = resolve({"strategy.name": name, "clients.number": len(sizes), **given})
    works = [Work.of(config, 1, n, sum(sizes)) for n in sizes]
    return methods("strategies")[name](config).warnings(config, {}, works)


PULL = {"feddyn": "feddyn.alpha", "feddc": "feddc.alpha", "fedspeed": "fedspeed.lambda"}


@pytest.mark.parametrize("name", PULL)
def test_a_pull_under_which_the_smallest_client_diverges_is_warned_of(name):
    """eta alpha / omega_i >= 2: 1 / omega_i >= 200 with eta = alpha = 0.1."""
    key, settings = PULL[name], {PULL[name].replace(".", "__"): 0.1, "train__batch_size": 1}
    assert warned((1, 397), name, **settings) == []  # their mean is 199 times the smaller
    (line,) = warned((1, 401), name, **settings)
    assert f"{key} = 0.1: " in line
    assert " is 2.01 for " in line
    assert line.endswith(f"set {name}.weighting=uniform or a smaller {key} or train.clip-norm")
    (line,) = warned((1, 401), name, **settings | {key.replace(".", "__"): 30.0})
    assert line.endswith(f"set a smaller {key} or train.clip-norm")  # 0.1 * 30 >= 2
    assert warned((1, 401), name, **settings, **{f"{name}__weighting": "uniform"}) == []
    assert warned((1, 401), name, **settings, train__clip_norm=10.0) == []
    assert warned((1, 401), name, **settings, train__lr_decay=0.5)  # round 1 counts
    if name != "feddc":
        assert warned((1, 401), name, **settings, train__optimizer="adam") == []
        outside = {f"{name}__clip_scope": "official", "train__clip_norm": 10.0}
        (line,) = warned((1, 401), name, **settings, **outside)
        assert line.endswith(f"set {name}.weighting=uniform or a smaller {key}")


@pytest.mark.parametrize("name", ["scaffold", "feddc"])
def test_a_client_much_smaller_than_a_batch_is_warned_of_beside_control_variates(name):
    """One step an epoch of 1 / omega_i: with 7 of on average 700 samples 100 steps' worth, where
    the mean client takes 22; with 3 of 333 it is 111 of 11."""
    assert warned((7, 1393), name) == []
    (line,) = warned((3, 663), name)
    assert "the smallest client 10.1 times as far as the mean one" in line
    assert line.endswith(f"set {name}.weighting=uniform or train.clip-norm")
    assert warned((1, 39), name)  # everything in one batch, 20 steps' worth in one
    assert warned((3, 663), name, **{f"{name}__weighting": "uniform"}) == []
    assert warned((3, 663), name, train__clip_norm=10.0) == []
    assert warned((3, 663), "feddc", feddc__gradient_correction=False) == []


@pytest.mark.parametrize("name", WITH_MEMORY)
@pytest.mark.parametrize("sizes", [(144,) * 10, (30, 172, 179, 149), (10, 12, 600), (65, 31, 33)])
def test_usual_sizes_are_not_warned_of(name, sizes):
    """data.min-size is 10."""
    assert warned(sizes, name) == []


def test_a_run_knows_its_smallest_client(runner, monkeypatch, capsys):
    toy.install(monkeypatch, (1, 25))
    assert runner(*toy.SETTINGS, "run.rounds=1", "strategy.name=scaffold").code == 0
    (line,) = [li for li in capsys.readouterr().out.splitlines() if li.startswith("warning")]
    assert "the smallest client 13 times" in line


class Started(toy.Quadratic):
    def __init__(self) -> None:
        super().__init__()
        torch.nn.init.constant_(self.theta, 0.3)


@pytest.mark.parametrize("per_round", [1, 2])
def test_the_models_that_papers_report(on_toy, monkeypatch, per_round):
    """sel: the mean of the cohort's models; all: of everyone's last one, who never took part
    counting with the model that the run began with.  Neither is weighted by samples."""
    install = toy.install

    def from_elsewhere(patch, n):
        install(patch, n)
        patch.setattr(assembly, "new_model", lambda *_: Started())

    monkeypatch.setattr(toy, "install", from_elsewhere)
    trace = on_toy(
        8, K10, f"clients.per-round={per_round}", "eval.every=1", "eval.models=cloud,sel,all",
        n=(3, 1),
    )  # fmt: skip

    def loss(theta: float) -> float:
        f1, f2 = toy.A * (theta - toy.B) ** 2 / 2
        return (3 * f1 + f2) / 4

    kept = (1 - toy.LR * toy.A) ** 10  # of a client's distance to its minimum, after a round
    last = np.array([0.3, 0.3])
    waiting = 0
    for w, row in zip(trace.w, trace.result.history, strict=False):
        cohort = row["cohort"]
        waiting += len(set(cohort)) == 1 and (last == 0.3).any()
        last[cohort] = (toy.B + kept * (w - toy.B))[cohort]
        assert row["loss_sel"] == pytest.approx(loss(last[cohort].mean()), abs=1e-14)
        assert row["loss_all"] == pytest.approx(loss(last.mean()), abs=1e-14)
    assert waiting == (0 if per_round == 2 else 4)  # the draws of seed 0
    assert trace.result.history[-1]["loss"] == pytest.approx(loss(trace.w[-1]), abs=1e-14)


def test_only_the_models_that_are_asked_for_are_evaluated(traced):
    rows = [
        traced(2, *TABULAR, "run.rounds=1", f"eval.models={models}").result.history[0]
        for models in ("cloud", "sel", "all")
    ]
    found = [{key for key in row if key.startswith(("accuracy", "loss"))} for row in rows]
    plain = {"accuracy", "loss"}
    assert found == [
        plain, plain | {"accuracy_sel", "loss_sel"}, plain | {"accuracy_all", "loss_all"}
    ]  # fmt: skip


# What a hostile world does to client 1's reply to round 3.  The client has worked all the same,
# and remembers it.


def through(app):
    """Client 1's training in round 3 goes through `app(honest, message, context)`."""

    def install(patch):
        honest = fl_client.app.app

        def answer(message, context):
            third = message.metadata.message_type == "train" and message.metadata.group_id == "3"
            if third and context.node_config["partition-id"] == 1:
                return app(honest, message, context)
            return honest(message, context)

        patch.setattr(fl_client.app, "app", answer)

    return install


def crashing(honest, message, context):
    honest(message, context)
    return Message(Error(2, "gone"), reply_to=message)


def poisoned(honest, message, context):
    reply = honest(message, context)
    reply.content["arrays"] = wire.pack({"params": torch.tensor([np.nan], dtype=torch.float64)})
    return reply


def twice(honest, message, context):
    honest(message, context)
    return honest(message, context)


def test_a_round_that_does_not_count_has_no_models_of_its_own(traced, monkeypatch):
    """In round 3 a reply is rejected, and both are needed."""
    through(poisoned)(monkeypatch)
    settings = ["run.rounds=4", "clients.min-replies=2", "eval.models=sel,all,first"]
    rows = traced(2, *TABULAR, *settings).result.history
    for of, there in (("sel", False), ("first", False), ("all", True)):
        assert [f"loss_{of}" in row for row in rows] == [True, True, there, True]


def on(grid):
    """The run's messages go over this grid, and waiting takes no time."""

    def install(patch):
        patch.setattr(fl_server.exchange, "time", Clock())
        patch.setattr(fl_server.inprocess, "InProcessGrid", grid)

    return install


class Repeating(InProcessGrid):
    """Every reply comes twice."""

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        return [*replies, *copy.copy(replies)]


class Losing(InProcessGrid):
    """Client 1's reply to round 3 never comes."""

    held: Message | None = None

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply in replies:
            if (reply.metadata.group_id, reply.metadata.src_node_id) == ("3", 3):
                self.held = reply
                return []
        return replies


class Delaying(Losing):
    """It comes together with a reply to round 4."""

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        if self.held and any(reply.metadata.group_id == "4" for reply in replies):
            replies = [self.held, *replies]
            self.held = None
        return replies


WORLDS = {
    "quiet": (lambda patch: None, "replies", [0, 1]),
    "every reply twice": (on(Repeating), "replies", [0, 1]),
    "the message twice": (through(twice), "replies", [0, 1]),
    "lost": (on(Losing), "failed", [0]),
    "late": (on(Delaying), "failed", [0]),
    "crashed after work": (through(crashing), "failed", [0]),
    "rejected": (through(poisoned), "rejected", [0]),
}


@pytest.mark.parametrize("world", WORLDS)
def test_controls_advance_once_per_accepted_reply(on_toy, monkeypatch, capsys, world):
    install, what, accepted = WORLDS[world]
    cohorts = [[0, 1], [0, 1], accepted, [0, 1], [0, 1], [0, 1]]
    w, c, own = by_hand(cohorts, n=(3, 1))
    install(monkeypatch)
    settings = [K10, "strategy.name=scaffold", "clients.deadline-s=3"]
    trace = on_toy(6, *settings, n=(3, 1))
    third = trace.result.history[2]
    assert third["replies"] == accepted
    assert what == "replies" or list(third[what]) == ["1"]
    np.testing.assert_allclose(trace.w, w, rtol=0, atol=1e-13)
    np.testing.assert_allclose(trace.kept("c"), c, rtol=0, atol=1e-13)
    np.testing.assert_allclose(trace.memory("c"), own, rtol=0, atol=1e-13)
    assert ("dropped a late reply" in capsys.readouterr().out) == (world == "late")
    # the same with memories that no disk holds
    assert np.array_equal(on_toy(6, *settings, "client.state-dir=", n=(3, 1)).w, trace.w)


@pytest.mark.parametrize("world", ["every reply twice", "the message twice", "late", "rejected"])
@pytest.mark.parametrize("name", ["feddyn", "feddc", "fedspeed"])
def test_drifts_advance_once_per_accepted_reply(on_toy, monkeypatch, name, world):
    WORLDS[world][0](monkeypatch)
    trace = on_toy(6, K10, f"strategy.name={name}", "clients.deadline-s=3", n=(3, 1))
    np.testing.assert_allclose(trace.kept("H"), trace.memory("h").mean(axis=1), rtol=0, atol=1e-13)
    controls = (np.array([1.5, 0.5]) * trace.memory("c")).mean(axis=1)
    np.testing.assert_allclose(trace.kept("c"), controls, rtol=0, atol=1e-13)
    moved = np.diff(trace.memory("h"), axis=0) != 0
    # in round 1 client 0 is where it wants to be
    assert [np.flatnonzero(row).tolist() for row in moved] == [
        [1], *(row["replies"] for row in trace.result.history[1:])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "models"), [*((name, "cloud") for name in OURS), ("fedavg", "all")]
)
def test_no_sum_of_a_round_is_kept_while_the_next_one_is_waited_for(
    runner, monkeypatch, name, models
):
    """A sum is float64, so as large as two models; that of all clients' last models stays."""
    train, kept = Rounds.train, []

    def doubles() -> list[torch.Tensor]:
        found = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        return [each for each in found if each.dtype == torch.float64]

    others = doubles()  # kept alive here, so that no later tensor has the place of one of them
    known = {id(each) for each in others}

    def followed(self, *args):
        train(self, *args)
        kept.append([each.shape for each in doubles() if id(each) not in known])

    monkeypatch.setattr(Rounds, "train", followed)
    more = ["fedpart.warm-up=0"] if name == "fedpart" else []
    settings = [
        "clients.number=2",
        "run.rounds=2",
        f"strategy.name={name}",
        f"eval.models={models}",
    ]
    runner(*TABULAR, *settings, *more)
    assert [len(shapes) for shapes in kept] == [int(models == "all")] * 2


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_a_round_that_fails_leaves_all_memories(on_toy, monkeypatch, name):
    """Client 1 is rejected, and two replies are wanted: client 0's does not count either."""
    through(poisoned)(monkeypatch)
    settings = [K10, f"strategy.name={name}"]
    trace = on_toy(5, *settings, "clients.min-replies=2", n=(3, 1))
    assert trace.result.history[2]["client_loss"] is None
    monkeypatch.undo()
    quiet = on_toy(4, *settings, n=(3, 1))
    for array, other in [
        (trace.w, quiet.w),
        *((trace.kept(key), quiet.kept(key)) for key in "Hc"),
        *((trace.memory(key), quiet.memory(key)) for key in "hc"),
    ]:
        assert np.array_equal(array[3], array[2])
        assert np.array_equal(np.delete(array, 3, axis=0), other)


CUT = [
    ("flwr:FedAdam", []),
    ("flwr:FedAvgM", ["strategy.params=server_momentum=0.9,server_learning_rate=0.5"]),
    ("flwr:FedYogi", []),
    ("flwr:FedAdagrad", []),
    ("flwr:QFedAvg", ["strategy.params=client_learning_rate=0.1"]),
    *((name, []) for name in OURS),
    ("scaffold", ["eval.models=cloud,sel,all", "client.state-dir={}"]),
    ("fedavg", ["train.momentum=0.9", "train.keep-optimizer=true", "client.state-dir={}"]),
]


@pytest.mark.parametrize(("name", "settings"), CUT)
def test_a_run_that_is_cut_and_resumed_gives_the_same_bits(
    runner, tmp_path, monkeypatch, capsys, name, settings
):
    """By a process that knows nothing: what clients had in memory comes from the ledger."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("fl_server.recorder.Recorder._draw", lambda self: None)
    monkeypatch.setattr("gc.collect", lambda: 0)  # Flower's QFedAvg sweeps after every array
    own = [
        *TABULAR, "clients.number=4", "clients.per-round=3", "train.lr-decay=0.9",
        f"strategy.name={name}", *(setting.format(tmp_path / "state") for setting in settings),
    ]  # fmt: skip
    whole = runner(*own, "run.rounds=4")
    fl_client.app.release()
    cut = runner(*own, "run.rounds=2")
    assert cut.summary["model_sha256"] != whole.summary["model_sha256"]
    fl_client.app.release()
    capsys.readouterr()
    assert main(["resume", str(cut.folder), "run.rounds=4"]) == 0
    assert cut.summary["model_sha256"] == whole.summary["model_sha256"]
    assert cut.history_less_times == whole.history_less_times
    given_back = "its memory was lost and is given back" in capsys.readouterr().out
    assert given_back == (name in WITH_MEMORY and not settings)
