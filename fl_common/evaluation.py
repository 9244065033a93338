"""Accuracy and loss of a model on held-out samples, wherever these lie."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fl_common.forks import in_processes
from fl_common.passes import criterion_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fl_common.data.sources import Split

BATCH = 100
"""Samples evaluated at once; fixed, because the loss's last bits depend on it."""


def evaluate(
    net: torch.nn.Module,
    split: Split,
    indices: np.ndarray,
    transform: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    processes: int = 1,
) -> tuple[float, float]:
    """Accuracy (0-1) and mean loss of `net` over the samples `indices` (n,) of `split`, n > 0.

    processes: on a CPU, how many share the batches; results do not depend on it.  The network is
    left in evaluation mode.
    """
    net.eval()
    each = -(-len(indices) // processes // BATCH) * BATCH
    parts = [indices[start : start + each] for start in range(0, len(indices), each)]

    def batches_of(part: np.ndarray) -> list[tuple[float, float]]:
        return _over_batches(net, split, part, transform, device)

    rows = [row for rows in in_processes(batches_of, parts) for row in rows]
    loss = 0.0
    for batch, _ in rows:  # in the batches' order; from Python 3.12 on, `sum` rounds differently
        loss += batch
    return sum(int(correct) for _, correct in rows) / len(indices), loss / len(indices)


@torch.no_grad()
def _over_batches(
    net: torch.nn.Module,
    split: Split,
    indices: np.ndarray,
    transform: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> list[tuple[float, float]]:
    """For each batch: the sum of its samples' losses, and how many predictions are right."""
    criterion = criterion_of(net)
    rows = []
    for x, y in _batches(split, indices, device):
        output = net(transform(x))
        loss = criterion(output, y).double() * len(y)
        rows.append(torch.stack([loss, (output.argmax(1) == y).sum().double()]))
    return torch.stack(rows).tolist()


_on_card: WeakKeyDictionary[Split, dict[torch.device, tuple[torch.Tensor, torch.Tensor]]]
_on_card = WeakKeyDictionary()
"""The samples and labels of splits that GPUs keep, each as long as the split itself lives."""


def _batches(
    split: Split, indices: np.ndarray, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of these samples and their labels, on the device.  A GPU keeps all of a split that
    is a small part of its memory."""
    kept = _on_card.setdefault(split, {})
    if device not in kept:
        if device.type == "cpu" or split.x.nbytes > torch.cuda.mem_get_info(device)[0] / 10:
            for start in range(0, len(indices), BATCH):
                part = indices[start : start + BATCH]
                yield tuple(torch.from_numpy(a[part]).to(device) for a in (split.x, split.y))
            return
        kept[device] = tuple(torch.from_numpy(a).to(device) for a in (split.x, split.y))
    if np.array_equal(indices, np.arange(len(split))):
        yield from zip(*(whole.split(BATCH) for whole in kept[device]), strict=True)
    else:
        for part in torch.from_numpy(indices).to(device).split(BATCH):
            yield tuple(whole.index_select(0, part) for whole in kept[device])
