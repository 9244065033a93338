"""The yardstick: the SGD steps of a round in eager PyTorch, and nothing else.

No clients, no copies of weights, no averaging: one model walks over the batches that it is given.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.25), nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(128, 10),
    )  # fmt: skip


class Bare:
    def __init__(self, net: nn.Module, lr: float) -> None:
        self.net = net.train()
        self.optimizer = torch.optim.SGD(net.parameters(), lr=lr)

    def steps(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """One SGD step on each batch: x (B, 3, 32, 32) float32, y (B,) int64."""
        for x, y in batches:
            self.optimizer.zero_grad(set_to_none=True)
            cross_entropy(self.net(x), y).backward()
            self.optimizer.step()
