"""Proximal term: pulls local training towards the model that the client received.

Li et al., FedProx, MLSys 2020 (https://arxiv.org/abs/1812.06127), for use with any strategy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fl_common.config import Group
from fl_common.layout import PARAMS
from fl_common.local import Affine
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from fl_common.layout import Flat


class ProximalParams(Group):
    mu: float = Field(1e-4, ge=0, description="weight mu in (mu / 2) ||theta - w||^2; 0: off")


class Proximal(Regularizer):
    """grad += mu (theta - w)."""

    name = "proximal"
    alone = ""
    Params = ProximalParams
    params: ProximalParams
    neutral = "proximal.mu=0"
    copies = 1

    def correction(self, sent: Flat, memory: Flat) -> Affine | None:
        return Affine.pull(self.params.mu, sent[PARAMS])
