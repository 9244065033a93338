"""FedAlign: the last stage's Lipschitz constant, matched between full and reduced width.

Mendieta et al., Local Learning Matters: Rethinking Data Heterogeneity in Federated Learning, CVPR
2022 (https://arxiv.org/abs/2111.14213), eq. 5-7.  What the paper leaves open is as in the official
code (https://github.com/mmendiet/FedAlign): division by the number of positions, X sliced for the
slim pass, full features without gradient.  X (B, C1, H1, W1) and Y (B, C2, H, W) are the last
stage's input and output, Y_S is its output at width omega on the first channels X' of X, sigma is
the spectral norm, and T(P, Q) = P Q^T / (H W) per sample, with P average-pooled to Q's size:

    L_lip = mean_B (sigma(T(X', Y_S)) - sigma(T(X, Y)))^2,    loss + mu (CE / L_lip) L_lip,

where the ratio counts as a constant.  Only the last stage's first channels get a gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from fl_common.config import Group
from fl_common.deferred import torch
from fl_common.models.catalogue import skeleton
from fl_common.passes import criterion_of, extra_pass, is_main_pass
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from fl_common.config import CoreConfig
    from fl_common.layout import Flat

ITERATIONS = 10
"""Power iterations, from the vector of ones, as in the official code."""
EPS = 1e-12
"""Added to an iterate's norm, which all-zero features make 0; an L_lip below it counts as 0."""


class FedAlignParams(Group):
    mu: float = Field(
        0.05, ge=0, description="weight mu of the term; 0: off; the official README has 0.45"
    )
    omega: float = Field(
        0.8, gt=0, le=1, description="width of the slim pass; the official README has 0.25"
    )


class FedAlign(Regularizer):
    """The value of the term is mu CE; its gradient is mu (CE / L_lip) grad L_lip."""

    name = "fedalign"
    replays = True
    alone = "its slim pass takes the network's own tensors"
    Params = FedAlignParams
    params: FedAlignParams
    refuses: ClassVar = {
        "mixup": "FedAlign weighs its term by the loss on the labels that came with the batch, "
        "which a mixed batch may contain little of; choose one of them"
    }
    neutral = "fedalign.mu=0"

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        net = skeleton(config)
        problem = unfit(net, config.fedalign.omega) if net else ""
        return [f"fedalign with model.name = {config.model.name}: {problem}"] if problem else []

    @classmethod
    def prepare(cls, net: torch.nn.Module, params: FedAlignParams) -> None:
        if problem := unfit(net, params.omega):
            raise ValueError(f"fedalign: {problem}")

    def begin(self, net: torch.nn.Module, sent: Flat, memory: Flat) -> None:
        if not self.params.mu:
            return
        from fl_common.stage import last_stage

        self.net, self.stage = net, last_stage(net)
        self.criterion = criterion_of(net)
        self.hooks = (
            self.stage.first.register_forward_pre_hook(self._enter),
            self.stage.last.register_forward_hook(self._leave),
        )

    def _enter(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if is_main_pass(self.net):
            self.x = args[0].detach()

    def _leave(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if is_main_pass(self.net):
            self.y = output.detach()

    def data_term(
        self, x: torch.Tensor, output: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor | float:
        if not self.params.mu:
            return 0.0
        l_lip = self.lipschitz(self.x, self.y)
        del self.x, self.y
        ce = self.criterion(output.detach(), y)
        ratio = torch.where(l_lip < EPS, 0.0, ce / l_lip).detach()
        return self.params.mu * ratio * l_lip

    def lipschitz(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """L_lip, a scalar in float32 or wider, of the stage's input and output."""
        with extra_pass():
            with torch.no_grad():
                for module in self.stage.after:
                    y = module(y)
            inputs = self.stage.inputs(self.params.omega)
            slim = self.stage.slim(x[:, :inputs], self.params.omega)
        with torch.autocast(x.device.type, enabled=False):
            p = features(x, like=y)
            with torch.no_grad():
                full = spectral_norm(p, features(y))
            return (spectral_norm(p[:, :inputs], features(slim)) - full).square().mean()


def unfit(net: torch.nn.Module, omega: float) -> str:
    """Why there is nothing to align in `net` at this width, with the remedy; "" if there is."""
    from fl_common.slim import narrower
    from fl_common.stage import last_stage

    try:
        stage = last_stage(net)
    except TypeError as unknown:
        return f"{unknown}; make it a Sequential of torch's layers, or leave fedalign out"
    if stage.shrinks(omega):
        return ""
    remedy = narrower("fedalign.omega", stage.shrinks)
    return f"its last stage is no narrower at fedalign.omega = {omega}; {remedy}"


def features(x: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """(B, C, H W) in float32 or wider; average-pooled to the size of `like`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if like is not None and x.shape[2:] != like.shape[2:]:
        x = torch.nn.functional.adaptive_avg_pool2d(x, like.shape[2:])
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def spectral_norm(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """sigma (B,) of T = P Q^T / n for P (B, c, n) and Q (B, c', n), by power iteration.

    From v = 1: u = T T^T v, v = u / ||u||, sigma = sqrt(||u||).  Iterates in the smallest of the
    spaces that this map goes through, of size c, c' or n, which differs by rounding alone.
    """
    n = p.shape[2]
    if n <= min(p.shape[1], q.shape[1]):  # z = P^T v
        z, maps = p.sum(1).unsqueeze(2), (q.mT @ q / n**2, p.mT @ p)
    else:
        t = p @ q.mT / n
        if p.shape[1] <= q.shape[1]:  # z = v
            z, maps = torch.ones_like(t[:, :, :1]), (t @ t.mT, None)
        else:  # z = T^T v
            z, maps = t.sum(1).unsqueeze(2), (None, t.mT @ t)
    for _ in range(ITERATIONS):
        half = z if maps[0] is None else torch.bmm(maps[0], z)
        image = half if maps[1] is None else torch.bmm(maps[1], half)
        norm = (torch.bmm(half.mT, image) + EPS**2).sqrt()  # of u
        z = image / norm
    return norm.sqrt().flatten()
