"""FedNova: clients that take unequal numbers of steps, through the real engine and alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fl_common import assembly
from fl_common.config import ConfigError, resolve
from strategies.fednova import FedNova, effective_steps
from tests import toy

FEDNOVA = "strategy.name=fednova"
# one sample a step: K_i = n_i
EACH = ["train.batch-size=1", "train.epochs=1"]


def fixed_point(trace) -> float:
    """Of w <- p w + q, which a round is on quadratics; with w_0 = 0 two rounds give p and q."""
    _, first, second = trace.w
    return first / (1 - (second - first) / first)


def ends(steps: tuple[int, ...], lr: float) -> np.ndarray:
    """1 - r_i, how much of its distance to its own minimum client i makes in a round."""
    return 1 - (1 - lr * toy.A) ** np.array(steps)


@pytest.fixture
def four_to_one(traced, monkeypatch):
    """Client f_1 four times with 2 samples, f_2 once with 8: both have half of the samples, and
    K = 2 and 8."""
    toy.install(monkeypatch, (8, 8))
    parts = list(np.split(np.arange(16), [2, 4, 6, 8]))
    monkeypatch.setattr(assembly, "split_data", lambda config, data: parts)

    def play(*settings: str):
        return traced(5, *toy.SETTINGS, *EACH, "run.rounds=2", "train.lr=0.01", *settings)

    return play


def test_published_fixed_points(four_to_one):
    # FedAvg: sum p_i (1 - r_i) (b_i - w) = 0.  FedNova: the same with (1 - r_i) / K_i.
    share = ends((2, 8), 0.01)
    assert fixed_point(four_to_one()) == pytest.approx(share[1] / share.sum(), abs=1e-10)
    assert fixed_point(four_to_one()) == pytest.approx(0.9333356607, abs=1e-9)
    share /= 2, 8
    assert fixed_point(four_to_one(FEDNOVA)) == pytest.approx(share[1] / share.sum(), abs=1e-10)
    assert fixed_point(four_to_one(FEDNOVA)) == pytest.approx(0.7777842426, abs=1e-9)


def test_the_samples_of_all_clients_are_not_those_of_a_cohort(traced, monkeypatch):
    """Every strategy may ask what a client's work was, before a round's last reply and after it."""
    known = []
    step = FedNova.step

    def stepped(self):
        known.append(self.samples)
        return step(self)

    monkeypatch.setattr(FedNova, "step", stepped)
    toy.install(monkeypatch, (3, 1))
    traced(2, *toy.SETTINGS, FEDNOVA, "clients.per-round=1", "run.rounds=2")
    assert known == [4, 4]


def test_directions_are_weighted_by_samples(on_toy):
    # n = K = (2, 8): p_i / K_i is the same for both, and FedNova goes where the unweighted mean
    # would; the length of a step is tau_eff = 0.2 * 2 + 0.8 * 8.
    trace = on_toy(2, *EACH, FEDNOVA, n=(2, 8))
    share = ends((2, 8), toy.LR) / 10
    assert fixed_point(trace) == pytest.approx(share[1] / share.sum(), abs=1e-12)
    assert trace.w[1] == pytest.approx((0.2 * 2 + 0.8 * 8) * share[1], abs=1e-12)


@pytest.mark.parametrize("momentum", [[], ["train.momentum=0.9"]])
def test_equal_steps_are_fedavg(on_toy, momentum):
    settings = ["train.epochs=10", *momentum]
    fednova = on_toy(6, FEDNOVA, *settings, n=(3, 1))
    np.testing.assert_allclose(fednova.w, on_toy(6, *settings, n=(3, 1)).w, rtol=0, atol=1e-14)


def test_one_client_alone_is_where_the_round_ends(on_toy):
    settings = [*EACH, "clients.per-round=1"]
    fednova = on_toy(6, FEDNOVA, *settings, n=(2, 8))
    np.testing.assert_allclose(fednova.w, on_toy(6, *settings, n=(2, 8)).w, rtol=0, atol=1e-14)


class Slope(toy.Quadratic):
    """The loss a theta: its gradient is a, wherever theta is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] * self.theta


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_constant_gradients(on_toy, monkeypatch, momentum, mu):
    """Delta_i / a_i is -eta g_i, however many steps were taken: w moves by the weighted mean
    gradient, tau_eff eta times."""
    install = toy.install

    def with_slopes(patch, n):
        install(patch, n)
        patch.setattr(assembly, "new_model", lambda *_: Slope())

    monkeypatch.setattr(toy, "install", with_slopes)
    pulled = ["regularizers=proximal", f"proximal.mu={mu}"] if mu else []
    decay = 0.5  # eta mu is that of the round
    settings = [*EACH, FEDNOVA, f"train.momentum={momentum}", f"train.lr-decay={decay}", *pulled]
    trace = on_toy(3, *settings, n=(3, 7))
    p = np.array([0.3, 0.7])
    for lr, step in zip(toy.LR * decay ** np.arange(3), np.diff(trace.w), strict=True):
        a = [summed_weights(3, momentum, lr * mu), summed_weights(7, momentum, lr * mu)]
        assert step == pytest.approx(-lr * np.sum(p * a) * np.sum(p * toy.A), abs=1e-12)


