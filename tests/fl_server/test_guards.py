"""Hostile clients and a hostile grid against the in-process engine: nothing bad touches the sum."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import Error

import fl_client.app
from fl_common import wire
from fl_common.guards import Expected, Spec, objection
from fl_server.cli import main
from fl_server.inprocess import InProcessGrid
from strategies.feddyn import FedDyn

PLAIN = ["clients.number=4", "train.device=cpu"]
BASE = [*PLAIN, "model.norm=group"]  # no buffers: one array
HONEST = [*BASE, "data.partition=iid", "run.rounds=3"]
EVIL = 2


def with_hostile(monkeypatch, corrupt, rounds=(1, 2, 3)):
    """Client EVIL's replies to training go through `corrupt(content)`, which changes them."""
    honest = fl_client.app.app

    def app(message, context):
        reply = honest(message, context)
        evil = context.node_config["partition-id"] == EVIL
        if evil and message.metadata.message_type == "train":
            server_round = int(message.content["config"]["server-round"])
            if server_round in rounds:
                return corrupt(reply, message)
        return reply

    monkeypatch.setattr(fl_client.app, "app", app)


def changed(**arrays):
    """A corruption: put these arrays in the place of the honest ones; None leaves one out."""

    def corrupt(reply, message):
        record = reply.content["arrays"]
        for key, make in arrays.items():
            if make is None:
                del record[key]
            else:
                record[key] = make(record.get(key))
        return reply

    return corrupt


def metric(**values):
    def corrupt(reply, message):
        reply.content["metrics"].update({k.replace("_", "-"): v for k, v in values.items()})
        return reply

    return corrupt


def without(key):
    def corrupt(reply, message):
        del reply.content["metrics"][key]
        return reply

    return corrupt


def poisoned(value):
    def make(array):
        tensor = array.tensor.clone()
        tensor[7] = value
        return wire.TensorArray(tensor)

    return make


def lying(array):
    """Says the right shape, holds another one, which would broadcast."""
    inner = Array(np.ones(1, np.float32))
    return Array(dtype=array.dtype, shape=array.shape, stype=inner.stype, data=inner.data)


def pickled(array):
    data = b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00"
    return Array(dtype=array.dtype, shape=array.shape, stype="numpy.ndarray", data=data)


def zipped(array):
    data = b"PK\x03\x04 no archive"
    return Array(dtype=array.dtype, shape=array.shape, stype="numpy.ndarray", data=data)


def oversize(array):
    return Array(
        dtype=array.dtype, shape=array.shape, stype="numpy.ndarray", data=b"0" * 50_000_000
    )


def of(transform):
    return lambda array: wire.TensorArray(transform(array.tensor))


def with_extra_record(reply, message):
    reply.content["more"] = ArrayRecord({"x": Array(np.ones(3, np.float32))})
    return reply


ATTACKS = {
    "nan": (changed(params=poisoned(float("nan"))), "1 of 10026 elements are NaN or infinite"),
    "inf": (changed(params=poisoned(float("-inf"))), "NaN or infinite"),
    "missing key": (changed(params=None), "instead of (params)"),
    "extra key": (changed(c=lambda _: Array(np.ones(3, np.float32))), "arrays (c, params)"),
    "what a terminal obeys": (changed(**{"\x1b[2J": lambda _: Array(np.ones(3))}), r"(\x1b[2J, "),
    "wrong key": (changed(params=None, weights=lambda _: Array(np.ones(3))), "(weights)"),
    "extra record": (with_extra_record, "records (arrays, metrics, more)"),
    "shorter": (changed(params=of(lambda t: t[:-1])), "[10025] instead of float32 [10026]"),
    "broadcasts": (changed(params=of(lambda t: t[:1])), "float32 [1] instead of"),
    "scalar": (changed(params=of(lambda t: t[0])), "float32 [] instead of"),
    "lies about shape": (changed(params=lying), "says float32 [10026], holds float32 [1]"),
    "float64": (changed(params=of(torch.Tensor.double)), "float64 [10026] instead of float32"),
    "float16": (changed(params=of(torch.Tensor.half)), "float16"),
    "pickle": (changed(params=pickled), "cannot be decoded"),
    "oversize": (changed(params=oversize), "50000000 bytes, at most 41128 were expected"),
    "other weight": (metric(num_examples=10**6), "num-examples = 1000000, but"),
    "zero weight": (metric(num_examples=0), "num-examples = 0 is not a positive"),
    "negative weight": (metric(num_examples=-5), "num-examples = -5 is not a positive"),
    "infinite weight": (
        metric(num_examples=float("inf")),
        "num-examples = inf is not a finite number",
    ),
    "nan loss": (metric(loss=float("nan")), "loss = nan is not a finite number"),
    "no loss": (without("loss"), "metrics (cpu-s, num-examples, server-round, steps) instead"),
    "no steps": (without("steps"), "instead of (cpu-s, loss, num-examples, server-round, steps)"),
    "no cpu time": (without("cpu-s"), "instead of (cpu-s"),
    "no round": (without("server-round"), "instead of (cpu-s"),
    "a list for a number": (metric(loss=[1.0, 2.0]), "loss = [1.0, 2.0] is not a finite number"),
    "a number too many": (metric(zzz=1.0), "server-round, steps, zzz) instead of"),
    "zip": (changed(params=zipped), "cannot be decoded"),
    "stale": (metric(server_round=0), "answers round 0, this is round"),
}


