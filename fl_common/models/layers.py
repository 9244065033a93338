"""What every model of the catalogue is made of: a chain of named modules, norm layers, a head."""

from collections import OrderedDict
from collections.abc import Iterable
from math import isfinite

import torch
from torch import nn


class Chain(nn.Sequential):
    """A classifier made of named modules called in order; the last, `fc`, is an `nn.Linear`.

    `fc` reads the representation z (B, `fc.in_features`) and gives logits (B, classes). Children
    are registered in the order in which they run, and every ReLU is a module of its own, so
    that a forward hook sees each call once.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]):
        super().__init__(OrderedDict(modules))

    def represent(self, x: torch.Tensor) -> torch.Tensor:
        """The representation z (B, `fc.in_features`) of x (B, *shape)."""
        for module in list(self.children())[:-1]:
            x = module(x)
        return x


class Representation(nn.Module):
    """A network without its classifier: x (B, *shape) to z (B, `fc.in_features`).

    Its parameters are the network's own, with `net.` before their names.
    """

    def __init__(self, net: Chain):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.represent(x)


class ProjectionHead(nn.Sequential):
    """MOON's head (Li et al. 2021): Linear(d, d), ReLU, Linear(d, width), on (B, d)."""

    def __init__(self, d: int, width: int = 256):
        layers = ("fc1", nn.Linear(d, d)), ("relu1", nn.ReLU()), ("fc2", nn.Linear(d, width))
        super().__init__(OrderedDict(layers))


def with_head(model: Chain, width: int = 256) -> Chain:
    """The layers of `model` (shared, not copied) with a head between them and a new `fc`.

    The classifier reads the head's output, as in MOON's code; FedAlign's MOON baseline does the
    same with a ResNet.
    """
    *body, (_, fc) = model.named_children()
    head = ProjectionHead(fc.in_features, width)
    return Chain([*body, ("head", head), ("fc", nn.Linear(width, fc.out_features))])


class GroupNorm(nn.GroupNorm):
    """torch's; but on a GPU bfloat16 maps stay bfloat16, with statistics in float32, where autocast
    would make a float32 copy of every activation, and channels-last maps have kernels of their
    own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cuda:
            return super().forward(x)
        # The kernels have no double backward, which flatness needs in evaluation mode.
        once = self.training or not torch.is_grad_enabled()
        if self.affine and once and _innermost(x):
            from fl_common.models import groupnorm  # imports Triton, which takes a second

            if groupnorm.compiles(x.device):
                return groupnorm.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return nn.functional.group_norm(x, self.num_groups, weight, bias, self.eps)


def _innermost(x: torch.Tensor) -> bool:
    """Whether this is a map with channels innermost, of float32 or bfloat16, and not under vmap."""
    if torch._C._are_functorch_transforms_active() or x.dim() != 4:
        return False
    known = x.dtype in (torch.float32, torch.bfloat16)
    return known and x.is_contiguous(memory_format=torch.channels_last)


class Conv2d(nn.Conv2d):
    """torch's, with a padding that keeps the side at stride 1.  On a 1 x 1 map every stride gives
    the same output; but with stride 2 on a CPU, the gradient of a bfloat16 kernel has uninitialised
    memory in it (torch 2.13), so stride 1 is taken."""

    def stride_on(self, x: torch.Tensor) -> tuple[int, ...]:
        return (1, 1) if x.shape[-2:] == (1, 1) else self.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(
            x, self.weight, self.bias, self.stride_on(x), self.padding, self.dilation, self.groups
        )


class MaxPool2d(nn.MaxPool2d):
    """torch's, bit for bit.  A CPU takes large float32 maps (B, C, H, W) through oneDNN, several
    times faster than torch's own loop over maps that are not channels-last."""

    LARGE = 1 << 16
    """Elements from which a batch of maps is large; to oneDNN's tensors and back takes 0.2 ms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # oneDNN's has no double backward, which flatness needs in evaluation mode.
        once = self.training or not torch.is_grad_enabled()
        if not (once and x.numel() >= self.LARGE and _for_onednn(x)):
            return super().forward(x)
        size = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        return torch.mkldnn_max_pool2d(x.to_mkldnn(), *size).to_dense()


def _for_onednn(x: torch.Tensor) -> bool:
    """Whether oneDNN can take `x` (it takes no tensor under vmap) and finds the same maxima: it
    passes over NaN and -inf."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and not wrapped and isfinite(x.detach().sum())


def norm2d(norm: str, channels: int, groups: int = 2) -> nn.Module:
    """BatchNorm2d for `batch`; for `group`, GroupNorm of 2 groups at every width by default.

    2 is the group count that FedDC (gaoliang13/FedDC, utils_models.py) puts in place of each
    BatchNorm of its ResNet-18, whatever its width.
    """
    return nn.BatchNorm2d(channels) if norm == "batch" else GroupNorm(groups, channels)
