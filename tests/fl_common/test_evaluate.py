"""Evaluation: what it gives, and that it is the same for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fl_common.data.sources import Split
from fl_common.evaluation import BATCH, evaluate

CPU = torch.device("cpu")


def split(n: int) -> Split:
    draw = np.random.default_rng(0)
    return Split(draw.random((n, 1, 4, 4), np.float32), draw.integers(0, 3, n))


def linear(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))


@pytest.mark.parametrize("n", [1, BATCH, 3 * BATCH + 7])
def test_it_gives_accuracy_and_mean_loss(n: int) -> None:
    data, net = split(n), linear()
    chosen = np.random.default_rng(1).permutation(n)[: max(1, n - 5)]
    accuracy, loss = evaluate(net, data, chosen, lambda x: 2 * x, CPU)
    logits = net(2 * torch.from_numpy(data.x[chosen])).double()
    labels = torch.from_numpy(data.y[chosen])
    assert accuracy == float((logits.argmax(1) == labels).double().mean())
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [1, BATCH, BATCH + 1, 7 * BATCH, 9 * BATCH + 50])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_any_number_of_processes_gives_the_same_bits(n: int, count: int) -> None:
    # In float64: sums of float32 losses are exact, whatever their order.
    data, net, everything = split(n), linear().double(), np.arange(n)
    alone = evaluate(net, data, everything, lambda x: x.double(), CPU)
    assert evaluate(net, data, everything, lambda x: x.double(), CPU, count) == alone
