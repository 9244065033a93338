"""Eigenvalues against exact ones, their residuals, and the density."""

from __future__ import annotations

import pytest
import torch
from small_nets import NETS, curvature_of, quadratic, relu_mlp

from fl_common.determinism import seed_of
from fl_flatness.products import Curvature
from fl_flatness.spectrum import Lanczos, density, eigenpairs


@pytest.mark.parametrize("factory", NETS)
def test_largest_and_smallest_eigenvalues_of_small_networks(factory):
    """The five largest, and in the whole space the smallest one, to a relative 1e-5 of the exact
    Hessian's."""
    curvature, h = curvature_of(factory)
    exact, vectors = torch.linalg.eigh(h)
    lanczos = Lanczos(curvature, 0)
    found = eigenpairs(lanczos, 5, tolerance=1e-5)
    assert found.converged
    torch.testing.assert_close(found.values, exact[-5:].flip(0), rtol=1e-5, atol=0)
    overlap = (found.vectors * vectors.T[-5:].flip(0)).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-6)
    whole = eigenpairs(lanczos, tolerance=0, steps=curvature.d)
    assert whole.lowest == pytest.approx(exact[0].item(), rel=1e-5)
    assert whole.lowest_residual <= 1e-5
    low = lowest_vector(lanczos)
    assert float((h @ low - exact[0] * low).norm()) < 1e-5


def lowest_vector(lanczos: Lanczos) -> torch.Tensor:
    """Of the smallest Ritz value, (d,)."""
    return lanczos.vector(lanczos.ritz()[1][:, 0])


@pytest.mark.parametrize("steps", [4, 7, 12])
def test_the_stated_residual_is_the_true_one(steps):
    """Long before convergence, where it is large."""
    curvature, h = curvature_of(relu_mlp)
    lanczos = Lanczos(curvature, 0)
    found = eigenpairs(lanczos, 3, tolerance=1e-12, steps=steps)
    assert not found.converged
    off = found.vectors @ h - found.values[:, None] * found.vectors
    torch.testing.assert_close(
        found.residuals, off.norm(dim=1) / found.values.abs(), rtol=1e-6, atol=1e-10
    )
    off = h @ lowest_vector(lanczos) - found.lowest * lowest_vector(lanczos)
    assert found.lowest_residual == pytest.approx(float(off.norm()) / abs(found.lowest), rel=1e-6)


def test_a_loose_tolerance_takes_fewer_products_and_is_kept():
    curvature, h = curvature_of(relu_mlp)
    exact = torch.linalg.eigvalsh(h)[-1].item()
    products = []
    for tolerance in (1e-1, 1e-2, 1e-4):
        lanczos = Lanczos(curvature, 0)
        found = eigenpairs(lanczos, tolerance=tolerance)
        assert found.residuals[0] <= tolerance
        assert found.values[0].item() == pytest.approx(exact, rel=tolerance)
        products.append(len(lanczos.basis))
    assert products[0] < products[1] < products[2]


def test_the_smallest_is_not_waited_for():
    """It is an upper bound, as near to an eigenvalue as its residual says."""
    curvature, h = curvature_of(relu_mlp)
    found, exact = eigenpairs(Lanczos(curvature, 0), tolerance=1e-3), torch.linalg.eigvalsh(h)
    assert found.lowest_residual > 1e-3
    assert exact[0] <= found.lowest
    assert (exact - found.lowest).abs().min() <= found.lowest_residual * abs(found.lowest)


