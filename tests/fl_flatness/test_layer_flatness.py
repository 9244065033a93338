"""Layer by layer: the blocks of the Hessian, and the activations beside them."""

from __future__ import annotations

import pytest
import torch
from small_nets import Y, batch_norm, exact_hessian, generator, images, made
from torch import nn
from torch.nn.functional import cross_entropy

from fl_common.models.catalogue import build
from fl_flatness.layers import activation_norms, layers
from fl_flatness.products import cut


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))


def curvatures_of_output(net: nn.Sequential, first: int, x: torch.Tensor, y: torch.Tensor):
    """lambda_max(G_i) of every sample i, G = d2 loss / dz2 at the output z of module `first`."""
    z = net[: first + 1](x).detach()
    rest = net[first + 1 :]
    return torch.stack(
        [
            torch.linalg.eigvalsh(
                torch.func.hessian(lambda v, y=label: cross_entropy(rest(v)[None], y[None]))(row)
            )[-1]
            for row, label in zip(z, y, strict=True)
        ]
    )


def test_curvature_of_one_sample_is_the_norm_of_the_input():
    """lambda_max(H_W) = ||a||^2 lambda_max(G), for both layers: what follows is piecewise linear
    up to the loss.  The trace is ||a||^2 tr G alike."""
    net, x, y = made(two_layers), images(1), Y[:1]
    rows = layers(net, cut(x, y, 1), tolerance=1e-8)
    assert [(row.layer, row.kind, row.parameter) for row in rows] == [
        ("1", "Linear", "weight"),
        ("3", "Linear", "weight"),
    ]
    for row, first in zip(rows, (1, 3), strict=True):
        top = curvatures_of_output(net, first, x, y).item()
        assert row.lambda_max == pytest.approx(row.input_per_sample * top, rel=1e-6)
    assert rows[0].input_per_sample == pytest.approx(x.square().sum().item())
    hidden = net[:3](x)
    assert rows[1].input_per_sample == pytest.approx(hidden.square().sum().item())


def test_a_batch_is_bounded_by_the_mean_norm_of_its_inputs():
    """lambda_max(H_W) <= max lambda_max(G_i) lambda_max(A^T A / B) <= max ... ||A||_F^2 / B."""
    net, x = made(two_layers), images()
    for row, first in zip(layers(net, cut(x, Y, 5)), (1, 3), strict=True):
        a = net[:first](x).flatten(1)
        largest = curvatures_of_output(net, first, x, Y).max().item()
        gram = torch.linalg.eigvalsh(a.T @ a / 13)[-1].item()
        assert row.lambda_max < largest * gram < largest * row.input_per_sample


def test_blocks_are_those_of_the_exact_hessian():
    """Convolution, BatchNorm and linear layer, without biases."""
    net, x = made(batch_norm), images()
    whole = exact_hessian(net, x, Y)
    blocks = {"0": slice(0, 36), "1": slice(40, 44), "5": slice(48, 96)}
    rows = layers(net, cut(x, Y, 5), tolerance=1e-6, steps=200, probes=60)
    assert [row.layer for row in rows] == list(blocks)
    for row in rows:
        exact = whole[blocks[row.layer], blocks[row.layer]]
        top = torch.linalg.eigvalsh(exact)[-1].item()
        assert row.lambda_max == pytest.approx(top, rel=1e-6)
        assert row.lambda_max_residual <= 1e-6
        assert abs(row.trace - exact.trace().item()) <= 3 * row.trace_error + 1e-9


@pytest.mark.parametrize("inplace", [False, True])
def test_activation_norms(inplace):
    """Input of each layer, and output of the ReLU that follows; none follows the last."""
    net, x = made(batch_norm), images()
    net[2].inplace = inplace
    found = activation_norms(net, cut(x, Y, 5))
    net.eval()
    with torch.no_grad():
        z, normed = net[0](x), net[:2](x)
    relu = normed.relu().square()
    for name, entered, left in (("0", x, relu), ("1", z, relu), ("5", normed.relu(), None)):
        inputs, outputs = found[name]
        squares = entered.square()
        assert inputs.per_sample() == pytest.approx(squares.sum().item() / 13)
        assert inputs.per_element() == pytest.approx(squares.mean().item())
        if left is None:
            assert outputs.per_sample() is outputs.per_element() is None
        else:
            assert outputs.per_sample() == pytest.approx(left.sum().item() / 13)
            assert outputs.per_element() == pytest.approx(left.mean().item())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_layer_that_is_called_twice_counts_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu, self.idle = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.fc(self.relu(self.fc(x))))

    net = made(Twice)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator())
    once = net.fc(x).relu()
    twice = net.fc(once).relu()
    found = activation_norms(net, cut(x, torch.zeros(6), 4))
    expected = (x.square().sum() + once.square().sum()).item()
    assert found["fc"][0].per_sample() == pytest.approx(expected / 6)
    assert found["fc"][0].per_element() == pytest.approx(expected / 48)
    expected = (once.square().sum() + twice.square().sum()).item()
    assert found["fc"][1].per_sample() == pytest.approx(expected / 6)
    assert found["idle"][0].per_sample() is None


def test_residual_networks_are_seen_and_frozen_layers_are_not():
    """A block's last convolution, norm and shortcut all feed its ReLU after the sum."""
    torch.manual_seed(0)
    net = build("resnet8", classes=3, shape=(3, 32, 32))
    x = torch.randn(2, 3, 32, 32, generator=generator())
    found = activation_norms(net, cut(x, Y[:2], 2))
    block = "stages.1.0."
    outputs = {name: found[block + name][1].per_sample() for name in ("conv2", "shortcut.conv")}
    assert len(found) == 19
    assert outputs["conv2"] == outputs["shortcut.conv"]
    assert found["fc"][1].per_sample() is None

    net = made(two_layers)
    net[1].weight.requires_grad_(False)
    rows = layers(net, cut(images(), Y, 5))
    assert [(row.layer, row.parameter) for row in rows] == [("1", "bias"), ("3", "weight")]
    net[1].bias.requires_grad_(False)
    assert [row.layer for row in layers(net, cut(images(), Y, 5))] == ["3"]


def test_ids_of_words_have_no_norm():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    norms = activation_norms(net, [(torch.tensor([[1, 4], [2, 0]]), Y[:2])])
    assert norms["0"][0].per_sample() is None
    assert norms["2"][0].per_sample() > 0
