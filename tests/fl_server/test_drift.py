"""How far clients move, and whether alike: numbers by hand, and what runs record of it."""

from __future__ import annotations

import pytest
import torch

from fl_common.groups import Groups
from fl_common.wire import vectors
from fl_server import drift
from fl_server.drift import Drift
from fl_server.rounds import Rounds
from strategies.base import Reply

NAMES = ("update_norm", "update_norm_max", "update_alignment")
KEYS = {*NAMES}
WHOLE = Groups({"params": (0, 1)}, (2, 1))
SMALL = ["clients.number=4", "train.device=cpu", "run.rounds=3"]


def told(w, *clients, groups=WHOLE, dtype=torch.float32):
    """Of clients, given as (n_i, theta_i) or (n_i, theta_i by group)."""
    found = Drift(torch.tensor(w, dtype=dtype), groups)
    for samples, model in clients:
        parts = model if isinstance(model, dict) else {"params": model}
        flat = {name: torch.tensor(part, dtype=dtype) for name, part in parts.items()}
        flat |= {"stats": torch.ones(5), "counters": torch.ones(1, dtype=torch.int64)}
        found.add(Reply(samples, 1, flat))
    return found.row()


@pytest.mark.parametrize("block", [1, 2, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_hand(monkeypatch, block, dtype):
    """w = (1, 1, 1); Delta_1 = (3, 4, 0), length 5; Delta_2 = (0, 0, 1), length 1; p = 1/4, 3/4.

    Their mean is (3/4, 1, 3/4), squared 34/16; the mean of squares is (25 + 3) / 4 = 7.
    """
    monkeypatch.setitem(drift.BLOCK, "cpu", block)
    assert told([1, 1, 1], (10, [4, 5, 1]), (30, [1, 1, 2]), dtype=dtype) == {
        "update_norm": 3.0, "update_norm_max": 5.0, "update_alignment": 0.303571,  # 34/112
    }  # fmt: skip


@pytest.mark.parametrize("block", [1, 2, 1 << 18])
def test_of_a_large_model_evenly_spaced_updates_are_added_up(monkeypatch, block):
    """As above, of the parameters 0 and 2: the mean is (3/4, 3/4), squared 18/16; the mean of
    squares is (9 + 3) / 4 = 3.  Norms are those of all parameters."""
    monkeypatch.setitem(drift.BLOCK, "cpu", block)
    monkeypatch.setattr(drift, "MOST", 2)
    assert told([1, 1, 1], (10, [4, 5, 1]), (30, [1, 1, 2])) == {
        "update_norm": 3.0, "update_norm_max": 5.0, "update_alignment": 0.375,  # 18/48
    }  # fmt: skip


@pytest.mark.parametrize(
    ("deltas", "alignment"),
    [
        ([[1, 2, 2], [1, 2, 2], [1, 2, 2]], 1.0),
        ([[3, 0, 0], [0, 3, 0], [0, 0, 3]], 0.333333),
        ([[3, 0, 0], [-3, 0, 0]], 0.0),
        ([[0.1, 0.2, 0.2]], 1.0),
    ],
)
def test_alike_unrelated_opposite_alone(deltas, alignment):
    row = told([0, 0, 0], *((7, delta) for delta in deltas))
    assert row["update_alignment"] == alignment
    assert row["update_norm"] == row["update_norm_max"] == (0.3 if len(deltas) == 1 else 3.0)


def test_of_a_partial_update_the_groups_that_were_sent():
    """Group b is the parameters 0 and 2 of three, which do not lie together."""
    groups = Groups({"a": (1,), "b": (0, 2)}, (1, 2, 1))
    w, b = [1.0, 9.0, 9.0, 2.0], [[4.0, 6.0], [1.0, 2.0]]  # Delta_b = (3, 4) and (0, 0)
    assert told(w, (1, {"b": b[0]}), (1, {"b": b[1]}), groups=groups) == {
        "update_norm": 2.5, "update_norm_max": 5.0, "update_alignment": 0.5,
    }  # fmt: skip
    full = told(w, (1, {"a": [9.0, 21.0], "b": b[0]}), groups=groups)  # (12, 3, 4)
    assert full["update_norm"] == 13.0


def test_nobody_moved_or_nobody_answered():
    assert told([1, 1, 1], (3, [1, 1, 1])) == {"update_norm": 0.0, "update_norm_max": 0.0}
    assert told([1, 1, 1]) == {}


def test_replies_are_not_changed():
    theta = torch.tensor([4.0, 5.0, 1.0], dtype=torch.float64)
    found = Drift(torch.ones(3, dtype=torch.float64), WHOLE)
    found.add(Reply(1, 1, {"params": theta}))
    assert theta.tolist() == [4.0, 5.0, 1.0] and found.w.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy.name=scaffold", "clients.per-round=3"],
        ["strategy.name=fedpart", "fedpart.warm-up=1", "fedpart.rounds-per-group=1"],
        ["strategy.name=flwr:FedAdam", "model.norm=batch"],
    ],
)
def test_a_run_records_what_its_clients_sent(runner, monkeypatch, settings):
    """By the definition, of all models of a round at once."""
    entered, expected = Rounds._entered, []

    def watched(self, replies, *rest):
        w, groups, seen = self.model["params"].clone(), self.holdings.groups, []
        for reply in entered(self, replies, *rest):
            model = groups.joined(vectors(reply.content), w)
            seen.append((reply.content["metrics"]["num-examples"], model["params"].double() - w))
            yield reply
        n = sum(samples for samples, _ in seen)
        norms = [float(delta.norm()) for _, delta in seen]
        mean = sum(samples / n * delta for samples, delta in seen)
        squares = sum(samples / n * float(delta @ delta) for samples, delta in seen)
        expected.append([sum(norms) / len(norms), max(norms), float(mean @ mean) / squares])

    monkeypatch.setattr(Rounds, "_entered", watched)
    history = runner(*SMALL, *settings).history
    found = [[row[key] for key in NAMES] for row in history]
    assert found == [pytest.approx([n, most, a], rel=1e-5) for n, most, a in expected]
    assert all(0 < row["update_alignment"] < 1 for row in history)


def test_partial_rounds_name_the_groups_that_trained(runner):
    few = ["fedpart.warm-up=1", "fedpart.rounds-per-group=1", "fedpart.groups=conv*+norm*, fc*"]
    history = runner(*SMALL, "strategy.name=fedpart", *few).history
    assert [row.get("active") for row in history] == [None, ["conv*+norm*"], ["fc*"]]


def test_only_rounds_that_evaluate_are_measured(runner, monkeypatch):
    made = []
    monkeypatch.setattr("fl_server.rounds.Drift", lambda *given: made.append(1) or Drift(*given))
    history = runner(*SMALL, "eval.every=2").history
    assert [KEYS & row.keys() for row in history] == [set(), KEYS, KEYS]
    assert len(made) == 2


def test_the_model_is_the_same_without(runner, monkeypatch):
    settings = [*SMALL, "strategy.name=feddyn", "train.dtype=float64"]
    with_it = runner(*settings)
    monkeypatch.setattr(Drift, "add", lambda self, reply: None)
    without = runner(*settings)
    assert not KEYS & without.history[-1].keys() and with_it.history[-1].keys() > KEYS
    assert with_it.summary["model_sha256"] == without.summary["model_sha256"]


def test_clients_alike_move_alike(runner):
    alike, apart = (
        runner("clients.number=10", "run.rounds=2", f"data.partition={partition}").history
        for partition in ("iid", "pathological")
    )
    for one, other in zip(alike, apart, strict=True):
        assert one["update_alignment"] > other["update_alignment"] + 0.1