@pytest.fixture(scope="module")
def without_evil(tmp_path_factory):
    """What the run gives when client EVIL never answers."""
    from tests.conftest import Runner

    with pytest.MonkeyPatch.context() as patch:
        with_hostile(patch, lambda reply, message: Message(Error(2, "gone"), reply_to=message))
        result = Runner(tmp_path_factory.mktemp("honest"))(*HONEST)
    fl_client.app.release()
    assert result.code == 0
    return result


@pytest.mark.parametrize("attack", ATTACKS)
def test_rejected_before_it_touches_the_sum(attack, runner, monkeypatch, capsys, without_evil):
    corrupt, reason = ATTACKS[attack]
    with_hostile(monkeypatch, corrupt)
    result = runner(*HONEST)
    assert result.code == 0
    assert result.summary["model_sha256"] == without_evil.summary["model_sha256"]
    for row in result.history:
        assert list(row["rejected"]) == [str(EVIL)]
        assert reason in row["rejected"][str(EVIL)]
        assert row["replies"] == [0, 1, 3]
    assert f"round 2, client {EVIL}: rejected: " in capsys.readouterr().out


EVALUATION = {
    "accuracy of 100": ({"accuracy": 100.0}, "accuracy = 100.0 is not between 0 and 1"),
    "other weight": ({"num-examples": 10**15}, "num-examples = 1000000000000000, but"),
    "no accuracy": ({"accuracy": None}, "metrics (loss, num-examples, server-round) instead of"),
    "nan": ({"loss": float("nan")}, "loss = nan is not a finite number"),
}


@pytest.mark.parametrize("attack", EVALUATION)
def test_evaluation_replies_are_guarded_too(attack, runner, monkeypatch):
    values, reason = EVALUATION[attack]
    honest = fl_client.app.app

    def app(message, context):
        reply = honest(message, context)
        evil = context.node_config["partition-id"] == EVIL
        if evil and message.metadata.message_type == "evaluate":
            for key, value in values.items():
                del reply.content["metrics"][key]
                if value is not None:
                    reply.content["metrics"][key] = value
        return reply

    monkeypatch.setattr(fl_client.app, "app", app)
    result = runner(*HONEST, "eval.on=clients")
    assert result.code == 0
    for row in result.history:
        assert list(row["client_accuracy"]) == ["0", "1", "3"]
        assert list(row["evaluation_failed"]) == [str(EVIL)]
        assert reason in row["evaluation_failed"][str(EVIL)]
        assert 0 <= row["accuracy"] <= 1


@pytest.mark.parametrize("corrupt", [metric(zzz=1.0), metric(loss=[1.0])])
def test_odd_metrics_do_not_end_a_run_of_flowers(corrupt, runner, monkeypatch):
    with_hostile(monkeypatch, corrupt)
    result = runner(*HONEST, "strategy.name=flwr:FedAvg")
    assert result.code == 0
    assert [list(row["rejected"]) for row in result.history] == [["2"]] * 3


@pytest.mark.parametrize("strategy", ["flwr:FedAvg", "flwr:FedMedian"])
def test_guards_stand_before_flowers_strategies_too(strategy, runner, monkeypatch):
    with_hostile(monkeypatch, changed(params=poisoned(float("nan"))), rounds=(2,))
    result = runner(*HONEST, f"strategy.name={strategy}", "model.name=resnet8")
    assert result.code == 0
    assert [list(row["rejected"]) for row in result.history] == [[], ["2"], []]
    assert all(torch.isfinite(tensor).all() for tensor in result.model.values())


