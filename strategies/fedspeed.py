"""FedSpeed: FedDyn's correction with gradients taken at perturbed parameters.

Sun et al., FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization
Accuracy, ICLR 2023 (https://arxiv.org/abs/2302.10429).  The prox-correction of the paper is
g_i = -lambda h_i, where our lambda is the paper's 1 / lambda.  As in the authors' code, the server
adds the mean of all h_i to the unweighted mean of the cohort.  There lambda is the same for all
clients (`fedspeed.weighting=uniform`); divided by omega_i, as FedDyn's alpha is, it counts them by
their samples.  From eta lambda_i = 2 on local steps diverge: a run then begins with a warning.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fl_common.local import Perturbation
from strategies.feddyn import DriftParams, FedDyn, FedDynRule

ASCENT = "FedSpeed perturbs already (fedspeed.rho); choose another strategy, or leave it out"


class FedSpeedParams(DriftParams):
    lambda_: float = Field(
        0.1, gt=0, description="weight of the proximal term (1/lambda in the paper)"
    )
    rho: float = Field(0.1, ge=0, description="length rho of the ascent step; 0 is FedDyn")
    alpha: float = Field(
        1.0, ge=0, le=1, description="share of the perturbed gradient in a step's gradient"
    )


class FedSpeedRule(FedDynRule):
    """grad = (1 - alpha) g(theta) + alpha g(theta + eps) + lambda_i (theta - w + h_i), with
    lambda_i = lambda / omega_i and eps = rho g / ||g||;  h_i <- h_i + Delta_i."""

    params: FedSpeedParams

    @property
    def weight(self) -> float:
        return self.params.lambda_

    def perturbation(self) -> Perturbation | None:
        rho, share = self.params.rho, self.params.alpha
        return Perturbation(rho, share) if rho and share else None


class FedSpeed(FedDyn):
    """The server's rule is FedDyn's."""

    name = "fedspeed"
    Params = FedSpeedParams
    Rule = FedSpeedRule
    pull: ClassVar = "lambda"
    refuses: ClassVar = {"sam": ASCENT, "asam": ASCENT}
