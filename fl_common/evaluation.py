"""Accuracy and loss of a model on held-out samples, wherever these lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from fl_common.data.sources import Split

BATCH = 100
"""Samples evaluated at once; fixed, because the loss's last bits depend on it."""


@torch.no_grad()
def evaluate(
    net: torch.nn.Module,
    split: Split,
    indices: np.ndarray,
    transform: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> tuple[float, float]:
    """Accuracy (0-1) and mean loss of `net` over the samples `indices` (n,) of `split`, n > 0.

    The network is left in evaluation mode.
    """
    net.eval()
    criterion = getattr(net, "loss", cross_entropy)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(indices), BATCH):
        part = indices[start : start + BATCH]
        x = transform(torch.from_numpy(split.x[part]).to(device))
        y = torch.from_numpy(split.y[part]).to(device)
        output = net(x)
        loss += criterion(output, y).double() * len(y)
        correct += (output.argmax(1) == y).sum()
    return int(correct) / len(indices), float(loss) / len(indices)
