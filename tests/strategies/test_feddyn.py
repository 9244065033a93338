"""FedDyn on the quadratic toy, through the real engine, client and strategy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.clientapp import ClientApp

from fl_common import wire
from fl_common.config import resolve
from fl_server.inprocess import InProcessGrid
from strategies.feddyn import FedDyn
from tests import toy
from tests.strategies.test_fedavg import random_model, replies_to

FEDDYN = ["strategy.name=feddyn", "feddyn.alpha=0.5"]
K10 = "train.epochs=10"
EXACT = {"rtol": 0, "atol": 1e-12}


def plain(gradient: Callable[[float], float], theta: float) -> float:
    return gradient(theta)


def clipped(g: float, bound: float) -> float:
    """As torch.nn.utils.clip_grad_norm_ does it."""
    return g * min(1.0, bound / (abs(g) + 1e-6))


def by_hand(
    cohorts: list[list[int]],
    *,
    alpha: float = 0.5,
    omega: tuple[float, float] = (1.0, 1.0),
    epochs: int = 10,
    decay: float = 0.0,
    clip: float = np.inf,
    official: bool = False,
    pass_: Callable[[Callable[[float], float], float], float] = plain,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w (T + 1,), H (T + 1,) and h_i (T + 1, 2); `pass_`: the loss's gradient at theta."""
    w, server, own = 0.0, 0.0, np.zeros(2)
    history = [(w, server, own)]
    for cohort in cohorts:
        after = own.copy()
        for i in cohort:
            theta, pull = w, alpha / omega[i]
            for _ in range(epochs):
                g = pass_(lambda x, i=i: toy.A[i] * (x - toy.B[i]), theta)
                if official:
                    step = clipped(g + pull * (own[i] - w), clip) + (pull + decay) * theta
                else:
                    step = clipped(g + pull * (theta - w + own[i]), clip) + decay * theta
                theta -= toy.LR * step
            after[i] += theta - w
        deltas = (after - own)[cohort]
        own, server = after, server + deltas.sum() / 2
        w += deltas.mean() + server
        history.append((w, server, own))
    return tuple(np.array(part) for part in zip(*history, strict=True))


def test_published_rounds(on_toy):
    trace = on_toy(75, K10, *FEDDYN)
    assert trace.w[1:4] == pytest.approx([0.8866373763, 0.8574810934, 0.7603870474], abs=1e-9)
    assert trace.settled(0.8) == 70
    assert trace.kept("H")[-1] == pytest.approx(0, abs=1e-8)
    # -alpha h_i is grad f_i at the optimum: 0.8 and 4 (0.8 - 1)
    assert -0.5 * trace.memory("h")[-1] == pytest.approx([0.8, -0.8], abs=1e-7)


def test_exact_local_solves(on_toy):
    # argmin f_i + alpha (x - w + h_i)^2 / 2 with alpha = 1/2: theta_1 = (w - h_1) / 3 and
    # theta_2 = (8 + w - h_2) / 9.  Round 1, from 0: theta = (0, 8/9), H = 4/9, w = 4/9 + 4/9.
    # Round 2, h = (0, 8/9): theta = (8/27, 8/9), H = 4/9 + (-16/27 + 0) / 2 = 4/27,
    # w = 16/27 + 4/27 = 20/27.  Round 3, h = (-16/27, 8/9): theta = (4/9, 212/243), ...
    trace = on_toy(3, "train.epochs=300", *FEDDYN)
    assert trace.w[1:] == pytest.approx([8 / 9, 20 / 27, 176 / 243], abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "n", "case"),
    [
        ([], (1, 1), {}),
        ([], (3, 1), {"omega": (1.5, 0.5)}),
        (["clients.per-round=1"], (3, 1), {"omega": (1.5, 0.5)}),
        (["feddyn.weighting=uniform"], (3, 1), {}),
        (["train.weight-decay=0.05"], (1, 1), {"decay": 0.05}),
        (["train.weight-decay=0.05", "train.clip-norm=0.6"], (1, 1), {"decay": 0.05, "clip": 0.6}),
        (
            ["train.weight-decay=0.05", "train.clip-norm=0.6", "feddyn.clip-scope=official"],
            (3, 1),
            {"omega": (1.5, 0.5), "decay": 0.05, "clip": 0.6, "official": True},
        ),
    ],
    ids=["plain", "omega", "partial", "uniform", "decay", "clip all", "clip official"],
)
def test_every_round_is_the_algorithm_written_out(on_toy, settings, n, case):
    trace = on_toy(12, K10, *FEDDYN, *settings, n=n)
    w, server, own = by_hand(trace.cohorts, **case)
    np.testing.assert_allclose(trace.w, w, **EXACT)
    np.testing.assert_allclose(trace.kept("H"), server, **EXACT)
    np.testing.assert_allclose(trace.memory("h"), own, **EXACT)


def test_where_clipping_ends_matters():
    cohorts = [[0, 1]] * 5
    inside, official = (by_hand(cohorts, clip=0.6, official=o)[0][-1] for o in (False, True))
    assert abs(inside - official) > 1e-3


@pytest.mark.parametrize(
    ("settings", "n", "optimum", "rounds"),
    [
        ([], (3, 1), 4 / 7, 65),
        # published for its own draws: 161
        (["clients.per-round=1"], (1, 1), 0.8, 165),
        (["clients.per-round=1"], (3, 1), 4 / 7, 180),
        (["feddyn.weighting=uniform"], (3, 1), 0.8, 70),
    ],
)
def test_reaches_the_optimum_and_keeps_the_mean_of_all_drifts(on_toy, settings, n, optimum, rounds):
    trace = on_toy(rounds + 5, K10, *FEDDYN, *settings, n=n)
    assert trace.settled(optimum) <= rounds
    np.testing.assert_allclose(trace.kept("H"), trace.memory("h").mean(axis=1), rtol=0, atol=1e-14)


@pytest.mark.long
def test_a_small_alpha_swings_for_thousands_of_rounds(on_toy):
    in_memory = ["server.checkpoint-every=50", "server.ledger=false", "client.state-dir="]
    trace = on_toy(3500, K10, *in_memory, "strategy.name=feddyn", "feddyn.alpha=0.01")
    assert 3350 < trace.settled(0.8) <= 3450  # published: 3417


def test_clients_that_stay_where_they_are_change_no_drift(on_toy):
    # The learning rate of round 2, 1e-301, moves no theta that is not zero: Delta_i = 0.
    trace = on_toy(2, K10, *FEDDYN, "train.lr-decay=1e-300")
    h, server = trace.memory("h"), trace.kept("H")
    assert h[1].any()
    assert server[1] != 0
    assert np.array_equal(h[2], h[1])
    assert server[2] == server[1]
    assert trace.w[2] == trace.w[1] + server[1]


def test_without_drift_and_movement_the_model_keeps_its_bits():
    strategy = FedDyn(resolve({"strategy.name": "feddyn", "clients.number": 3}))
    grid = InProcessGrid(ClientApp(), 3, {})
    model = random_model(0)
    settings = ConfigRecord({wire.SAMPLES: 21})
    messages = strategy.configure_train(1, wire.pack(model), settings, grid)
    arrays, _ = strategy.aggregate_train(1, replies_to(messages, [model] * 3, [3, 7, 11]))
    assert torch.equal(wire.unpack(arrays)["params"], model["params"])
    assert not strategy.state()["H"].any()
