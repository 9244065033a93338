"""Our optimizers against torch.optim's, over several steps."""

from __future__ import annotations

import pytest
import torch

from fl_client.optimizers import SGD, Adam


def trajectories(ours, theirs_class, dtype, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), ()]
    start = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    mine = [t.clone() for t in start]
    reference = [t.clone().requires_grad_() for t in start]
    theirs = theirs_class(reference, lr=0.1, **options)
    for _ in range(5):
        grads = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
        for p, g in zip(reference, grads, strict=True):
            p.grad = g.clone()
        theirs.step()
        ours.step(mine, grads, 0.1)
    return mine, [p.detach() for p in reference]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.01},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    ],
)
def test_sgd(options, dtype):
    momentum = options.get("momentum", 0.0)
    rest = {k: v for k, v in options.items() if k != "momentum"}
    mine, theirs = trajectories(SGD(momentum, **rest), torch.optim.SGD, dtype, **options)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}])
def test_adam(options):
    mine, theirs = trajectories(Adam(**options), torch.optim.Adam, torch.float64, **options)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [lambda: SGD(0.9), Adam])
def test_state_can_be_taken_out_and_put_back(make):
    grads = [torch.tensor([1.0, -2.0])]

    def steps(optimizer, p, count):
        for _ in range(count):
            optimizer.step([p], grads, 0.1)
        return p

    whole = steps(make(), torch.ones(2), 4)
    first, second = make(), make()
    assert first.state() is None
    p = steps(first, torch.ones(2), 2)
    second.load(first.state())
    assert torch.equal(steps(second, p.clone(), 2), whole)
    second.load(None)
    assert torch.equal(steps(second, torch.ones(2), 4), whole)
