"""How far a round's clients move from the model that they are sent, and whether they move alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fl_common.layout import COUNTERS, STATS

if TYPE_CHECKING:
    from fl_common.groups import Groups
    from strategies.base import Reply

BLOCK = {"cpu": 1 << 15, "cuda": 1 << 20}
"""Elements that are in float64 at a time: few enough for a processor's cache, and enough for a GPU
not to wait for the next block."""
MOST = 1 << 21
"""Most parameters whose updates are summed; of larger models, evenly spaced ones.  The float64 sum
over all of them would take the memory of two more models."""


class Drift:
    """Norms and alignment of the updates Delta_i = theta_i - w, taken one by one.

    Alignment is ||sum p_i Delta_i||^2 / sum p_i ||Delta_i||^2 with p_i = n_i / sum n, from 0 to 1:
    1 where all clients make the same update, 1 / K where K of equal size and length of step move
    at right angles to each other.  Of the updates only their sum is kept, float64; beyond MOST
    parameters, that of every k-th one, and both sides of the ratio are then over these alone.
    """

    def __init__(self, w: torch.Tensor, groups: Groups) -> None:
        """`w` (d,): the parameters that are sent."""
        self.w, self.groups = w, groups
        self.every = max(1, -(-w.numel() // MOST))
        """k: the updates of every k-th parameter are summed."""
        self.samples: list[int] = []
        self.squares: list[torch.Tensor] = []
        """||Delta_i||^2 of each client, float64, on the reply's device: nothing waits for a GPU."""
        self.picked: list[torch.Tensor] = []
        """The same over the parameters whose updates are summed."""
        self.sums: dict[str, torch.Tensor] = {}
        """sum of n_i Delta_i over those, float64, by group."""

    def add(self, reply: Reply) -> None:
        """Add one reply; groups that a partial update leaves out have not moved."""
        square = picked = torch.zeros((), dtype=torch.float64)
        every = self.every
        for name, theta in reply.model.items():
            if name in (STATS, COUNTERS):
                continue
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(theta[::every], dtype=torch.float64)
            start_of = self.groups.part(name, self.w)
            number = max(1, BLOCK[theta.device.type] // every)
            ends, starts = (v.split(number * every) for v in (theta, start_of))
            for total, end, start in zip(self.sums[name].split(number), ends, starts, strict=True):
                delta = (end - start.to(end.device)).double()
                few = delta[::every]
                total.add_(few, alpha=reply.samples)
                square = square + delta.dot(delta)
                picked = picked + few.dot(few) if every > 1 else square
        self.samples.append(reply.samples)
        self.squares.append(square)
        self.picked.append(picked)

    def row(self) -> dict[str, float]:
        """What the history says of it; empty without a reply, and without the alignment where no
        client moved.  To six digits: threads and GPUs add up in other orders."""
        if not self.squares:
            return {}
        squares, n = torch.stack(self.squares).tolist(), sum(self.samples)
        picked = torch.stack(self.picked).tolist()
        norms = [square**0.5 for square in squares]
        row = {"update_norm": sum(norms) / len(norms), "update_norm_max": max(norms)}
        of_mean = sum(float(total.dot(total)) for total in self.sums.values()) / n**2
        mean = sum(k * square for k, square in zip(self.samples, picked, strict=True)) / n
        if mean:
            row["update_alignment"] = of_mean / mean
        return {key: float(f"{value:.6g}") for key, value in row.items()}
