"""FedDC on the quadratic toy, and what is left of it when its parts are switched off."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fl_common.config import resolve
from strategies.feddc import FedDC
from tests import toy
from tests.strategies.test_feddyn import clipped

FEDDC = ["strategy.name=feddc", "feddc.alpha=0.5"]
NO_ALPHA = ["strategy.name=feddc", "feddc.alpha=0"]
NO_G, NO_DRIFT = "feddc.gradient-correction=false", "feddc.drift=false"
K10 = "train.epochs=10"
EXACT = {"rtol": 0, "atol": 1e-12}


def by_hand(
    cohorts: list[list[int]],
    *,
    alpha: float = 0.5,
    n: tuple[int, int] = (1, 1),
    omega: tuple[float, float] | None = None,
    epochs: int = 10,
    batch: int = 100,
    lr_decay: float = 1.0,
    legacy: bool = False,
    weight_decay: float = 0.0,
    clip: float = np.inf,
) -> dict[str, np.ndarray]:
    """w, c, H (T + 1,), and the clients' c_i, h_i (T + 1, 2)."""
    omega = np.array(omega or [2 * m / sum(n) for m in n])
    steps = np.array([epochs * math.ceil(m / batch) for m in n])
    nominal = epochs * math.ceil(np.mean(n) / batch)
    w, c, server, ci, hi = 0.0, 0.0, 0.0, np.zeros(2), np.zeros(2)
    history = [(w, c, server, ci, hi)]
    for t, cohort in enumerate(cohorts):
        lr, end = toy.LR * lr_decay**t, np.full(2, w)
        for i in cohort:
            for _ in range(steps[i]):
                g = toy.A[i] * (end[i] - toy.B[i])
                g += alpha / omega[i] * (end[i] - w + hi[i]) + c / omega[i] - ci[i]
                end[i] -= lr * (clipped(g, clip) + weight_decay * end[i])
        here = np.isin([0, 1], cohort)
        delta = end - w
        travelled = nominal * toy.LR if legacy else steps * lr
        change = np.where(here, -c / omega - delta / travelled, 0)
        c, ci = c + (omega * change).sum() / 2, ci + change
        hi, server = hi + delta, server + delta.sum() / 2
        w += delta[here].mean() + server
        history.append((w, c, server, ci, hi))
    return dict(
        zip(["w", "c", "H", "ci", "hi"], map(np.array, zip(*history, strict=True)), strict=True)
    )


def test_published_rounds(on_toy):
    trace = on_toy(30, K10, *FEDDC)
    assert trace.w[1:4] == pytest.approx([0.8866373763, 0.9965757541, 0.8798442081], abs=1e-9)
    assert trace.settled(0.8) == 21
    assert trace.memory("h")[-1] == pytest.approx([-8 / 15, 8 / 15], abs=1e-9)
    assert trace.memory("c")[-1] == pytest.approx([8 / 15, -8 / 15], abs=1e-9)
    assert trace.kept("c")[-1] == pytest.approx(0, abs=1e-12)
    assert trace.kept("H")[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "n", "case"),
    [
        ([K10], (1, 1), {}),
        ([K10], (3, 1), {}),
        ([K10, "clients.per-round=1"], (3, 1), {}),
        (["train.epochs=4", "train.batch-size=1"], (3, 1), {"epochs": 4, "batch": 1}),
        ([K10, "feddc.weighting=uniform"], (3, 1), {"omega": (1, 1)}),
        ([K10, "train.lr-decay=0.8"], (1, 1), {"lr_decay": 0.8}),
        (
            ["train.epochs=4", "train.batch-size=1", "train.lr-decay=0.8",
             "feddc.legacy-beta=true"],
            (3, 1),
            {"epochs": 4, "batch": 1, "lr_decay": 0.8, "legacy": True},
        ),
        # as in the authors' code, all but weight decay is clipped
        (
            [K10, "train.clip-norm=0.6", "train.weight-decay=0.05"],
            (3, 1),
            {"clip": 0.6, "weight_decay": 0.05},
        ),
    ],
    ids=["plain", "omega", "partial", "steps", "uniform", "lr decay", "legacy", "clip"],
)  # fmt: skip
def test_every_round_is_the_algorithm_written_out(on_toy, settings, n, case):
    trace = on_toy(12, *FEDDC, *settings, n=n)
    hand = by_hand(trace.cohorts, n=n, **case)
    np.testing.assert_allclose(trace.w, hand["w"], **EXACT)
    np.testing.assert_allclose(trace.kept("c"), hand["c"], **EXACT)
    np.testing.assert_allclose(trace.kept("H"), hand["H"], **EXACT)
    np.testing.assert_allclose(trace.memory("c"), hand["ci"], **EXACT)
    np.testing.assert_allclose(trace.memory("h"), hand["hi"], **EXACT)


