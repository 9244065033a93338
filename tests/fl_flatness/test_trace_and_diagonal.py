"""Estimates of trace and diagonal against exact ones, and the errors that they state."""

from __future__ import annotations

import pytest
import torch
from small_nets import NETS, curvature_of, quadratic, relu_mlp

from fl_flatness.spectrum import Lanczos, eigenpairs
from fl_flatness.trace import diagonal, hutchinson


@pytest.mark.parametrize("factory", NETS)
def test_traces_are_within_three_standard_errors(factory):
    curvature, h = curvature_of(factory)
    lanczos = Lanczos(curvature, 0)
    eigenpairs(lanczos, tolerance=1e-2)
    exact = h.trace().item()
    for found in (
        hutchinson(curvature, probes=200),
        hutchinson(curvature, probes=50, within=lanczos),
    ):
        assert abs(found.value - exact) < 3 * found.error
        assert found.error < 0.2 * h.norm()


def rotated(*values: float) -> tuple[torch.nn.Module, torch.Tensor]:
    """A quadratic whose Hessian has these eigenvalues, in a random basis."""
    d = len(values)
    draws = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    q = torch.linalg.qr(draws).Q
    h = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
    curvature = quadratic(*[0.0] * d)
    net = curvature.net
    net.forward = lambda x: net.theta @ h @ net.theta / 2
    return curvature, h


def test_the_stated_error_is_the_spread_of_the_estimates():
    """Over 60 seeds the root mean square of (estimate - exact) / error is 1, with a standard error
    of about 1 / sqrt(2 * 60) = 0.09 (more, as the errors are estimates too)."""
    curvature, h = rotated(*range(-8, 17))
    lanczos = Lanczos(curvature, 0)
    eigenpairs(lanczos)
    for within in (None, lanczos):
        off = []
        for seed in range(60):
            found = hutchinson(curvature, probes=24, seed=seed, within=within)
            off.append((found.value - h.trace().item()) / found.error)
        assert 0.7 < torch.tensor(off).square().mean().sqrt() < 1.4
        assert abs(sum(off) / 60) < 3 / 60**0.5


def test_a_known_subspace_lowers_the_error_for_the_same_products():
    """The largest eigenvalues are in the basis: what they add to the variance is gone."""
    curvature, _ = curvature_of(relu_mlp)
    lanczos = Lanczos(curvature, 0)
    eigenpairs(lanczos, 3, tolerance=1e-2)
    plain = hutchinson(curvature, probes=24)
    known = hutchinson(curvature, probes=24, within=lanczos)
    assert known.error < 0.7 * plain.error


def test_within_the_whole_space_it_is_exact():
    curvature, h = curvature_of(relu_mlp)
    lanczos = Lanczos(curvature, 0)
    for _ in range(curvature.d):
        lanczos.step()
    found = hutchinson(curvature, probes=2, within=lanczos)
    assert found.value == pytest.approx(h.trace().item(), rel=1e-10)
    assert found.error < 1e-12


@pytest.mark.parametrize("factory", NETS)
def test_diagonals_are_within_three_standard_errors(factory):
    """Of one probe's v_i (H v)_i the variance is sum_{j != i} H_ij^2.  Chance leaves 1 in 370
    entries outside; of about 100, at most two."""
    curvature, h = curvature_of(factory)
    off = diagonal(curvature, probes=400).mean(0) - h.diagonal()
    error = ((h.square().sum(1) - h.diagonal().square()).clamp_min(0) / 400).sqrt()
    assert (off.abs() > 3 * error + 1e-13).sum() <= 2
    assert 0.8 < (off / error)[error > 1e-9].std() < 1.2


def test_the_error_of_two_probes_is_half_their_distance():
    """Their standard deviation, by n - 1, is the distance over the root of 2."""
    curvature, _ = rotated(*[4.0, -2.0, 1.0] * 5)
    one, other = diagonal(curvature, probes=2).sum(1).tolist()  # v^T H v of the same probes
    assert hutchinson(curvature, probes=2).error == pytest.approx(abs(one - other) / 2)


def test_the_halves_give_the_squared_norm_without_bias():
    """E ||D||^2 of 10 probes = ||diag H||^2 + sum_{i != j} H_ij^2 / 10; the halves' product has no
    such term.  Means of 200 estimates."""
    curvature, h = rotated(*[4.0, -2.0, 1.0] * 5)
    exact = h.diagonal().square().sum()
    bias = (h.square().sum() - exact) / 10
    found = [diagonal(curvature, probes=10, seed=seed) for seed in range(200)]
    squares = torch.stack([d.mean(0).square().sum() for d in found])
    products = torch.stack([d[0] @ d[1] for d in found])
    for estimates, expected in ((squares, exact + bias), (products, exact)):
        error = estimates.std() / 200**0.5
        assert abs(estimates.mean() - expected) < 3 * error
        assert error < 0.1 * bias


def test_equal_seeds_give_equal_bits_and_others_do_not():
    curvature, _ = curvature_of(relu_mlp)
    for estimate in (
        lambda seed: hutchinson(curvature, probes=11, seed=seed).value,
        lambda seed: float(diagonal(curvature, probes=12, seed=seed).mean(0)[0]),
    ):
        assert estimate(0) == estimate(0) != estimate(1)


def test_too_few_probes_are_refused():
    curvature = quadratic(1, 2)
    with pytest.raises(ValueError, match=r"1 probes: .* needs 2"):
        hutchinson(curvature, probes=1)
    with pytest.raises(ValueError, match=r"3 probes: .* even number"):
        diagonal(curvature, probes=3)
