"""FedDyn: a dynamic regularizer that makes local optima agree with the global one.

Acar et al., Federated Learning Based on Dynamic Regularization, ICLR 2021
(https://arxiv.org/abs/2111.04263).  Written as in the authors' code, with h_i = -g_i / alpha_i
and H = -h / alpha, and alpha_i = alpha / omega_i: with H added to an unweighted mean, the fixed
point has sum omega_i grad f_i = 0, the optimum of the data-weighted loss.  From eta alpha_i = 2 on,
so with a client of very few samples, local steps diverge: a run then begins with a warning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fl_common.layout import PARAMS
from fl_common.local import Affine
from strategies.base import ClientRule, FederatedStrategy, WeightedMean, Weighting

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fl_common.config import CoreConfig
    from fl_common.layout import Flat
    from fl_common.local import Work
    from strategies.base import Reply

DUAL = "the drift term pulls already; the fixed point is the same, but reached more slowly"


class DriftParams(Weighting):
    clip_scope: Literal["all", "official"] = Field(
        "all",
        description="what train.clip-norm bounds; all: the whole gradient; official: all but the "
        "pull's part in theta (alpha_i theta; FedSpeed: lambda_i theta), which the authors' code "
        "leaves to weight decay",
    )

    def pull(self, alpha_i: float, h: torch.Tensor, w: torch.Tensor) -> Affine | None:
        """alpha_i (theta - w + h_i)."""
        pull = Affine.pull(alpha_i, w - h)
        if pull and self.clip_scope == "official":
            return replace(pull, slope=0.0, decay=pull.slope)
        return pull


def pull_warnings(
    name: str, pull: str, params: Weighting, config: CoreConfig, works: Sequence[Work]
) -> list[str]:
    """Of a pull that throws the smallest client about: a step multiplies theta - w + h_i by
    1 - eta (alpha / omega_i + curvature).  The steps of Adam are bounded, and those that are
    clipped.  `pull`: the key of alpha."""
    alpha = params.model_dump(by_alias=True)[pull]
    factor = max((alpha * work.lr / params.omega(work) for work in works), default=0.0)
    clipped = getattr(params, "clip_scope", "all") == "all"
    if factor < 2 or config.train.optimizer == "adam" or (clipped and config.train.clip_norm):
        return []
    remedies = [f"a smaller {name}.{pull}", *(["train.clip-norm"] if clipped else [])]
    if alpha * config.train.lr < 2:
        remedies.insert(0, f"{name}.weighting=uniform")
    return [
        f"{name}.{pull} = {alpha:g}: train.lr * {pull} / omega_i is {factor:.3g} for the smallest "
        f"client, and from 2 on local steps diverge; set {' or '.join(remedies)}"
    ]


class FedDynParams(DriftParams):
    alpha: float = Field(
        0.01, gt=0, description="weight alpha of the regularizer; published: 0.1, 0.01, 0.001"
    )


class FedDynRule(ClientRule):
    """grad += alpha_i (theta - w + h_i);  h_i <- h_i + Delta_i."""

    params: FedDynParams
    memory = ("h",)

    @property
    def weight(self) -> float:
        """alpha, before it is divided by omega_i."""
        return self.params.alpha

    def correction(self, sent: Flat, memory: Flat) -> Affine | None:
        alpha_i = self.weight / self.params.omega(self.work)
        return self.params.pull(alpha_i, memory["h"], sent[PARAMS])

    def remember(self, memory: Flat, sent: Flat, model: Flat) -> Flat:
        return {"h": memory["h"] + (model[PARAMS] - sent[PARAMS])}


class FedDyn(FederatedStrategy):
    """H <- H + (1 / N) sum_S Delta_i, the mean of all h_i;  w <- mean_S theta_i + H."""

    name = "feddyn"
    Params = FedDynParams
    Rule = FedDynRule
    redundant: ClassVar = {"proximal": DUAL}
    keeps: ClassVar = ("H",)
    pull: ClassVar = "alpha"

    def warnings(self, config: CoreConfig, model: Flat, works: Sequence[Work] = ()) -> list[str]:
        told = super().warnings(config, model, works)
        return told + pull_warnings(self.name, self.pull, self.params, config, works)

    def begin(self, w: torch.Tensor) -> None:
        self.deltas = WeightedMean()

    def add(self, reply: Reply) -> None:
        self.deltas.add(self.delta(reply))

    def step(self) -> torch.Tensor:
        w, h, total = self.w[PARAMS], self.kept["H"], self.deltas.take_sum()
        self.kept["H"] = (h + total / self.config.clients.number).to(h.dtype)
        mean = total / self.deltas.weight
        return (w + mean + self.kept["H"]).to(w.dtype)
