"""Mixup: training on convex combinations of pairs of samples.

Zhang et al., mixup, ICLR 2018 (https://arxiv.org/abs/1710.09412).  Each batch draws one weight
lambda ~ Beta(gamma, gamma) and one permutation pi:

    x <- lambda x + (1 - lambda) x_pi,    loss = lambda CE(y) + (1 - lambda) CE(y_pi).

gamma is that paper's alpha, named as in FedAlign's comparison (Mendieta et al., CVPR 2022), where
the default comes from; with that default lambda is within 0.01 of 0 or 1 for 80 % of the batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fl_common.config import Group
from fl_common.data.catalogue import SOURCES
from fl_common.deferred import torch
from fl_common.local import PADDING, mean_losses
from fl_common.passes import criterion_of
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_common.config import CoreConfig
    from fl_common.layout import Flat

NO_MIXTURE = "token ids have no mixtures; leave mixup out"


class MixupParams(Group):
    gamma: float = Field(
        0.05, ge=0, description="gamma in lambda ~ Beta(gamma, gamma); 0: lambda = 1, off"
    )


class Mixup(Regularizer):
    """Labels stay classes: the loss of the batch is mixed, whichever loss the network has, so
    nothing needs to know the number of classes."""

    name = "mixup"
    alone = ""
    relabels = True
    replays = True
    Params = MixupParams
    params: MixupParams
    neutral = "mixup.gamma=0"

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        source = SOURCES.get(config.data.source)
        if source is None or source.shape is None or len(source.shape) != 2:
            return []
        return [f"mixup with data.source = {config.data.source}: {NO_MIXTURE}"]

    @classmethod
    def prepare(cls, net: torch.nn.Module, params: MixupParams) -> None:
        if any(isinstance(module, torch.nn.Embedding) for module in net.modules()):
            raise ValueError(f"mixup: {NO_MIXTURE}")

    def begin(self, net: torch.nn.Module, sent: Flat, memory: Flat) -> None:
        self.criterion = criterion_of(net)

    @property
    def drawn(self) -> tuple[str, ...]:
        return ("weight", "partners") if self.params.gamma else ()

    def transform(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gamma = self.params.gamma
        if not gamma:
            return x, y
        self.weight = weight_of(gamma, x)
        order = torch.randperm(len(y), device=y.device)
        self.partners = y.index_select(0, order)
        return x.index_select(0, order).lerp_(x, self.weight), y

    def data_term(
        self, x: torch.Tensor, output: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor | float:
        """(1 - lambda) (CE(y_pi) - CE(y)), which beside CE(y) makes the mixed loss."""
        if not self.params.gamma:
            return 0.0
        others = self.criterion(output, self.partners) - self.criterion(output, y)
        return (1 - self.weight) * others

    def stacked_term(
        self, each: Sequence[Mixup], output: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor | float:
        if not self.params.gamma:
            return 0.0
        partners = torch.nn.utils.rnn.pad_sequence(
            [mixup.partners for mixup in each], batch_first=True, padding_value=PADDING
        )
        weight = torch.stack([mixup.weight for mixup in each])
        return (1 - weight) * (mean_losses(output, partners) - mean_losses(output, y))


def weight_of(gamma: float, like: torch.Tensor) -> torch.Tensor:
    """lambda ~ Beta(gamma, gamma), a scalar in the dtype and on the device of `like`.

    lambda = G / (G + G') with G, G' ~ Gamma(gamma), which underflow where gamma is small.  Their
    logarithms do not: log G = log Gamma(gamma + 1) - E / gamma, E ~ Exp(1).
    """
    shape = torch.full((2,), gamma + 1, dtype=torch.float64, device=like.device)
    logs = torch._standard_gamma(shape).log_()
    logs -= torch.empty_like(logs).exponential_() / gamma
    return torch.sigmoid(logs[0] - logs[1]).to(like.dtype)
