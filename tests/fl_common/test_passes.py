"""A pass with other tensors than the network's own."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from fl_common.passes import called_with


def net() -> nn.Module:
    """A layer under two names, a weight in two layers, and running statistics."""
    torch.manual_seed(0)
    layer, tied, norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
    tied.weight = layer.weight
    return nn.Sequential(layer, norm, tied, nn.Sequential(layer), norm)


def test_the_networks_own_tensors_stay():
    own, x = net(), torch.randn(4, 3)
    other = deepcopy(own)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    before = list(own.parameters()) + list(own.buffers())
    values = deepcopy(before)
    tensors = dict(other.named_parameters()) | {n: b.clone() for n, b in other.named_buffers()}
    assert torch.equal(called_with(own, tensors, x), other(x))
    assert all(torch.equal(tensors[name], b) for name, b in other.named_buffers())
    after = list(own.parameters()) + list(own.buffers())
    assert all(map(lambda a, b: a is b, before, after))
    assert all(map(torch.equal, after, values))


def test_a_shared_tensor_may_have_any_of_its_names():
    own, x = net().eval(), torch.randn(4, 3)
    zeros = torch.zeros(3, 3)
    assert torch.equal(
        called_with(own, {"0.weight": zeros}, x), called_with(own, {"2.weight": zeros}, x)
    )
