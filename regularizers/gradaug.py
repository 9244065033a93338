"""GradAug: sub-networks on resized images learn from the whole network's outputs.

Yang et al., GradAug, NeurIPS 2020 (https://arxiv.org/abs/2006.07989), as in FedAlign's comparison
(eq. 2 of https://arxiv.org/abs/2111.14213; https://github.com/mmendiet/FedAlign):

    loss + mu sum_{j=1..n} KL(softmax(f(x)) || softmax(f_{w_j}(x_j)))

where f_w is the network at width w, which shares the first channels of f's layers, x_j the batch
resized to a random side, and f(x) counts as a constant.  The widths are omega_min and n - 1 draws
from U[omega_min, 1]; the first layer keeps all its inputs and the classifier all its outputs.  A
network that flattens a feature map accepts one image size only, so its sub-networks see the images
unresized.

Draws are made on the host, from the seed that the trainer gives the device's generator for each
step and not from that generator: nothing waits for a GPU, and SAM's second pass repeats them.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from pydantic import Field

from fl_common.config import Group
from fl_common.deferred import torch
from fl_common.determinism import seed_of, step_seed
from fl_common.models.catalogue import skeleton
from fl_common.passes import extra_pass
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from fl_common.config import CoreConfig
    from fl_common.layout import Flat
    from fl_common.slim import Slim

SIDES = (1.0, 7 / 8, 3 / 4, 5 / 8)
"""Published for 32 px: 32, 28, 24, 20."""
SIDES_224 = (1.0, 6 / 7, 5 / 7, 4 / 7)
"""Published for 224 px: 224, 192, 160, 128."""


class GradAugParams(Group):
    mu: float = Field(1.75, ge=0, description="weight mu of a sub-network's term; 0: off")
    omega_min: float = Field(
        0.25,
        gt=0,
        le=1,
        description="smallest width of a sub-network; GradAug's own CIFAR setting is 0.8",
    )
    n: int = Field(2, ge=0, description="sub-networks per step; 0: off")


class GradAug(Regularizer):
    """BatchNorm's running statistics follow only the whole network."""

    name = "gradaug"
    alone = "every client draws sub-networks of its own"
    Params = GradAugParams
    params: GradAugParams
    neutral = "gradaug.n=0"
    tries: bool | None = None
    """cuDNN's `benchmark` flag before this round; None if this round leaves it alone."""

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        net = skeleton(config)
        problem = unfit(net, config.gradaug.omega_min) if net else ""
        return [f"gradaug with model.name = {config.model.name}: {problem}"] if problem else []

    @classmethod
    def prepare(cls, net: torch.nn.Module, params: GradAugParams) -> None:
        if problem := unfit(net, params.omega_min):
            raise ValueError(f"gradaug: {problem}")

    def begin(self, net: torch.nn.Module, sent: Flat, memory: Flat) -> None:
        self.slim, self.resizes = whole_net(net), takes_any_side(net)
        if self.params.mu and self.params.n:
            # Shapes change with every step: benchmarking cuDNN's kernels for each costs more time.
            self.tries = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = False

    def finish(self) -> None:
        if self.tries is not None:
            torch.backends.cudnn.benchmark, self.tries = self.tries, None

    def data_term(
        self, x: torch.Tensor, output: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor | float:
        mu, n, omega_min = self.params.mu, self.params.n, self.params.omega_min
        if not (mu and n):
            return 0.0
        draws = random.Random(seed_of("gradaug", step_seed(x.device.type)))
        widths = sorted([omega_min, *(draws.uniform(omega_min, 1) for _ in range(n - 1))])
        if x.dim() == 4:  # faster on the CPU: pooling above all
            x = x.contiguous(memory_format=torch.channels_last)
        with extra_pass():
            parts = [self.slim(self._resized(x, draws), width) for width in reversed(widths)]
        teacher = log_softmax(output.detach())
        return mu * sum(
            torch.nn.functional.kl_div(
                log_softmax(part), teacher, reduction="batchmean", log_target=True
            )
            for part in parts
        )

    def _resized(self, x: torch.Tensor, draws: random.Random) -> torch.Tensor:
        """The images (B, C, H, W) at one of four sizes; all else as it is."""
        if not self.resizes or x.dim() != 4:
            return x
        share = draws.choice(SIDES_224 if x.shape[2] == 224 else SIDES)
        size = [max(1, round(share * side)) for side in x.shape[2:]]
        return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)


def unfit(net: torch.nn.Module, omega_min: float) -> str:
    """Why `net` has no sub-networks, with the remedy; "" if it has."""
    from fl_common.slim import narrower

    try:
        slim = whole_net(net)
    except TypeError as unknown:
        return f"{unknown}; make it a Sequential of torch's layers, or leave gradaug out"
    if slim.shrinks(omega_min) or takes_any_side(net):
        return ""
    remedy = narrower("gradaug.omega-min", slim.shrinks)
    return f"it is no narrower at gradaug.omega-min = {omega_min}, and has one side; {remedy}"


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """(B, C) in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def whole_net(net: torch.nn.Module) -> Slim:
    """All of a Sequential that ends in a linear classifier.  Raises TypeError for others."""
    from fl_common.slim import Slim, flattened

    modules = list(flattened(net.children())) if isinstance(net, torch.nn.Sequential) else []
    if not modules or not isinstance(modules[-1], torch.nn.Linear):
        raise TypeError("it is not a Sequential that ends in a linear classifier")
    return Slim(modules, whole=modules[-1])


def takes_any_side(net: torch.nn.Module) -> bool:
    """Whether features are pooled to one size, whatever the images'."""
    return any(isinstance(module, torch.nn.AdaptiveAvgPool2d) for module in net.modules())