def test_bad_statistics_and_counters_are_rejected(runner, monkeypatch):
    with_hostile(monkeypatch, changed(stats=poisoned(float("nan"))), rounds=(1,))
    settings = [*PLAIN, "data.partition=iid", "model.name=resnet8", "run.rounds=2"]
    assert "array stats" in runner(*settings).history[0]["rejected"][str(EVIL)]


def test_a_failing_client_does_not_stop_the_round(runner, monkeypatch):
    def crash(reply, message):
        raise RuntimeError("out of memory")

    place = f"{__file__}:{crash.__code__.co_firstlineno + 1}"
    honest = fl_client.app.app
    with_hostile(monkeypatch, crash, rounds=(2,))
    result = runner(*HONEST)
    assert honest is not fl_client.app.app
    assert result.code == 0
    assert [row["failed"] for row in result.history] == [
        {}, {str(EVIL): f"RuntimeError: out of memory ({place})"}, {},
    ]  # fmt: skip


def test_all_rejected_leaves_the_model_and_ends_after_max_failed_rounds(
    runner, monkeypatch, capsys
):
    honest = fl_client.app.app

    def app(message, context):
        reply = honest(message, context)
        if message.metadata.message_type == "train":
            server_round = int(message.content["config"]["server-round"])
            if server_round in (2, 4, 5):
                return changed(params=poisoned(float("nan")))(reply, message)
        return reply

    monkeypatch.setattr(fl_client.app, "app", app)
    settings = [*BASE, "clients.max-failed-rounds=2", "run.rounds=9"]
    result = runner(*settings)
    assert result.code == 3
    rows = result.history
    assert [row["replies"] for row in rows] == [[0, 1, 2, 3], [], [0, 1, 2, 3], [], []]
    assert [len(row["rejected"]) for row in rows] == [0, 4, 0, 4, 4]
    assert rows[1]["accuracy"] == rows[0]["accuracy"]
    assert rows[1]["loss"] == rows[0]["loss"]
    assert rows[1]["client_loss"] is None
    assert result.summary["status"] == "failed"
    assert "clients.max-failed-rounds" in result.summary["error"]
    assert "the model stays as it was" in capsys.readouterr().out


def test_the_round_that_ends_a_run_says_who_was_rejected(runner, capsys):
    settings = ["train.lr=1e20", "eval.on=both", "clients.max-failed-rounds=1"]
    result = runner(*PLAIN, *settings, "run.rounds=3")
    assert result.code == 3
    (row,) = result.history
    assert (row["round"], row["cohort"], row["replies"]) == (1, [0, 1, 2, 3], [])
    assert {*row["rejected"]} == {*"0123"} and not row["failed"]
    assert all("NaN or infinite" in reason for reason in row["rejected"].values())
    assert row["client_loss"] is None and "accuracy" not in row and row["seconds"] > 0
    assert result.summary["bytes_up"] == row["bytes_up"] > 0
    assert result.summary["bytes_down"] == row["bytes_down"] > 0
    capsys.readouterr()
    assert main(["report", str(result.folder)]) == 0
    assert re.search(r"\nrefused +4 rejected\n", capsys.readouterr().out)
    page = (result.folder / "report.html").read_text()
    assert "4 rejected" in page and "No client failed" not in page


def test_the_round_that_ends_a_run_says_who_could_not_evaluate(runner, monkeypatch):
    honest = fl_client.app.app

    def app(message, context):
        reply = honest(message, context)
        trains = message.metadata.message_type != "evaluate"
        return reply if trains else Message(Error(2, "gone"), reply_to=message)

    monkeypatch.setattr(fl_client.app, "app", app)
    result = runner(*HONEST, "eval.on=clients")
    assert result.code == 3 and "no client answered" in result.summary["error"]
    (row,) = result.history
    assert row["replies"] == [0, 1, 2, 3] and row["client_loss"] > 0
    assert row["evaluation_failed"] == dict.fromkeys("0123", "gone")
    # Four models to train, four trained ones, four to evaluate.
    assert row["bytes_down"] == 2 * row["bytes_up"] > 0