def summed_weights(steps: int, momentum: float, pull: float = 0.0) -> float:
    """What all gradients together weigh in Delta_i / -eta: from the powers of the matrix that takes
    (velocity, way) over a step of gradient 1."""
    step = np.array([[momentum, -pull], [momentum, 1 - pull]])
    powers = (np.linalg.matrix_power(step, k) for k in range(steps))
    return float((sum(powers) @ np.ones(2))[1])


@pytest.mark.parametrize(
    ("steps", "momentum"), list(itertools.product([1, 2, 7, 100], [0.0, 0.1, 0.9, 0.99]))
)
def test_a_is_the_sum_of_the_weights_of_all_gradients(steps, momentum):
    """Gradient k = 1 ... K counts (1 - rho^(K - k + 1)) / (1 - rho)."""
    powers = momentum ** np.arange(1, steps + 1)
    expected = np.sum((1 - powers) / (1 - momentum))
    assert effective_steps(steps, momentum) == pytest.approx(expected, rel=1e-12)
    assert summed_weights(steps, momentum) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_of_a_proximal_term(steps):
    """(1 - (1 - eta mu)^K) / (eta mu), as published."""
    expected = (1 - 0.8**steps) / 0.2
    assert effective_steps(steps, 0.0, pull=0.2) == pytest.approx(expected, rel=1e-12)
    assert effective_steps(steps, 0.9, 0.2) == pytest.approx(
        summed_weights(steps, 0.9, 0.2), rel=1e-12
    )


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_a_pull_that_brings_clients_back_is_refused(momentum):
    """At the bound all clients are still a step away or more."""
    assert min(effective_steps(k, momentum, 1 - momentum) for k in range(1, 500)) > 0.999
    chosen = {"strategy.name": "fednova", "regularizers": "proximal", "train.momentum": momentum}
    resolve({**chosen, "proximal.mu": (1 - momentum) / 0.1 - 1e-9, "train.lr": 0.1})
    with pytest.raises(ConfigError, match=r"^proximal.mu = .*fednova.*at most 1.*lower it$"):
        resolve({**chosen, "proximal.mu": (1 - momentum) / 0.1 + 0.1, "train.lr": 0.1})


def test_plain_sgd_counts_its_steps():
    assert effective_steps(8, 0.0) == 8


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("pull", [0.0, 1e-6, 0.2])
def test_many_steps_are_the_same_sum(monkeypatch, momentum: float, pull: float):
    one_by_one = effective_steps(3000, momentum, pull)
    monkeypatch.setattr("strategies.fednova.MANY", 2999)
    assert effective_steps(3000, momentum, pull) == pytest.approx(one_by_one, rel=1e-9)


def test_a_client_that_says_that_it_took_ages_takes_none():
    assert effective_steps(10**15, 0.0) == 10**15
    assert effective_steps(10**15, 0.9) == pytest.approx(10**16, rel=1e-9)
    assert effective_steps(10**15, 0.0, pull=0.2) == pytest.approx(5, rel=1e-9)
