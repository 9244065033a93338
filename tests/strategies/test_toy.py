"""FedAvg and FedProx on the quadratic toy, through the real engine, client and strategy."""

from __future__ import annotations

import numpy as np
import pytest

from tests import toy

K10 = "train.epochs=10"


@pytest.fixture
def w(runner, monkeypatch):
    """The global parameter after some rounds; asked for several n, the data are those of each."""

    def play(rounds: int, *settings: str, n: tuple[int, int] = (1, 1)) -> float:
        from fl_client.app import release

        release()
        toy.install(monkeypatch, n)
        result = runner(f"run.rounds={rounds}", *toy.SETTINGS, *settings)
        assert result.code == 0
        return float(result.model["theta"])

    return play


def test_fedavg_rounds_and_biased_fixed_point(w):
    assert w(1, K10) == pytest.approx(0.4969766912, abs=1e-10)
    assert w(2, K10) == pytest.approx(0.5851217339, abs=1e-10)
    assert w(3, K10) == pytest.approx(0.6007553616, abs=1e-10)
    # sum (1 - r_i) b_i / sum (1 - r_i), where a round shrinks client i's distance by r_i
    r = (1 - toy.LR * toy.A) ** 10
    fixed = np.sum((1 - r) * toy.B) / np.sum(1 - r)
    assert w(60, K10) == pytest.approx(fixed, abs=1e-12)
    assert fixed == pytest.approx(0.6041260077, abs=1e-10)


def test_fedavg_weights_by_samples(w):
    assert w(80, K10, n=(3, 1)) == pytest.approx(0.3371713058, abs=1e-10)


def test_one_local_step_is_a_step_of_weighted_gradient_descent(w):
    p = np.array([0.75, 0.25])
    gradient = np.sum(p * toy.A * (0 - toy.B))
    assert w(1, n=(3, 1)) == pytest.approx(-toy.LR * gradient, abs=1e-15)


def test_fedprox_ten_steps(w):
    assert w(80, K10, "strategy.name=fedprox", "fedprox.mu=1") == pytest.approx(
        0.6416687560, abs=1e-10
    )


def test_fedprox_exact_local_solve(w):
    # argmin f_i + |x - w|^2 / 2 is (a_i b_i + w) / (a_i + 1): w1 = 0.4, w2 = 0.54, 0.589, ... 8/13
    exact = ("train.epochs=150", "strategy.name=fedprox", "fedprox.mu=1")
    assert w(1, *exact) == pytest.approx(0.4, abs=1e-12)
    assert w(2, *exact) == pytest.approx(0.54, abs=1e-12)
    assert w(3, *exact) == pytest.approx(0.589, abs=1e-12)
    assert w(28, *exact) == pytest.approx(8 / 13, abs=1e-12)


def test_first_local_step_of_fedprox_has_no_proximal_gradient(w):
    assert w(1, "strategy.name=fedprox", "fedprox.mu=7") == w(1)


def test_proximal_regularizer_is_fedprox(w):
    strategy = w(3, K10, "strategy.name=fedprox", "fedprox.mu=0.5")
    assert strategy == w(3, K10, "regularizers=proximal", "proximal.mu=0.5")
    assert strategy != w(3, K10)
