"""Proximal term: pulls local training towards the model that the client received.

Li et al., FedProx, MLSys 2020 (https://arxiv.org/abs/1812.06127), as a word beside any strategy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fl_common.config import Group
from fl_common.gradients import add_pull
from regularizers.base import Regularizer

if TYPE_CHECKING:
    import torch


class ProximalParams(Group):
    mu: float = Field(1e-4, ge=0, description="weight mu of (mu / 2) ||theta - w||^2; 0: off")


class Proximal(Regularizer):
    """grad += mu (theta - w)."""

    name = "proximal"
    Params = ProximalParams
    params: ProximalParams

    def begin(self, net: torch.nn.Module, w: list[torch.Tensor]) -> None:
        self.w = w

    def add_gradient(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        add_pull(grads, params, self.w, self.params.mu)
