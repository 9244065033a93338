"""FedAvg: the mean of the clients' models, weighted by their samples.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data,
AISTATS 2017 (https://arxiv.org/abs/1602.05629), Algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_common.layout import PARAMS
from strategies.base import FederatedStrategy, WeightedMean

if TYPE_CHECKING:
    import torch

    from strategies.base import Reply


class FedAvg(FederatedStrategy):
    """w <- sum_S p_i theta_i, with p_i = n_i / sum_S n."""

    name = "fedavg"

    def begin(self, w: torch.Tensor) -> None:
        self.dtype = w.dtype
        self.mean = WeightedMean()

    def add(self, reply: Reply) -> None:
        self.mean.add(reply.model[PARAMS], reply.samples)

    def step(self) -> torch.Tensor:
        return self.mean.take(self.dtype)