def test_where_the_largest_absolute_value_is_negative():
    """diag(2, 1, -5): lambda_max is 2, which the power method does not see for the -5."""
    found = eigenpairs(Lanczos(quadratic(2, 1, -5), 0), 2, tolerance=1e-10)
    torch.testing.assert_close(found.values, torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert found.lowest == pytest.approx(-5)
    # All of them negative: the largest is the one nearest 0.
    found = eigenpairs(Lanczos(quadratic(-2, -1, -5), 0), tolerance=1e-10)
    assert found.values[0].item() == pytest.approx(-1)


def test_equal_eigenvalues_are_all_found_in_the_whole_space():
    """One start vector leads to one vector of each eigenvalue: a fresh one must follow."""
    found = eigenpairs(Lanczos(quadratic(2, 2, 2, -1, 0), 0), 5)
    torch.testing.assert_close(
        found.values, torch.tensor([2.0, 2, 2, 0, -1], dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert found.converged
    gram = found.vectors @ found.vectors.T
    torch.testing.assert_close(gram, torch.eye(5, dtype=torch.float64))


def test_two_distinct_eigenvalues_take_two_products():
    """Rounding leaves a remainder of about 1e-16, which is no direction."""
    lanczos = Lanczos(quadratic(3, 3, 3, 1, 1), 0)
    lanczos.step()
    assert not lanczos.exhausted
    lanczos.step()
    assert lanczos.exhausted
    torch.testing.assert_close(lanczos.ritz()[0], torch.tensor([1.0, 3.0], dtype=torch.float64))


def test_without_curvature_all_is_zero():
    found = eigenpairs(Lanczos(quadratic(0, 0, 0), 0))
    assert (found.values.item(), found.residuals.item(), found.lowest) == (0, 0, 0)
    assert found.converged


def test_equal_seeds_give_equal_bits_and_a_second_call_changes_nothing():
    curvature, _ = curvature_of(relu_mlp)
    first, second = (eigenpairs(Lanczos(curvature, 3), tolerance=1e-6) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    other = eigenpairs(Lanczos(curvature, 4), tolerance=1e-6)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values, rtol=1e-6, atol=0)


def test_float32_networks():
    curvature, h = curvature_of(relu_mlp)
    batches = [(x.float(), y) for x, y in curvature.batches]
    lanczos = Lanczos(Curvature(curvature.net.float(), batches), 0)
    found = eigenpairs(lanczos, 3, tolerance=1e-3)
    assert found.converged
    assert lanczos.basis[0].dtype == torch.float32
    exact = torch.linalg.eigvalsh(h)[-3:].flip(0)
    torch.testing.assert_close(found.values, exact, rtol=1e-4, atol=0)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="4 eigenvalues: from 1 to 3"):
        eigenpairs(Lanczos(quadratic(1, 2, 3), 0), 4)
    with pytest.raises(ValueError, match=r"3 eigenvalues: from 1 to 2, .*2 steps"):
        eigenpairs(Lanczos(quadratic(1, 2, 3), 0), 3, steps=2)
    with pytest.raises(ValueError, match="at least 1 of each"):
        density(quadratic(1, 2), probes=0)


def test_density_of_three_eigenvalues():
    """The nodes are 2, 1 and -5; the squared parts of a random unit vector of 3 dimensions have
    mean 1/3 and variance 4/45, so a mean of 100 has the standard error 0.0298."""
    seen = density(quadratic(2, 1, -5), probes=100)
    exact = torch.tensor([-5.0, 1, 2], dtype=torch.float64).repeat_interleave(100)
    torch.testing.assert_close(seen.nodes, exact, rtol=0, atol=1e-9)
    masses = seen.weights.view(3, 100).sum(1)
    assert masses.sum().item() == pytest.approx(1)
    assert (masses - 1 / 3).abs().max() < 3 * 0.0298


def test_density_of_a_network():
    """A start vector v and m steps integrate v^T H^p v exactly up to p = 2 m - 1."""
    curvature, h = curvature_of(relu_mlp)
    seen = density(curvature, probes=1, steps=4)
    lanczos = Lanczos(curvature, seed_of("flatness-density", 0, 0))
    lanczos.step()
    v = power = lanczos.basis[0]
    for degree in range(9):
        moment, exact = (seen.weights @ seen.nodes**degree).item(), (v @ power).item()
        assert (moment == pytest.approx(exact, rel=1e-9)) == (degree < 8)
        power = h @ power
    again = density(curvature, probes=1, steps=4)
    assert torch.equal(seen.weights, again.weights)
