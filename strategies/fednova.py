"""FedNova: updates are normalised by the amount of local work before they are averaged.

Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization,
NeurIPS 2020 (https://arxiv.org/abs/2007.07481), eq. 7 and section 4.  a_i is K_i for plain SGD;
for momentum and a proximal term (`regularizers=proximal`) it is as in the paper's table of solvers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fl_common.layout import PARAMS
from strategies.base import FederatedStrategy, WeightedMean

if TYPE_CHECKING:
    import torch

    from fl_common.config import CoreConfig
    from strategies.base import Reply


MANY = 1_000_000
"""The most steps that are added up one by one; a client may say that it took 10^15."""


def effective_steps(steps: int, momentum: float, pull: float = 0.0) -> float:
    """a_i, the paper's ||a_i||_1: the sum of the local gradients' coefficients in -Delta_i / eta.

    K_i for plain SGD; `pull` is eta mu of a proximal term, which undoes a part of each step.
    """
    if steps > MANY:  # the same recurrence, of (velocity, way, 1)
        step = np.array([[momentum, -pull, 1.0], [momentum, 1.0 - pull, 1.0], [0.0, 0.0, 1.0]])
        return float(np.linalg.matrix_power(step, steps)[1, 2])
    velocity = way = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1 - pull * way
        way += velocity
    return way


def mu_of(config: CoreConfig) -> float:
    """mu of the proximal term, 0 without one."""
    return config.proximal.mu if "proximal" in config.regularizer_names else 0.0


class FedNova(FederatedStrategy):
    """w <- w + tau_eff sum_S p_i Delta_i / a_i, with tau_eff = sum_S p_i a_i."""

    name = "fednova"

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        train = config.train
        known = "a_i is known for SGD, with momentum that starts anew each round"
        errors = super().check(config)
        if train.lr * mu_of(config) + train.momentum > 1:
            errors.append(
                f"proximal.mu = {mu_of(config):g}: with strategy.name=fednova, train.lr * "
                "proximal.mu + train.momentum is at most 1, or clients may swing back to where "
                "they began; lower it"
            )
        return errors + [
            f"{key}: not with strategy.name=fednova: {known}; leave it at {default}"
            for key, given, default in (
                ("train.optimizer", train.optimizer != "sgd", "sgd"),
                ("train.nesterov", train.nesterov, "false"),
                ("train.keep-optimizer", train.keep_optimizer, "false"),
            )
            if given
        ]

    def begin(self, w: torch.Tensor) -> None:
        self.directions = WeightedMean()
        self.answered, self.weighted_steps = 0, 0.0  # sums of n_i and of n_i a_i

    def add(self, reply: Reply) -> None:
        pull = self.work(reply).lr * mu_of(self.config)
        a = effective_steps(reply.steps, self.config.train.momentum, pull)
        self.directions.add(self.delta(reply), reply.samples / a)
        self.answered += reply.samples
        self.weighted_steps += reply.samples * a

    def step(self) -> torch.Tensor:
        w, tau_eff = self.w[PARAMS], self.weighted_steps / self.answered
        return (w + self.directions.take_sum() * (tau_eff / self.answered)).to(w.dtype)
