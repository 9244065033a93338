"""SCAFFOLD, option II: control variates correct the clients' drift in every local step.

Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020
(https://arxiv.org/abs/1910.06378), Algorithm 1 with eq. 4 and 5.  For clients of unequal sizes
the server's control variate is divided by omega_i, client i's samples over the clients' mean, both
in the step and in the update.  Then c_i is the mean local gradient and the fixed point is the
optimum of the data-weighted loss.  `scaffold.weighting=uniform` is the paper as printed.  Since no
client takes less than a step per epoch, c moves one of n_i < B samples about B / n_i times as far
as the others, which can diverge: a run warns from ten times on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fl_common.layout import PARAMS, STATS
from fl_common.local import Affine
from strategies.base import ClientRule, FederatedStrategy, WeightedMean, Weighting

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fl_common.config import CoreConfig
    from fl_common.layout import Flat
    from fl_common.local import Work
    from strategies.base import Reply

PLAIN_SGD = "control variates are measured as Delta_i / (K_i eta), the mean gradient of plain SGD"
FAR = 10
"""How many times as far as the mean client c may move one without a warning."""


class ControlParams(Weighting):
    legacy_beta: bool = Field(
        False,
        description="divide control variates as FedDC's code does: by the nominal number of steps "
        "and the undecayed learning rate",
    )


class ScaffoldParams(ControlParams):
    eta_g: float = Field(1.0, gt=0, description="server learning rate eta_g")


def control_delta(
    c: torch.Tensor, delta: torch.Tensor, params: ControlParams, work: Work
) -> torch.Tensor:
    """c_i+ - c_i = -c / omega_i - Delta_i / (K_i eta), (d,) in the model's dtype.

    Client and server both compute it, so that it need not travel.
    """
    official = params.legacy_beta
    steps, lr = (work.nominal_steps, work.base_lr) if official else (work.steps, work.lr)
    return -c / params.omega(work) - delta / (steps * lr)


def control_warnings(
    name: str, params: ControlParams, config: CoreConfig, model: Flat, works: Sequence[Work]
) -> list[str]:
    """Of buffers, and of a client that c moves far: by K_i eta c / omega_i in a round, the mean
    client by K eta c.  At FAR times as much, a cohort of FAR with one such client moves w twice as
    far as one without.  Clipped, a client moves by at most K_i eta clip-norm."""
    told = []
    if STATS in model:
        told.append(
            "buffers, such as BatchNorm's statistics, are averaged, not corrected: control "
            "variates work better with GroupNorm (model.norm=group, or in a model of your own)"
        )
    if params.weighting == "omega" and not config.train.clip_norm:
        far = max((work.steps / work.omega / work.nominal_steps for work in works), default=0.0)
        if far >= FAR:
            told.append(
                f"{name}.weighting = omega: the control variate c / omega_i moves the smallest "
                f"client {far:.3g} times as far as the mean one, which can diverge; set "
                f"{name}.weighting=uniform or train.clip-norm"
            )
    return told


class ScaffoldRule(ClientRule):
    """grad += c / omega_i - c_i;  c_i <- c_i - c / omega_i - Delta_i / (K_i eta)."""

    params: ScaffoldParams
    memory = ("c",)

    def correction(self, sent: Flat, memory: Flat) -> Affine:
        return Affine(constant=sent["c"] / self.params.omega(self.work) - memory["c"])

    def remember(self, memory: Flat, sent: Flat, model: Flat) -> Flat:
        delta = model[PARAMS] - sent[PARAMS]
        return {"c": memory["c"] + control_delta(sent["c"], delta, self.params, self.work)}


class Scaffold(FederatedStrategy):
    """w <- w + eta_g mean_S Delta_i;  c <- c + (1 / N) sum_S omega_i (c_i+ - c_i)."""

    name = "scaffold"
    Params = ScaffoldParams
    Rule = ScaffoldRule
    params: ScaffoldParams
    keeps: ClassVar = ("c",)
    sends: ClassVar = ("c",)

    @classmethod
    def plain_sgd(cls, config: CoreConfig) -> str:
        return PLAIN_SGD

    def warnings(self, config: CoreConfig, model: Flat, works: Sequence[Work] = ()) -> list[str]:
        told = super().warnings(config, model, works)
        return told + control_warnings(self.name, self.params, config, model, works)

    def begin(self, w: torch.Tensor) -> None:
        self.deltas, self.controls = WeightedMean(), WeightedMean()

    def add(self, reply: Reply) -> None:
        work, delta = self.work(reply), self.delta(reply)
        self.deltas.add(delta)
        change = control_delta(self.kept["c"], delta, self.params, work)
        self.controls.add(change, self.params.omega(work))

    def step(self) -> torch.Tensor:
        w, c = self.w[PARAMS], self.kept["c"]
        self.kept["c"] = (c + self.controls.take_sum() / self.config.clients.number).to(c.dtype)
        mean = self.deltas.take_sum() / self.deltas.weight
        return (w + self.params.eta_g * mean).to(w.dtype)