def test_the_round_that_makes_no_finite_model_is_recorded(runner, monkeypatch):
    """Each reply is finite, and what the strategy makes of them is not."""
    monkeypatch.setattr(
        "strategies.fedavg.FedAvg.step", lambda self: torch.full_like(self.w["params"], torch.inf)
    )
    result = runner(*HONEST)
    assert result.code == 3 and "the new model has NaN or infinite" in result.summary["error"]
    assert [row["replies"] for row in result.history] == [[0, 1, 2, 3]]


def test_what_a_strategy_keeps_is_finite_too(runner, monkeypatch):
    """The model of the first round is finite; what would spoil that of the second is not."""
    step = FedDyn.step

    def overflown(self) -> torch.Tensor:
        w = step(self)
        self.kept["H"] = self.kept["H"].index_fill(0, torch.tensor([0]), torch.inf)
        return w

    monkeypatch.setattr(FedDyn, "step", overflown)
    result = runner(*HONEST, "strategy.name=feddyn")
    assert result.code == 3 and "round 1: the strategy's state has NaN" in result.summary["error"]
    assert len(result.history) == 1


def test_bad_answers_are_answers(runner, monkeypatch):
    """Where all four are asked for, one that is rejected costs the round, not the run."""
    with_hostile(monkeypatch, metric(steps=0), rounds=(2,))
    result = runner(*HONEST, "clients.min-replies=4")
    assert result.code == 0
    assert [row["client_loss"] is None for row in result.history] == [False, True, False]


def test_too_few_answers_end_the_run_at_once(runner, monkeypatch):
    with_hostile(monkeypatch, lambda reply, message: Message(Error(2, "gone"), reply_to=message))
    result = runner(*HONEST, "clients.min-replies=4")
    assert result.code == 3
    assert "3 good replies, clients.min-replies = 4; client 2: gone" in result.summary["error"]
    (row,) = result.history
    assert (row["replies"], row["failed"]) == ([0, 1, 3], {"2": "gone"})


def test_repeated_replies_count_once(runner, monkeypatch, capsys):
    plain = runner(*HONEST)
    pull = InProcessGrid.pull_messages

    def twice(self, ids):
        replies = pull(self, ids)
        return replies + copy.copy(replies)

    monkeypatch.setattr(InProcessGrid, "pull_messages", twice)
    result = runner(*HONEST)
    assert result.code == 0
    assert result.summary["model_sha256"] == plain.summary["model_sha256"]
    assert result.summary["bytes_up"] == plain.summary["bytes_up"]
    assert "dropped a repeated or unknown reply of client 3" in capsys.readouterr().out


class Slow(InProcessGrid):
    """Client EVIL's reply to round 1 becomes ready in round 2."""

    held: list[Message]

    def pull_messages(self, ids):
        held = getattr(self, "held", [])
        if held and len(ids) > 1 and held[0].metadata.reply_to_message_id in ids:
            newest = max(int(m.metadata.group_id or 0) for m in self._queue.values() or [held[0]])
            if newest == 2:
                return [held.pop()]
        replies = super().pull_messages([i for i in ids if not _is(held, i)])
        for reply in replies:
            late = reply.metadata.dst_node_id == 1 and reply.metadata.group_id == "1"
            if late and reply.metadata.src_node_id == EVIL + 2:
                self.held = [reply]
                return []
        return replies


def _is(held, message_id):
    return bool(held) and held[0].metadata.reply_to_message_id == message_id


def test_a_late_reply_is_dropped_and_said(runner, monkeypatch, capsys):
    import fl_server.inprocess

    monkeypatch.setattr(fl_server.inprocess, "InProcessGrid", Slow)
    result = runner(*HONEST, "clients.deadline-s=3")
    out = capsys.readouterr().out
    assert result.code == 0
    first, second, third = result.history
    assert first["failed"] == {str(EVIL): "no reply within 3 s (clients.deadline-s)"}
    assert first["replies"] == [0, 1, 3]
    assert second["replies"] == third["replies"] == [0, 1, 2, 3]
    assert f"round 2: dropped a late reply: round 1, client {EVIL}" in out


