"""The global model on the server's test set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from fl_common import assembly
from fl_common.layout import Layout, tensors_of

if TYPE_CHECKING:
    from fl_common.config import CoreConfig
    from fl_common.data.sources import Dataset
    from fl_common.layout import Flat

BATCH = 100
"""Samples evaluated at once; fixed, because the loss's last bits depend on it."""


class Evaluator:
    """Holds one model, into which each evaluated one is copied."""

    def __init__(self, config: CoreConfig, data: Dataset) -> None:
        self.device = assembly.training_device(config)
        self.split = data.test
        self.transform = assembly.transform(config)
        self.net = assembly.new_model(config, data, self.device).eval()
        self.layout = Layout.of(self.net)
        self.tensors = tensors_of(self.net)

    @torch.no_grad()
    def __call__(self, flat: Flat) -> tuple[float, float]:
        """Accuracy (0-1) and mean cross-entropy."""
        for kind, tensors in self.tensors.items():
            views = self.layout.split(kind, flat[kind].to(self.device))
            torch._foreach_copy_(list(tensors.values()), views)
        criterion = getattr(self.net, "loss", cross_entropy)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        samples = len(self.split.y)
        for start in range(0, samples, BATCH):
            part = slice(start, start + BATCH)
            x = self.transform.eval(torch.tensor(self.split.x[part]).to(self.device))
            y = torch.tensor(self.split.y[part]).to(self.device)
            output = self.net(x)
            loss += criterion(output, y).double() * len(y)
            correct += (output.argmax(1) == y).sum()
        return int(correct) / samples, float(loss) / samples
