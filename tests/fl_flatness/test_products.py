"""Products with the Hessian: exact, and of a model that is left as it was found."""

from __future__ import annotations

import gc

import pytest
import torch
from small_nets import (
    NETS,
    Activated,
    Cube,
    OnceCube,
    Y,
    batch_norm,
    exact_hessian,
    generator,
    group_norm,
    images,
    made,
)
from torch import nn
from torch.nn.functional import cross_entropy

from fl_common.models.catalogue import build
from fl_flatness.layers import activation_norms
from fl_flatness.products import Curvature, cut


@pytest.mark.parametrize("factory", NETS)
@pytest.mark.parametrize("batch_size", [13, 5])
def test_products_are_those_of_the_exact_hessian(factory, batch_size):
    """13 samples as one batch, and as 5 + 5 + 3, which a mean of batch means gets wrong."""
    net, x = made(factory), images()
    h = exact_hessian(net, x, Y)
    curvature = Curvature(net, cut(x, Y, batch_size))
    assert 50 < curvature.d <= 200
    v = torch.randn(4, curvature.d, dtype=torch.float64, generator=generator(3))
    torch.testing.assert_close(curvature.products(v), v @ h, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(curvature.product(v[1]), h @ v[1], rtol=1e-10, atol=1e-13)
    net.eval()
    loss = cross_entropy(net(x), Y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())])
    torch.testing.assert_close(curvature.gradient(), gradient, rtol=1e-10, atol=1e-13)
    assert curvature.loss() == pytest.approx(loss.item(), rel=1e-12)


def test_they_are_symmetric():
    curvature = Curvature(made(group_norm), cut(images(), Y, 5))
    u, v = torch.randn(2, curvature.d, dtype=torch.float64, generator=generator(3))
    left, right = u @ curvature.product(v), v @ curvature.product(u)
    assert float(left) == pytest.approx(float(right), rel=1e-12)


def test_equal_calls_give_equal_bits_in_any_block():
    curvature = Curvature(made(batch_norm), cut(images(), Y, 5))
    v = torch.randn(3, curvature.d, dtype=torch.float64, generator=generator(3))
    found = curvature.products(v)
    assert torch.equal(curvature.products(v), found)
    assert torch.equal(torch.stack([curvature.product(row) for row in v]), found)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found(training):
    """Modes (one module's own), gradients, statistics, flags, generator; no graph stays alive."""
    net, x = made(batch_norm).train(training), images()
    net[1].train(not training)
    net[0].weight.requires_grad_(False)
    net[5].bias.grad = torch.ones(3, dtype=torch.float64)
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    draws = torch.get_rng_state()
    curvature = Curvature(net, cut(x, Y, 5))

    def alive() -> int:
        return sum(type(found) is torch.Tensor for found in gc.get_objects())

    gc.collect()
    before = alive()
    gc.disable()
    try:
        curvature.product(torch.ones(curvature.d))
        curvature.gradient()
        curvature.loss()
        assert alive() == before
    finally:
        gc.enable()
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws)
    assert [p.grad is None for p in net.parameters()] == [True] * 5 + [False]
    assert torch.equal(net[5].bias.grad, torch.ones(3, dtype=torch.float64))
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 5


def test_frozen_parameters_are_left_out():
    net, x = made(), images()
    whole = exact_hessian(net, x, Y)
    first = net[1].weight.numel()
    net[1].weight.requires_grad_(False)
    curvature = Curvature(net, cut(x, Y, 13))
    assert curvature.d == len(whole) - first
    torch.testing.assert_close(
        curvature.products(torch.eye(curvature.d, dtype=torch.float64)), whole[first:, first:]
    )


def test_chosen_parameters_give_their_block():
    net, x = made(), images()
    whole = exact_hessian(net, x, Y)
    block = Curvature(net, cut(x, Y, 5), only=["3.weight"])
    torch.testing.assert_close(
        block.products(torch.eye(15, dtype=torch.float64)), whole[85:100, 85:100]
    )


