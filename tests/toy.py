"""The reference problem of the drift literature: two scalar quadratics, float64, full gradients.

f_1 = x^2 / 2 and f_2 = 4 (x - 1)^2 / 2; w starts at 0, lr 0.1.  A sample is (a, b), the network
gives a (theta - b)^2 / 2, and a client's samples are all alike, so that K epochs of full batches
are K gradient steps.  The mean of f_1 and f_2 has its minimum at 0.8, for n = (3, 1) at 4/7.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fl_common import assembly
from fl_common.data.sources import Dataset, Split

A, B, LR = np.array([1.0, 4.0]), np.array([0.0, 1.0]), 0.1
SETTINGS = [
    "data.source=breast-cancer",  # features: no transform
    "model.name=mlp",
    "clients.number=2",
    f"train.lr={LR}",
    "train.dtype=float64",
    "train.batch-size=100",
    "train.device=cpu",
    "eval.every=100000",
]


class Quadratic(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x[:, :1], x[:, 1:]
        return a * (self.theta - b) ** 2 / 2

    @staticmethod
    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return output.mean()


def install(patch: pytest.MonkeyPatch, n: tuple[int, int] = (1, 1)) -> None:
    """Put the toy in the place of data and model; everything else of a run stays real."""
    y = np.repeat([0, 1], n)
    split = Split(np.stack([A[y], B[y]], axis=1), y)
    data = Dataset(train=split, test=split, classes=("f1", "f2"), shape=(2,), fingerprint="toy")
    parts = [np.flatnonzero(y == client) for client in (0, 1)]
    patch.setattr(assembly, "load_data", lambda config: data)
    patch.setattr(assembly, "split_data", lambda config, data: parts)
    patch.setattr(assembly, "new_model", lambda config, classes, shape, device: Quadratic())
