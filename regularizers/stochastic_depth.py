"""Stochastic depth: each batch passes through a random subset of a residual network's blocks.

Huang et al., Deep Networks with Stochastic Depth, ECCV 2016 (https://arxiv.org/abs/1603.09382),
eq. 2-5; default p_L from FedAlign's comparison (Mendieta et al., CVPR 2022).  Block l of L keeps
its residual with probability p_l, drawn once per batch, and

    training    relu(b_l residual(x) + shortcut(x)),  b_l ~ Bernoulli(p_l),
    evaluation  relu(p_l residual(x) + shortcut(x)).

A dropped residual is not computed, so its norm layers see nothing; its parameters' gradient is 0,
so that momentum and weight decay still move them.  The weight p_l is part of the network, on
clients and on the server, since the parameters mean nothing without it: whoever uses
`model.safetensors` elsewhere needs it.  Dividing by p_l in training instead, as dropout does, would
avoid that and describe the same functions, but it trains differently: SGD would move the scale of
a residual 1 / p_l^2 times as far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fl_common.config import Group
from fl_common.deferred import torch
from fl_common.determinism import seed_of, step_seed
from fl_common.models.catalogue import MODELS, skeleton
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from fl_common.config import CoreConfig
    from fl_common.layout import Flat
    from fl_common.models.resnet import Block


class StochasticDepthParams(Group):
    p_l: float = Field(
        0.9,
        gt=0,
        le=1,
        description="p_L, probability that the last block keeps its residual branch; 1: off; "
        "FedAlign's code has 0.5 by default",
    )
    convention: Literal["paper", "code"] = Field(
        "paper",
        description="where the linear decay starts; paper: at the input, p_l = 1 - l/L (1 - p_L); "
        "code: at the first block, which is always kept, p_l = 1 - (l-1)/(L-1) (1 - p_L)",
    )

    def keep(self, blocks: int) -> list[float]:
        """p_1 ... p_L."""
        first, last = (1, blocks) if self.convention == "paper" else (0, max(blocks - 1, 1))
        return [1 - (first + i) / last * (1 - self.p_l) for i in range(blocks)]


class StochasticDepth(Regularizer):
    """Switches the blocks of `fl_common.models.resnet` on and off."""

    name = "stochastic-depth"
    alone = "every client drops other blocks"
    Params = StochasticDepthParams
    params: StochasticDepthParams
    neutral = "stochastic-depth.p-l=1"
    blocks: tuple[Block, ...] = ()

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        name = config.model.name
        residual = [known for known, info in MODELS.items() if info.factory.startswith("resnet:")]
        if name in MODELS:
            found = name in residual
        else:
            net = skeleton(config)
            found = net is None or bool(blocks_of(net))
        if found:
            return []
        return [
            f'regularizers = "{config.regularizers}": stochastic-depth drops residual blocks, and '
            f"model.name = {name} has none; choose one of {', '.join(residual)}, or leave it out"
        ]

    @classmethod
    def prepare(cls, net: torch.nn.Module, params: StochasticDepthParams) -> None:
        blocks = blocks_of(net)
        if not blocks:
            raise ValueError(
                "stochastic-depth drops residual blocks, and this network has none; choose another "
                "or leave it out"
            )
        for block, keep in zip(blocks, params.keep(len(blocks)), strict=True):
            block.keep = keep

    def begin(self, net: torch.nn.Module, sent: Flat, memory: Flat) -> None:
        if self.params.p_l < 1:
            self.blocks = blocks_of(net)

    def transform(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the blocks that all of the step's passes drop.

        On the CPU, from the seed of the step: the draws decide on control flow, and reading them
        from a GPU would wait for it.
        """
        if self.blocks:
            seed = seed_of(self.name, step_seed(x.device.type))
            stream = torch.Generator().manual_seed(seed)
            draws = torch.rand(len(self.blocks), generator=stream).tolist()
            for block, draw in zip(self.blocks, draws, strict=True):
                block.dropped = draw >= block.keep
        return x, y

    @property
    def replays(self) -> bool:
        """Not with more blocks: steps then seldom repeat an earlier pattern."""
        return len(self.blocks) <= 8

    def variant(self) -> tuple[bool, ...]:
        return tuple(block.dropped for block in self.blocks)

    def finish(self) -> None:
        for block in self.blocks:
            block.dropped = False


def blocks_of(net: torch.nn.Module) -> tuple[Block, ...]:
    """The residual blocks, in the order in which they run."""
    from fl_common.models.resnet import Block

    return tuple(module for module in net.modules() if isinstance(module, Block))