@pytest.mark.parametrize(
    ("settings", "n", "optimum", "rounds"),
    [
        ([], (3, 1), 4 / 7, 20),
        (["clients.per-round=1"], (1, 1), 0.8, 110),
        (["clients.per-round=1"], (3, 1), 4 / 7, 90),
    ],
)
def test_reaches_the_optimum_and_keeps_both_means(on_toy, settings, n, optimum, rounds):
    trace = on_toy(rounds + 5, K10, *FEDDC, *settings, n=n)
    assert trace.settled(optimum) <= rounds
    omega = np.array(n) * 2 / sum(n)
    drifts, controls = trace.memory("h").mean(axis=1), (omega * trace.memory("c")).mean(axis=1)
    np.testing.assert_allclose(trace.kept("H"), drifts, rtol=0, atol=1e-13)
    np.testing.assert_allclose(trace.kept("c"), controls, rtol=0, atol=1e-13)


@pytest.mark.parametrize("settings", [[], ["clients.per-round=1"]])
def test_without_gradient_correction_it_is_feddyn(on_toy, settings):
    ours = on_toy(8, K10, *FEDDC, NO_G, *settings, n=(3, 1))
    feddyn = on_toy(8, K10, "strategy.name=feddyn", "feddyn.alpha=0.5", *settings, n=(3, 1))
    assert np.array_equal(ours.w, feddyn.w)
    assert np.array_equal(ours.kept("H"), feddyn.kept("H"))
    assert np.array_equal(ours.memory("h"), feddyn.memory("h"))
    assert not ours.memory("c").any()


@pytest.mark.parametrize("settings", [[], ["clients.per-round=1"]])
def test_without_drift_and_alpha_it_is_scaffold(on_toy, settings):
    ours = on_toy(8, K10, *NO_ALPHA, NO_DRIFT, *settings, n=(3, 1))
    scaffold = on_toy(8, K10, "strategy.name=scaffold", *settings, n=(3, 1))
    assert np.array_equal(ours.w, scaffold.w)
    assert np.array_equal(ours.kept("c"), scaffold.kept("c"))
    assert np.array_equal(ours.memory("c"), scaffold.memory("c"))
    assert not ours.memory("h").any()


def test_without_all_three_it_is_the_unweighted_mean(on_toy):
    nothing = [*NO_ALPHA, NO_DRIFT, NO_G]
    ours, fedavg = on_toy(5, K10, *nothing), on_toy(5, K10)
    np.testing.assert_allclose(ours.w, fedavg.w, rtol=0, atol=1e-15)
    assert ours.w[1:4] == pytest.approx([0.4969766912, 0.5851217339, 0.6007553616], abs=1e-10)
    unequal = on_toy(5, K10, *nothing, n=(3, 1))
    assert np.array_equal(unequal.w, ours.w)


def test_without_alpha_and_correction_but_with_drift_it_is_not_fedavg(on_toy):
    # The drift enters the server all the same: w = mean theta_i + mean h_i, twice FedAvg's step.
    trace = on_toy(1, K10, *NO_ALPHA, NO_G)
    assert trace.w[1] == pytest.approx(0.9939533824, abs=1e-9)
    assert trace.w[1] == pytest.approx(2 * 0.4969766912, abs=1e-9)


def test_drifts_and_controls_balance_between_clients(on_toy):
    # K eta = 7 * 0.05; c_i+ - c_j+ = (c_i - c_j) - (Delta_i - Delta_j) / (K eta): the sum stays 0.
    trace = on_toy(15, "train.epochs=7", "train.lr=0.05", *FEDDC)
    c, h = (np.diff(trace.memory(name), axis=1)[:, 0] for name in "ch")
    assert np.abs(h[1:]).min() > 0.1
    np.testing.assert_allclose(c + h / (7 * 0.05), 0, rtol=0, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_a_proximal_term_is_too_much_only_where_alpha_pulls(alpha):
    settings = {"strategy.name": "feddc", "regularizers": "proximal", "feddc.alpha": alpha}
    config = resolve(settings)
    told = [line for line in FedDC(config).warnings(config, {}) if "pulls already" in line]
    assert len(told) == (alpha > 0)
