"""A network, or a part of it, at reduced width: of every layer the first channels alone.

As in slimmable networks (Yu et al., ICLR 2019, https://arxiv.org/abs/1812.08928) and in FedAlign's
code (https://github.com/mmendiet/FedAlign), but as a function of an ordinary network, whose
modules, parameters and buffers stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from fl_common.models.layers import Conv2d
from fl_common.models.resnet import Block, PaddedShortcut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Layer = nn.Conv2d | nn.Linear
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def kept(v: float, channels: int) -> int:
    """m(v): about v of `channels`, in steps of 8, not below 0.9 v."""
    n = max(1, int((v + 4) // 8) * 8)
    return min(n + 8 if n < 0.9 * v else n, channels)


def flattened(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """What runs in turn when the modules do: those in a Sequential one by one."""
    for module in modules:
        if isinstance(module, nn.Sequential):
            yield from flattened(module)
        else:
            yield module


def narrower(key: str, shrinks: Callable[[float], bool]) -> str:
    """The remedy for a width, given as `key`, at which nothing shrinks."""
    widest = next((w / 100 for w in range(99, 0, -1) if shrinks(w / 100)), None)
    return f"set {key} to {widest} or less" if widest else "choose a wider model"


class Slim:
    """Modules in the order in which they run, to be run at any width omega, 0 < omega <= 1.

    A layer with C outputs gives its first m(omega C), and reads as many inputs as come in.  Before
    a GroupNorm that is rounded down to whole groups, at least one, of as many channels as in the
    full network.  BatchNorm takes the batch's own statistics and leaves the running ones alone.
    """

    def __init__(self, modules: Iterable[nn.Module], whole: nn.Module | None = None) -> None:
        """`whole`: a layer that keeps all its outputs.  Raises TypeError for modules with
        parameters that cannot be narrowed here."""
        self.modules = list(flattened(modules))
        self.multiples: dict[nn.Module, int] = {}
        """By layer, what its number of outputs is a multiple of."""
        self.branches: dict[nn.Module, tuple[Slim, Slim]] = {}
        """The residual and the shortcut of a block."""
        multiple = 1
        for module in reversed(self.modules):
            if isinstance(module, Block):
                *residual, shortcut, _ = module.children()
                self.branches[module] = Slim(residual), Slim([shortcut])
            elif isinstance(module, nn.GroupNorm):
                multiple = module.num_channels // module.num_groups
            elif isinstance(module, Layer):
                self.multiples[module] = module.weight.shape[0] if module is whole else multiple
                multiple = 1
            if not _is_known(module):
                raise TypeError(f"{type(module).__name__} cannot be run at reduced width")

    def width(self, layer: Layer, omega: float) -> int:
        """How many outputs of `layer` there are."""
        channels, multiple = layer.weight.shape[0], self.multiples[layer]
        return max(1, kept(omega * channels, channels) // multiple) * multiple

    def shrinks(self, omega: float) -> bool:
        """Whether any layer has fewer outputs than in the full network."""
        own = any(self.width(layer, omega) < layer.weight.shape[0] for layer in self.multiples)
        return own or any(part.shrinks(omega) for both in self.branches.values() for part in both)

    def __call__(self, x: torch.Tensor, omega: float) -> torch.Tensor:
        """(B, c, ...) with the first c input channels to (B, c', ...)."""
        for module in self.modules:
            if isinstance(module, Layer):
                x = _layer(module, x, self.width(module, omega))
            elif isinstance(module, Block):
                x = self._block(module, x, omega)
            elif isinstance(module, BatchNorm | nn.GroupNorm):
                x = _norm(module, x)
            elif isinstance(module, PaddedShortcut):
                x = x[:, :, :: module.stride, :: module.stride]  # the block pads to its width
            else:
                x = module(x)
        return x

    def _block(self, block: Block, x: torch.Tensor, omega: float) -> torch.Tensor:
        """Without its residual, where stochastic depth has dropped that for this batch."""
        residual, shortcut = self.branches[block]
        last = next(m for m in reversed(residual.modules) if isinstance(m, Layer))
        y = _with_channels(shortcut(x, omega), residual.width(last, omega))
        return block.relu(y if block.dropped else residual(x, omega) + y)


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    known = isinstance(module, Block | nn.Linear | BatchNorm | nn.GroupNorm)
    return known or next(module.parameters(), None) is None


def _layer(layer: Layer, x: torch.Tensor, outputs: int) -> torch.Tensor:
    weight, bias = layer.weight, layer.bias
    is_linear = isinstance(layer, nn.Linear)
    inputs = x.shape[-1 if is_linear else 1]
    if weight.shape[:2] != (outputs, inputs):
        # weight[:outputs, :inputs]; as a padding below zero its gradient is made in one pass.
        sides = [0, 0] * (weight.dim() - 2)
        less = (0, inputs - weight.shape[1], 0, outputs - weight.shape[0])
        weight = functional.pad(weight, (*sides, *less))
        bias = None if bias is None else bias[:outputs]
    if is_linear:
        return functional.linear(x, weight, bias)
    stride = layer.stride_on(x) if isinstance(layer, Conv2d) else layer.stride
    return functional.conv2d(x, weight, bias, stride, layer.padding, layer.dilation)


def _norm(norm: BatchNorm | nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    channels = x.shape[1]
    weight, bias = (None if p is None else p[:channels] for p in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        groups = channels * norm.num_groups // norm.num_channels
        return functional.group_norm(x, groups, weight, bias, norm.eps)
    # Not functional.batch_norm, which refuses one value per channel: a smaller image may come to
    # that where the full one does not.
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, None, None, True, 0.0, norm.eps, cudnn)


def _with_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """x (B, c, H, W) with zero channels added to c, or the last left out."""
    missing = channels - x.shape[1]
    return functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
