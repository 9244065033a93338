"""SAM and ASAM: the gradient of a step is taken where the loss nearby is worst.

Foret et al., Sharpness-Aware Minimization, ICLR 2021 (https://arxiv.org/abs/2010.01412), eq. 2 and
3; Kwon et al., ASAM, ICML 2021 (https://arxiv.org/abs/2102.11600), eq. 7.  Both passes see the same
mini-batch and the same random draws; BatchNorm's running statistics follow only the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fl_common.config import Group
from fl_common.deferred import torch
from fl_common.local import Perturbation, norm_of
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from fl_common.layout import Flat

    Tensors = list[torch.Tensor]

ONE_ASCENT = "a step has one perturbation; choose one of them"


class SAMParams(Group):
    rho: float = Field(0.05, ge=0, description="length rho of the ascent step; 0: off")


class ASAMParams(Group):
    rho: float = Field(0.5, ge=0, description="length rho of the scaled ascent step; 0: off")
    eta: float = Field(0.2, ge=0, description="eta in the scale |theta| + eta of weights")


class SAM(Regularizer):
    """eps = rho g / (||g|| + 1e-12)."""

    name = "sam"
    alone = ""
    Params = SAMParams
    params: SAMParams
    refuses: ClassVar = {"asam": ONE_ASCENT}
    neutral = "sam.rho=0"
    copies = 1

    def perturbation(self) -> Perturbation | None:
        return Perturbation(self.params.rho) if self.params.rho else None


class ASAM(Regularizer):
    """eps = rho T^2 g / (||T g|| + 1e-12), T = |theta| + eta for weights and 1 for all else.

    As in FedASAM's code, weights are the parameters with `weight` in their names, norm layers' too.
    """

    name = "asam"
    alone = ""
    Params = ASAMParams
    params: ASAMParams
    refuses: ClassVar = {"sam": ONE_ASCENT}
    neutral = "asam.rho=0"
    copies = 1

    def begin(self, net: torch.nn.Module, sent: Flat, memory: Flat) -> None:
        trained = [name for name, p in net.named_parameters() if p.requires_grad]
        self.scaled = ["weight" in name for name in trained]

    def perturbation(self) -> Perturbation | None:
        params = self.params
        return Adaptive(params.rho, params.eta, self.scaled) if params.rho else None


class Adaptive(Perturbation):
    """ASAM's direction; `scaled` says of each parameter whether T is |theta| + eta."""

    def __init__(self, rho: float, eta: float, scaled: list[bool]) -> None:
        super().__init__(rho)
        self.eta, self.scaled = eta, scaled

    def epsilon(self, params: Tensors, grads: Tensors) -> tuple[Tensors, torch.Tensor]:
        weights = [p for p, scaled in zip(params, self.scaled, strict=True) if scaled]
        if not weights:
            return super().epsilon(params, grads)
        scales = torch._foreach_abs(weights)
        torch._foreach_add_(scales, self.eta)
        tg = torch._foreach_mul(
            [g for g, scaled in zip(grads, self.scaled, strict=True) if scaled], scales
        )
        others = [g for g, scaled in zip(grads, self.scaled, strict=True) if not scaled]
        norm = norm_of([*tg, *others], self.stacked)
        torch._foreach_mul_(tg, scales)
        along = iter(tg)
        rest = iter(others)
        return [next(along if s else rest) for s in self.scaled], self.rho / (norm + 1e-12)
