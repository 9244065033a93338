"""The last stage of a network, which FedAlign runs a second time at reduced width."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from fl_common.models.resnet import Block
from fl_common.slim import Layer, Slim, flattened, kept

Pool = nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveMaxPool2d | nn.AdaptiveAvgPool2d


@dataclass(frozen=True)
class Stage:
    """Where the stage's input X and output Y are seen, and the stage at any width."""

    first: nn.Module
    """X is its input."""
    last: nn.Module
    """Y is its output, passed through `after`."""
    after: list[nn.Module]
    slim: Slim
    channels: int
    """C1, of X."""

    def inputs(self, omega: float) -> int:
        """How many channels X' has."""
        return kept(omega * self.channels, self.channels)

    def shrinks(self, omega: float) -> bool:
        """Whether this width is any narrower than the full one."""
        return self.inputs(omega) < self.channels or self.slim.shrinks(omega)


def last_stage(net: nn.Module) -> Stage:
    """`stages[-1]` of a residual network.  Else, of a Sequential, the last convolution before the
    classifier with its norm and activation, before pooling; without convolutions the last linear
    layer before the classifier.  An activation that stands after its pool is taken before it, with
    which a max pool commutes.  Raises TypeError if there is no such stage, or it cannot be
    narrowed."""
    stages = getattr(net, "stages", None)
    if isinstance(stages, nn.Sequential) and len(stages):
        members = before_pool = [stages[-1]]
    else:
        modules = list(flattened(net.children())) if isinstance(net, nn.Sequential) else []
        hidden = [m for m in modules if isinstance(m, Layer | Block)][:-1]
        if not hidden:
            raise TypeError("it is not a Sequential with a layer before the classifier")
        spatial = [m for m in hidden if not isinstance(m, nn.Linear)]
        start = modules.index((spatial or hidden)[-1])
        ends = Layer | nn.Flatten | nn.Dropout | nn.Dropout2d
        rest = [modules[start], *takewhile(lambda m: not isinstance(m, ends), modules[start + 1 :])]
        members = [m for m in rest if not isinstance(m, Pool)]
        before_pool = list(takewhile(lambda m: not isinstance(m, Pool), rest))
    layer = next(m for m in members[0].modules() if isinstance(m, Layer))
    return Stage(
        first=members[0],
        last=before_pool[-1],
        after=members[len(before_pool) :],
        slim=Slim(members),
        channels=layer.weight.shape[1],
    )
