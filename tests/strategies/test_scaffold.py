"""SCAFFOLD on the quadratic toy, through the real engine, client and strategy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests import toy

SCAFFOLD = "strategy.name=scaffold"
K10 = "train.epochs=10"
EXACT = {"rtol": 0, "atol": 1e-12}


def by_hand(
    cohorts: list[list[int]],
    *,
    n: tuple[int, int] = (1, 1),
    omega: tuple[float, float] | None = None,
    epochs: int = 10,
    batch: int = 100,
    eta_g: float = 1.0,
    decay: float = 1.0,
    legacy: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w (T + 1,), c (T + 1,) and c_i (T + 1, 2).

    A client descends along grad f_i + c / omega_i - c_i, and its new c_i is the mean of the
    gradients that it met: what option II, which only looks at Delta_i, has to come to.
    """
    omega = omega or tuple(2 * m / sum(n) for m in n)
    steps = [epochs * math.ceil(m / batch) for m in n]
    w, c, own = 0.0, 0.0, np.zeros(2)
    history = [(w, c, own)]
    for t, cohort in enumerate(cohorts):
        lr, deltas, change, new = toy.LR * decay**t, [], 0.0, own.copy()
        for i in cohort:
            theta, met = w, []
            for _ in range(steps[i]):
                met.append(toy.A[i] * (theta - toy.B[i]))
                theta -= lr * (met[-1] + c / omega[i] - own[i])
            new[i] = np.mean(met)
            if legacy:
                nominal = epochs * math.ceil(np.mean(n) / batch)
                new[i] = own[i] - c / omega[i] - (theta - w) / (nominal * toy.LR)
            deltas.append(theta - w)
            change += omega[i] * (new[i] - own[i]) / 2
        if cohort:
            w, c, own = w + eta_g * np.mean(deltas), c + change, new
        history.append((w, c, own))
    return tuple(np.array(part) for part in zip(*history, strict=True))


def test_published_rounds(on_toy):
    trace = on_toy(25, K10, SCAFFOLD)
    assert trace.w[1:4] == pytest.approx([0.4969766912, 0.6852210929, 0.7565241447], abs=1e-9)
    assert trace.settled(0.8) == 19
    assert trace.kept("c")[-1] == pytest.approx(0, abs=1e-9)
    # c_i is grad f_i at the optimum: 0.8 and 4 (0.8 - 1)
    assert trace.memory("c")[-1] == pytest.approx([0.8, -0.8], abs=1e-8)


@pytest.mark.parametrize(
    ("settings", "n", "case"),
    [
        ([K10], (1, 1), {}),
        ([K10], (3, 1), {}),
        ([K10, "clients.per-round=1"], (3, 1), {}),
        # K = (12, 4)
        (["train.epochs=4", "train.batch-size=1"], (3, 1), {"epochs": 4, "batch": 1}),
        ([K10, "scaffold.eta-g=0.6"], (1, 1), {"eta_g": 0.6}),
        ([K10, "train.lr-decay=0.8"], (1, 1), {"decay": 0.8}),
        ([K10, "scaffold.weighting=uniform"], (3, 1), {"omega": (1, 1)}),
        (
            ["train.epochs=4", "train.batch-size=1", "train.lr-decay=0.8",
             "scaffold.legacy-beta=true"],
            (3, 1),
            {"epochs": 4, "batch": 1, "decay": 0.8, "legacy": True},
        ),
    ],
    ids=["plain", "omega", "partial", "unequal steps", "eta_g", "lr decay", "uniform", "legacy"],
)  # fmt: skip
def test_every_round_is_the_algorithm_written_out(on_toy, settings, n, case):
    trace = on_toy(12, SCAFFOLD, *settings, n=n)
    w, c, own = by_hand(trace.cohorts, n=n, **case)
    np.testing.assert_allclose(trace.w, w, **EXACT)
    np.testing.assert_allclose(trace.kept("c"), c, **EXACT)
    np.testing.assert_allclose(trace.memory("c"), own, **EXACT)


@pytest.mark.parametrize(
    ("settings", "n", "optimum", "rounds"),
    [
        ([K10], (3, 1), 4 / 7, 26),
        (["train.epochs=4", "train.batch-size=1"], (3, 1), 4 / 7, 19),
        ([K10, "clients.per-round=1"], (3, 1), 4 / 7, 67),
        ([K10, "clients.per-round=1"], (1, 1), 0.8, 61),
        ([K10, "scaffold.weighting=uniform"], (3, 1), 0.8, 19),
    ],
)
def test_reaches_the_optimum(on_toy, settings, n, optimum, rounds):
    trace = on_toy(rounds + 5, SCAFFOLD, *settings, n=n)
    assert trace.settled(optimum) <= rounds
    omega = (1.0, 1.0) if optimum == 0.8 else (1.5, 0.5)
    np.testing.assert_allclose(
        trace.kept("c"), (trace.memory("c") * omega).mean(axis=1), rtol=0, atol=1e-14
    )


def test_legacy_beta_is_the_default_while_steps_are_equal_and_lr_is_constant(on_toy):
    plain = on_toy(4, K10, SCAFFOLD)
    legacy = on_toy(4, K10, SCAFFOLD, "scaffold.legacy-beta=true")
    assert np.array_equal(plain.w, legacy.w)


def test_first_round_is_the_unweighted_mean(on_toy):
    # before there are control variates: FedAvg with equal weights, whatever n
    trace = on_toy(1, K10, SCAFFOLD, n=(3, 1))
    assert trace.w[1] == pytest.approx(0.4969766912, abs=1e-10)


@pytest.mark.parametrize("rho", [0.1, 0.05])
def test_with_sam_it_reaches_the_perturbed_balance(on_toy, rho):
    # near the optimum client 1 is right of its minimum and client 2 left of its own: SAM's ascent
    # takes them rho further out, so that the means vanish where (w + rho) + 4 (w - rho - 1) = 0
    balance = (4 + 3 * rho) / 5
    assert balance == pytest.approx(0.8 + 0.6 * rho)
    trace = on_toy(25, K10, SCAFFOLD, "regularizers=sam", f"sam.rho={rho}")
    assert trace.settled(balance) <= 20
