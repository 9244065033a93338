"""PyHessian as the engine: the same numbers, and none of its traps."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from small_nets import (
    NETS,
    Activated,
    Cube,
    OnceCube,
    Y,
    batch_norm,
    curvature_of,
    exact_hessian,
    images,
    made,
    quadratic,
    relu_mlp,
)
from torch import nn

from fl_common.determinism import seed_of
from fl_flatness.measure import Settings, measure
from fl_flatness.products import Curvature, cut
from fl_flatness.spectrum import Lanczos, eigenpairs

pytest.importorskip("pyhessian")
from fl_flatness.pyhessian_engine import PyHessian


@pytest.mark.parametrize("factory", NETS)
def test_both_engines_agree_on_eigenvalues(factory):
    """PyHessian divides by ||v|| + 1e-6, and draws its first vector in float32."""
    curvature, _ = curvature_of(factory, batch_size=13)
    own = eigenpairs(Lanczos(curvature, 0), 2, tolerance=1e-6)
    theirs = PyHessian(curvature, 0)
    values, vectors = theirs.eigenvalues(2, tolerance=1e-4, steps=2000)
    torch.testing.assert_close(values, own.values, rtol=2e-5, atol=0)
    overlap = (vectors * own.vectors).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-4)


def test_both_engines_agree_on_the_trace():
    curvature, h = curvature_of(relu_mlp)
    found = PyHessian(curvature, 0).trace(probes=200)
    assert abs(found.value - h.trace().item()) < 3 * found.error
    assert found.error < 0.2 * h.norm()


def test_a_negative_trace_does_not_stop_it():
    """PyHessian alone stops at its second probe there.  On a diagonal every probe is exact."""
    found = PyHessian(quadratic(2, 1, -5), 0).trace(probes=20)
    assert (found.value, found.error) == (pytest.approx(-2), pytest.approx(0, abs=1e-12))
    negative, h = curvature_of(relu_mlp)
    inner = negative.net
    own = nn.functional.cross_entropy
    inner.loss = lambda output, y: -own(output, y)
    found = PyHessian(negative, 0).trace(probes=100)
    assert found.error < 0.3 * h.norm()
    assert abs(found.value + h.trace().item()) < 3 * found.error


def test_an_operation_that_hides_its_curvature_is_named():
    plain, good, bad = (
        PyHessian(Curvature(made(lambda f=f: Activated(f)), cut(images(), Y, 5)), 0)
        for f in (lambda x: x**3, Cube.apply, OnceCube.apply)
    )
    assert good.trace(probes=3).value == pytest.approx(plain.trace(probes=3).value)
    with pytest.raises(ValueError, match=r"OnceCube.backward is once_differentiable: "):
        bad.trace(probes=3)


def test_the_largest_by_algebraic_value():
    """PyHessian's first of diag(2, 1, -5) is -5."""
    theirs = PyHessian(quadratic(2, 1, -5), 0)
    values, _ = theirs.eigenvalues(2, tolerance=1e-5, steps=1000)
    assert values.tolist() == pytest.approx([2, 1], rel=1e-4)


def test_without_curvature_all_is_zero():
    """The network is sure of its only sample to the last bit; PyHessian's vectors are then 0."""
    net, x, y = made(relu_mlp), images(1), torch.tensor([0])
    with torch.no_grad():
        net[3].bias[0] = 1e3
    found = measure(net, x, y, Settings(engine="pyhessian", top=2), seed=0)
    assert found["eigenvalues"] == found["eigenvalue_residuals"] == [0, 0]
    assert (found["lambda_max"], found["trace"]) == (0, 0)
    assert found["converged"]


def test_density_works_again():
    """Its start vector of signs v and m steps integrate v^T H^p v up to p = 2 m - 1, in float32."""
    curvature, h = curvature_of(relu_mlp)
    seen = PyHessian(curvature, 0).density(probes=1, steps=4)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("pyhessian-density", 0))
        drawn = [torch.randint_like(p, high=2).flatten() for p in curvature.params]
    v = power = torch.cat(drawn).double() * 2 - 1
    for degree in range(8):
        moment = (seen.weights @ seen.nodes**degree).item()
        assert moment == pytest.approx((v @ power / len(v)).item(), rel=1e-4)
        power = h @ power
    few = PyHessian(quadratic(2, 1, -5), 0).density(probes=1, steps=30)
    torch.testing.assert_close(
        few.nodes, torch.tensor([-5.0, 1, 2], dtype=torch.float64), rtol=0, atol=1e-4
    )


def test_the_model_is_left_as_found_and_a_second_call_gives_the_same():
    """PyHessian alone doubles its eigenvalues, and leaves gradients and evaluation mode behind."""
    net, x = made(batch_norm).train(), images()
    net[5].bias.grad = torch.ones(3, dtype=torch.float64)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    draws = torch.get_rng_state()
    settings = Settings(
        engine="pyhessian", batch_size=13, tolerance=1e-3, steps=2000, density_probes=1,
        density_steps=4,
    )  # fmt: skip
    first, second = (json.dumps(measure(net, x, Y, settings, seed=0)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert [p.grad is None for p in net.parameters()] == [True] * 5 + [False]
    own = measure(net, x, Y, Settings(tolerance=1e-6, batch_size=13), seed=0)
    found = json.loads(first)
    assert found["converged"]
    assert found["lambda_max"] == pytest.approx(own["lambda_max"], rel=1e-4)


def test_its_copies_are_freed(monkeypatch):
    """Parameters whose gradients keep graphs live in a cycle that no collector sees."""
    made_ones = []
    curvature, _ = curvature_of(relu_mlp)
    theirs = PyHessian(curvature, 0)
    original = theirs.module.hessian

    def seen(net, *args, **kwargs):
        made_ones.extend(weakref.ref(p) for p in net.parameters())
        return original(net, *args, **kwargs)

    monkeypatch.setattr(theirs.module, "hessian", seen)
    theirs.eigenvalues(steps=3)
    theirs.trace(probes=3)
    gc.collect()
    assert len(made_ones) == 8
    assert not any(ref() is not None for ref in made_ones)


def test_unused_and_frozen_parameters():
    """An unused one makes PyHessian raise; it has no curvature, and a frozen one no entry."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.net = nn.Linear(2, 2), relu_mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    net, x = made(Odd), images()
    net.net[1].weight.requires_grad_(False)
    exact = torch.linalg.eigvalsh(exact_hessian(net, x, Y))
    curvature = Curvature(net, cut(x, Y, 5))
    values, vectors = PyHessian(curvature, 0).eigenvalues(tolerance=1e-5, steps=1000)
    assert values[0].item() == pytest.approx(exact[-1].item(), rel=2e-5)
    assert vectors.shape == (1, 6 + 5 + 18)
    assert vectors[0, :6].abs().max() < 1e-6


def test_a_gpu_computes_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen, curvature = [], curvature_of(relu_mlp)[0]
    curvature.net.loss = lambda output, y: (
        seen.append(torch.backends.cudnn.allow_tf32) or nn.functional.cross_entropy(output, y)
    )
    PyHessian(curvature, 0).trace(probes=2)
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32