def test_arrival_order_and_node_ids_do_not_matter(runner, monkeypatch):
    """Replies in reverse order, nodes with other ids: same bits, counters of BatchNorm included."""
    settings = [*PLAIN, "model.name=resnet8", "run.rounds=2"]
    plain = runner(*settings)

    class Reversed(InProcessGrid):
        def __init__(self, *args):
            super().__init__(*args)
            contexts = list(self._contexts.values())
            self._contexts = {}
            for i, context in enumerate(contexts):
                context.node_id = 10**6 - 17 * i
                self._contexts[context.node_id] = context

        def pull_messages(self, ids):
            return super().pull_messages(list(ids)[::-1])

    import fl_server.inprocess

    monkeypatch.setattr(fl_server.inprocess, "InProcessGrid", Reversed)
    other = runner(*settings)
    assert other.summary["model_sha256"] == plain.summary["model_sha256"]
    assert other.history_less_times == plain.history_less_times


def good_reply():
    arrays = wire.pack({"params": torch.arange(4.0)})
    metrics = MetricRecord({"num-examples": 3, "server-round": 2, "loss": 0.5})
    return RecordDict({"arrays": arrays, "metrics": metrics})


EXPECTED = Expected(
    {"arrays": {"params": Spec((4,), "float32")}},
    server_round=2,
    samples=3,
    metrics=frozenset({"loss"}),
)


def test_a_good_reply_passes():
    assert objection(good_reply(), EXPECTED) is None


def test_large_but_finite_values_pass():
    content = good_reply()
    content["arrays"] = wire.pack({"params": torch.full((4,), 3e38)})
    assert objection(content, EXPECTED) is None


def test_a_serialised_array_is_decoded_once():
    content = good_reply()
    content["arrays"] = ArrayRecord({"params": Array(np.arange(4, dtype=np.float32))})
    assert objection(content, EXPECTED) is None
    assert isinstance(content["arrays"]["params"], wire.TensorArray)
    assert torch.equal(wire.unpack(content["arrays"])["params"], torch.arange(4.0))


@pytest.mark.parametrize("missing", ["num-examples", "server-round", "loss"])
def test_metrics_that_are_missing(missing):
    content = good_reply()
    del content["metrics"][missing]
    assert objection(content, EXPECTED) is not None


def test_bool_or_float_weight_is_no_weight():
    content = good_reply()
    content["metrics"]["num-examples"] = 3.0
    assert "num-examples" in objection(content, EXPECTED)


def test_records_of_another_kind():
    for name, record in (("arrays", MetricRecord()), ("metrics", ConfigRecord())):
        content = good_reply()
        del content[name]
        content[name] = record
        assert objection(content, EXPECTED).startswith(f"{name} is not ")


@pytest.mark.parametrize(
    ("norms", "good"),
    [
        ([0.5, 0.0], True),
        ([0.5], False),
        ([0.5, 0.5, 0.5], False),
        (0.5, False),
        ([0.5, -0.5], False),
        ([0.5, float("nan")], False),
        ([float("inf"), 0.5], False),
    ],
)
def test_lists_have_a_norm_for_each_step(norms, good):
    content = good_reply()
    content["metrics"].update({"steps": 2, "grad-norm": norms})
    expected = replace(
        EXPECTED, metrics=frozenset({"loss", "steps"}), steps=2, series=frozenset({"grad-norm"})
    )
    assert (objection(content, expected) is None) == good


@pytest.mark.parametrize("lost", [0, 1, -1, 2.5])
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_a_request_for_memory_without_a_reason_is_rejected(strategy, lost, runner, monkeypatch):
    """In round 1 nobody has anything to lose, and without memory nobody ever has."""

    def ask(reply, message):
        numbers = MetricRecord({"server-round": 1, wire.MEMORY_LOST: lost})
        return Message(RecordDict({wire.METRICS: numbers}), reply_to=message)

    with_hostile(monkeypatch, ask, rounds=(1,))
    result = runner(*HONEST, f"strategy.name={strategy}")
    assert result.code == 0
    assert [list(row["rejected"]) for row in result.history] == [[str(EVIL)], [], []]
    assert "memory_given_back" not in result.summary


@pytest.mark.parametrize("steps", [0, 1, 10**9])
def test_the_number_of_steps_is_known_and_not_believed(steps, runner, monkeypatch):
    """A control variate is Delta_i / (K_i eta): a lie about K_i would scale it at will."""
    with_hostile(monkeypatch, metric(steps=steps), rounds=(2,))
    result = runner(*HONEST, "strategy.name=scaffold")
    assert [list(row["rejected"]) for row in result.history] == [[], [str(EVIL)], []]
    assert f"steps = {steps}" in result.history[1]["rejected"][str(EVIL)]
