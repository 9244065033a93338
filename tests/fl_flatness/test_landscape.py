"""Losses along directions, and the model that is put back."""

from __future__ import annotations

import pytest
import torch
from small_nets import Y, batch_norm, images, made, quadratic
from torch.nn.functional import cross_entropy

from fl_flatness.landscape import filter_normalised, line, plane
from fl_flatness.products import Curvature, cut


def unit(d: int, i: int) -> torch.Tensor:
    return torch.eye(d, dtype=torch.float64)[i]


def test_a_quadratic_along_its_axes():
    """theta = (1, 1, 1): (2 (1 + a)^2 + 1 - 5 (1 + b)^2) / 2; rows are b, columns a."""
    curvature = quadratic(2, 1, -5)
    a, b = [-1.0, 0.0, 0.5], [0.0, 2.0]
    found = plane(curvature, unit(3, 0), unit(3, 2), a, b)
    expected = [[(2 * (1 + i) ** 2 + 1 - 5 * (1 + j) ** 2) / 2 for i in a] for j in b]
    assert found.tolist() == expected
    assert line(curvature, unit(3, 0), a).tolist() == expected[0]


def test_losses_are_those_of_the_moved_network():
    net, x = made(batch_norm), images()
    curvature = Curvature(net, cut(x, Y, 5))
    direction = filter_normalised(curvature)
    found = line(curvature, direction, [0.0, 0.3])
    net.eval()
    assert found[0].item() == pytest.approx(cross_entropy(net(x), Y).item())
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(net.parameters()).detach() + 0.3 * direction,
        net.parameters(),
    )
    assert found[1].item() == pytest.approx(cross_entropy(net(x), Y).item())
    assert found[0] != found[1]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_put_back_bit_for_bit(fails):
    """Float32, where theta + 0.1 d - 0.1 d would not be theta."""
    net = made(batch_norm).float().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    curvature = Curvature(net, cut(images().float(), Y, 5))
    direction = filter_normalised(curvature)
    if fails:
        with pytest.raises(ValueError, match="a direction has shape"):
            plane(curvature, direction, direction[:1], [0.1], [0.1, 0.2])
        curvature.batches = [(torch.ones(2, 7), Y[:2])]
        with pytest.raises(RuntimeError):
            line(curvature, direction, [0.1])
    else:
        line(curvature, direction, [0.1, -0.7])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training


def test_filters_of_a_direction_are_as_long_as_the_networks():
    net = made(batch_norm)
    curvature = Curvature(net, cut(images(), Y, 5))
    direction = filter_normalised(curvature, seed=1)
    parts = direction.split(curvature.sizes)
    for p, part in zip(curvature.params, parts, strict=True):
        if p.dim() < 2:
            assert not part.any()
            continue
        rows = part.view(len(p), -1)
        torch.testing.assert_close(rows.norm(dim=1), p.detach().flatten(1).norm(dim=1))
    assert torch.equal(direction, filter_normalised(curvature, seed=1))
    other = filter_normalised(curvature, seed=1, index=1)
    assert abs(direction @ other / (direction.norm() * other.norm())) < 0.5
