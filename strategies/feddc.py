"""FedDC: every client learns its drift, and is corrected by it and by control variates.

Gao et al., FedDC: Federated Learning with Non-IID Data via Local Drift Decoupling and Correction,
CVPR 2022 (https://arxiv.org/abs/2203.11751).  As in the authors' code, the drift of all clients,
not only of the cohort, enters the server's mean (with the cohort's alone FedDC does not converge
under partial participation), alpha and c are divided by omega_i, and the gradient correction G is
SCAFFOLD's.  Without G FedDC is FedDyn; without the drift and with alpha = 0 it is SCAFFOLD.  A run
warns, as theirs do, of a client so small that it may diverge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fl_common.layout import PARAMS
from fl_common.local import Affine
from strategies.base import ClientRule, FederatedStrategy, WeightedMean
from strategies.feddyn import DUAL, pull_warnings
from strategies.scaffold import PLAIN_SGD, ControlParams, control_delta, control_warnings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fl_common.config import CoreConfig
    from fl_common.layout import Flat
    from fl_common.local import Work
    from strategies.base import Reply


class FedDCParams(ControlParams):
    alpha: float = Field(0.01, ge=0, description="weight alpha of the drift's pull")
    gradient_correction: bool = Field(
        True, description="use the term G, SCAFFOLD's control variates"
    )
    drift: bool = Field(
        True, description="use the drift variables h_i; without them and alpha = 0 it is SCAFFOLD"
    )


class FedDCRule(ClientRule):
    """grad += alpha_i (theta - w + h_i) + c / omega_i - c_i, alpha_i = alpha / omega_i;
    h_i <- h_i + Delta_i;  c_i <- c_i - c / omega_i - Delta_i / (K_i eta)."""

    params: FedDCParams
    memory = ("h", "c")

    def correction(self, sent: Flat, memory: Flat) -> Affine:
        params, work = self.params, self.work
        omega_i = params.omega(work)
        terms = Affine.pull(params.alpha / omega_i, sent[PARAMS] - memory["h"]) or Affine()
        if params.gradient_correction:
            terms = terms.then(Affine(constant=sent["c"] / omega_i - memory["c"]))
        return terms

    def remember(self, memory: Flat, sent: Flat, model: Flat) -> Flat:
        delta, new = model[PARAMS] - sent[PARAMS], dict(memory)
        if self.params.drift:
            new["h"] = memory["h"] + delta
        if self.params.gradient_correction:
            new["c"] = memory["c"] + control_delta(sent["c"], delta, self.params, self.work)
        return new


class FedDC(FederatedStrategy):
    """c <- c + (1 / N) sum_S omega_i (c_i+ - c_i);  H <- H + (1 / N) sum_S Delta_i;
    w <- mean_S theta_i + H."""

    name = "feddc"
    Params = FedDCParams
    Rule = FedDCRule
    params: FedDCParams
    redundant: ClassVar = {"proximal": DUAL}
    keeps: ClassVar = ("c", "H")
    sends: ClassVar = ("c",)

    @classmethod
    def plain_sgd(cls, config: CoreConfig) -> str:
        return PLAIN_SGD if config.params_of(cls.name).gradient_correction else ""

    def warnings(self, config: CoreConfig, model: Flat, works: Sequence[Work] = ()) -> list[str]:
        corrects = self.params.gradient_correction
        told = super().warnings(config, model) if self.params.alpha else []  # else nothing pulls
        told += pull_warnings(self.name, "alpha", self.params, config, works)
        if self.params.legacy_beta and not corrects:
            told.append("feddc.legacy-beta = true has no effect without feddc.gradient-correction")
        if corrects:
            told += control_warnings(self.name, self.params, config, model, works)
        return told

    def begin(self, w: torch.Tensor) -> None:
        self.deltas, self.controls = WeightedMean(), WeightedMean()

    def add(self, reply: Reply) -> None:
        work, delta = self.work(reply), self.delta(reply)
        self.deltas.add(delta)
        if self.params.gradient_correction:
            change = control_delta(self.kept["c"], delta, self.params, work)
            self.controls.add(change, self.params.omega(work))

    def step(self) -> torch.Tensor:
        w, c, h = self.w[PARAMS], self.kept["c"], self.kept["H"]
        number, total = self.config.clients.number, self.deltas.take_sum()
        if self.params.gradient_correction:
            self.kept["c"] = (c + self.controls.take_sum() / number).to(c.dtype)
        if self.params.drift:
            self.kept["H"] = (h + total / number).to(h.dtype)
        mean = total / self.deltas.weight
        return (w + mean + self.kept["H"]).to(w.dtype)
