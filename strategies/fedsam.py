"""FedSAM, FedASAM and MoFedSAM: sharpness-aware local steps under FedAvg.

Caldarola et al., Improving Generalization in Federated Learning by Seeking Flat Minima, ECCV 2022
(https://arxiv.org/abs/2203.11834): FedAvg with SAM or ASAM.  Qu et al., Generalized Federated
Learning via Sharpness Aware Minimization, ICML 2022 (https://arxiv.org/abs/2206.02618): FedSAM and
MoFedSAM.  The keys of the perturbation are those of `sam` and `asam` (`regularizers/sam.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fl_common.config import Group
from fl_common.layout import PARAMS
from fl_common.local import Affine
from strategies.base import ClientRule, FederatedStrategy, WeightedMean, over
from strategies.fedavg import FedAvg

if TYPE_CHECKING:
    import torch

    from fl_common.config import CoreConfig
    from fl_common.layout import Flat
    from strategies.base import Reply


class FedSAM(FedAvg):
    """FedAvg with `regularizers=sam`."""

    name = "fedsam"
    regularizers: ClassVar = ("sam",)


class FedASAM(FedAvg):
    """FedAvg with `regularizers=asam`."""

    name = "fedasam"
    regularizers: ClassVar = ("asam",)


class MoFedSAMParams(Group):
    beta: float = Field(
        0.1, gt=0, le=1, description="weight beta of the local gradient; the momentum has 1 - beta"
    )


class MoFedSAMRule(ClientRule):
    """grad <- beta grad + (1 - beta) m.  The optimizer adds weight decay to that, and m has it too:
    where m is at rest, train.weight-decay counts 1 / beta times."""

    params: MoFedSAMParams

    def correction(self, sent: Flat, memory: Flat) -> Affine:
        beta = self.params.beta
        return Affine(constant=(1 - beta) * sent["m"], scale=beta)


class MoFedSAM(FederatedStrategy):
    """w <- w + mean_S Delta_i;  m <- -mean_S Delta_i / (K_i eta), the cohort's mean direction;
    K_i is client i's own, where the code of FedSpeed's authors (woodenchild95/FL-Simulator) has one
    nominal K."""

    name = "mofedsam"
    Params = MoFedSAMParams
    Rule = MoFedSAMRule
    regularizers: ClassVar = ("sam",)
    keeps: ClassVar = ("m",)
    sends: ClassVar = ("m",)

    @classmethod
    def plain_sgd(cls, config: CoreConfig) -> str:
        return "m is measured as -Delta_i / (K_i eta), the mean gradient of plain SGD"

    def begin(self, w: torch.Tensor) -> None:
        self.deltas, self.directions = WeightedMean(), WeightedMean()

    def add(self, reply: Reply) -> None:
        work, delta = self.work(reply), self.delta(reply)
        self.deltas.add(delta)
        self.directions.add(delta, 1 / (work.steps * work.lr))

    def step(self) -> torch.Tensor:
        w, replies = self.w[PARAMS], self.deltas.weight
        self.kept["m"] = over(-self.directions.take_sum(), replies).to(w.dtype)
        return (w + over(self.deltas.take_sum(), replies)).to(w.dtype)