class Odd(nn.Module):
    """theta^2 + 3 b: `a` is not used, `b` enters linearly, and has no curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.theta = (nn.Parameter(torch.ones(2)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.theta**2 + 3 * self.b).sum()

    def loss(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return output.mean()


def test_unused_and_linear_parameters_have_no_curvature():
    """H = diag(0, 0, 0, 0, 2, 2), and its own loss is used."""
    net, one = Odd(), [(torch.ones(3), torch.zeros(3))]
    assert torch.equal(
        Curvature(net, one).product(torch.arange(1.0, 7)),
        torch.tensor([0, 0, 0, 0, 10.0, 12], dtype=torch.float64),
    )
    assert Curvature(net, one).gradient().tolist() == [0, 0, 3, 3, 2, 2]
    flat = Curvature(net, one, only=["b"])
    assert torch.equal(flat.products(torch.ones(2, 2)), torch.zeros(2, 2, dtype=torch.float64))


def test_an_operation_that_hides_its_curvature_is_named():
    """torch takes its gradient for a constant, without a word."""
    plain, good, bad = (
        Curvature(made(lambda f=f: Activated(f)), cut(images(), Y, 5))
        for f in (lambda x: x**3, Cube.apply, OnceCube.apply)
    )
    v = torch.ones(103, dtype=torch.float64)
    torch.testing.assert_close(good.product(v), plain.product(v), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(bad.gradient(), plain.gradient(), rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match=r"OnceCube.backward is once_differentiable: "):
        bad.product(v)
    with pytest.raises(ValueError, match="once_differentiable"):  # nor a second time
        bad.product(v)
    behind, before = (
        [Curvature(c.net, c.batches, only=[name]) for c in (plain, bad)]
        for name in ("last.weight", "first.weight")
    )
    v = torch.arange(15, dtype=torch.float64)  # no gradient of the last layer passes it
    torch.testing.assert_close(*(c.product(v) for c in behind), rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match=r"OnceCube.backward is once_differentiable: "):
        before[1].product(torch.ones(80, dtype=torch.float64))


def test_float32_networks_are_summed_in_float64():
    """Beside 2^24 a float32 sum loses the curvature 2 of every further batch."""
    net = Odd()
    small, large = (torch.ones(1), torch.zeros(1)), (torch.full((1,), 2.0**24), torch.zeros(1))
    curvature = Curvature(net, [large, small, small], only=["theta"])
    found = curvature.product(torch.ones(2))
    assert found.dtype == torch.float64
    assert (3 * found).round().tolist() == [2 * (2**24 + 2)] * 2
    torch.manual_seed(0)
    net = build("digits-cnn", classes=3, shape=(1, 8, 8))
    x = images(side=8)
    v = torch.randn(Curvature(net, cut(x, Y, 5)).d, generator=generator(3))
    single = Curvature(net, cut(x.float(), Y, 5)).product(v)
    double = Curvature(net.double(), cut(x, Y, 5)).product(v)
    assert float((single - double).norm() / double.norm()) < 1e-5


class Watching(nn.Linear):
    """Notes whether convolutions might use TF32, forwards and backwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), torch.backends.cudnn.allow_tf32]
        output = super().forward(x)
        if output.requires_grad:
            output.register_hook(lambda _: self.seen.append(torch.backends.cudnn.allow_tf32))
        return output


def test_a_gpu_computes_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    net = Watching(2, 3)
    curvature = Curvature(net, cut(torch.ones(13, 2), Y, 13))
    for call, passes in (
        (curvature.loss, 1),
        (curvature.gradient, 2),
        (lambda: curvature.product(torch.ones(9)), 3),
        (lambda: activation_norms(net, curvature.batches), 1),
    ):
        net.seen = []
        call()
        assert net.seen == [False] * passes
        assert torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError, match="shapes"):
        Curvature(net, cut(torch.ones(13, 5), Y, 13)).product(torch.ones(9))
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net, x: Curvature(net, iter(cut(x, Y, 5))), "give a list"),
        (lambda net, x: Curvature(net.requires_grad_(False), cut(x, Y, 5)), "no trainable"),
        (lambda net, x: Curvature(net, cut(x, Y, 5), only=["fc.weight"]), "fc.weight: no"),
        (lambda net, x: Curvature(net, cut(x, Y, 5)).product(torch.ones(3)), r"\(103,\)"),
        (lambda net, x: Curvature(net, []).loss(), "no samples"),
        (lambda net, x: cut(x, Y[:4], 5), "13 samples with 4 labels"),
        (lambda net, x: cut(x, Y, 0), "at least 1"),
        (
            lambda net, x: Curvature(net, cut(x / 0, Y, 5)).product(torch.ones(103)),
            "not finite at these parameters",
        ),
    ],
)
def test_bad_input_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        make(made(), images())
    assert "\n" not in str(raised.value)
