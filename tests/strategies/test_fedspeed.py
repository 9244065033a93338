"""FedSpeed on the quadratic toy: FedDyn with perturbed gradients."""

from __future__ import annotations

import numpy as np
import pytest

from tests.strategies.test_feddyn import by_hand

FEDSPEED = ["strategy.name=fedspeed", "fedspeed.lambda=0.5"]
FEDDYN = ["strategy.name=feddyn", "feddyn.alpha=0.5"]
K10 = "train.epochs=10"
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("off", ["fedspeed.rho=0", "fedspeed.alpha=0"])
@pytest.mark.parametrize("settings", [[], ["clients.per-round=1", "train.clip-norm=0.6"]])
def test_without_perturbation_it_is_feddyn_bit_for_bit(on_toy, off, settings):
    ours = on_toy(6, K10, *FEDSPEED, off, *settings, n=(3, 1))
    feddyn = on_toy(6, K10, *FEDDYN, *settings, n=(3, 1))
    assert np.array_equal(ours.w, feddyn.w)
    assert np.array_equal(ours.memory("h"), feddyn.memory("h"))
    assert np.array_equal(ours.kept("H"), feddyn.kept("H"))


def test_published_rounds_without_perturbation(on_toy):
    trace = on_toy(3, K10, *FEDSPEED, "fedspeed.rho=0")
    assert trace.w[1:] == pytest.approx([0.8866373763, 0.8574810934, 0.7603870474], abs=1e-9)


@pytest.mark.parametrize("rho", [0.1, 0.05])
def test_reaches_the_perturbed_balance(on_toy, rho):
    # One parameter: SAM's ascent is rho to either side.  The gradients (w + rho) and
    # 4 (w - rho - 1) have mean zero at 0.8 + 0.6 rho.
    trace = on_toy(76, K10, *FEDSPEED, f"fedspeed.rho={rho}")
    assert trace.settled(0.8 + 0.6 * rho) <= 72
    np.testing.assert_allclose(trace.kept("H"), trace.memory("h").mean(axis=1), rtol=0, atol=1e-14)


def ascending(rho: float, share: float = 1.0):
    """The gradient of a step: partly at theta, partly rho further up."""

    def pass_(gradient, theta: float) -> float:
        first = gradient(theta)
        second = gradient(theta + rho * first / (abs(first) + 1e-12))
        return (1 - share) * first + share * second

    return pass_


@pytest.mark.parametrize(
    ("settings", "case"),
    [
        ([], {"pass_": ascending(0.1)}),
        (["fedspeed.rho=0.3", "fedspeed.alpha=0.6"], {"pass_": ascending(0.3, 0.6)}),
        (["clients.per-round=1"], {"pass_": ascending(0.1)}),
        (["fedspeed.weighting=uniform"], {"pass_": ascending(0.1), "omega": (1, 1)}),
        (
            ["train.clip-norm=0.6", "train.weight-decay=0.05"],
            {"pass_": ascending(0.1), "clip": 0.6, "decay": 0.05},
        ),
        (
            ["train.clip-norm=0.6", "train.weight-decay=0.05", "fedspeed.clip-scope=official"],
            {"pass_": ascending(0.1), "clip": 0.6, "decay": 0.05, "official": True},
        ),
    ],
    ids=["plain", "mixed", "partial", "uniform", "clip all", "clip official"],
)
def test_every_round_is_the_algorithm_written_out(on_toy, settings, case):
    trace = on_toy(12, K10, *FEDSPEED, *settings, n=(3, 1))
    w, server, own = by_hand(trace.cohorts, **{"omega": (1.5, 0.5), **case})
    np.testing.assert_allclose(trace.w, w, **EXACT)
    np.testing.assert_allclose(trace.kept("H"), server, **EXACT)
    np.testing.assert_allclose(trace.memory("h"), own, **EXACT)


def test_feddyn_with_sam_is_fedspeed(on_toy):
    ours = on_toy(6, K10, *FEDSPEED, "fedspeed.rho=0.2", n=(3, 1))
    pair = on_toy(6, K10, *FEDDYN, "regularizers=sam", "sam.rho=0.2", n=(3, 1))
    assert np.array_equal(ours.w, pair.w)
    assert np.array_equal(ours.memory("h"), pair.memory("h"))
