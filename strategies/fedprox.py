"""FedProx: FedAvg whose clients are pulled towards the model they received.

Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020
(https://arxiv.org/abs/1812.06127), Algorithm 2: client i minimises
F_i(theta) + (mu / 2) ||theta - w||^2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fl_common.config import Group
from fl_common.layout import PARAMS
from fl_common.local import Affine
from strategies.base import ClientRule
from strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from fl_common.layout import Flat


class FedProxParams(Group):
    mu: float = Field(
        1e-4, ge=0, description="weight of the proximal term; 0 is FedAvg; often 0.001 to 1"
    )


class FedProxRule(ClientRule):
    """grad += mu (theta - w), before clipping."""

    params: FedProxParams

    def correction(self, sent: Flat, memory: Flat) -> Affine | None:
        return Affine.pull(self.params.mu, sent[PARAMS])


class FedProx(FedAvg):
    """The server's rule is FedAvg's."""

    name = "fedprox"
    Params = FedProxParams
    Rule = FedProxRule
    refuses: ClassVar = {"proximal": "it is the same term twice; set fedprox.mu alone"}
