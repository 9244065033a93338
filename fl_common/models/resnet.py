"""Residual networks for images (C, H, W) of any side.

Each is a `Chain`: stem, stages, pool, flatten, fc. `stages[k]` is a Sequential of blocks, so
the last stage's input and output are those of `stages[-1]`. Convolutions have no bias and start
kaiming-normal (fan_out), as in Fling and in FedAlign's code. Where BatchNorm meets a 1 x 1 feature
map (ResNet-8 up to 16 px, the ImageNet stem up to 32 px), torch refuses to train on a batch of one.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional

from fl_common.models.layers import Chain, Conv2d, MaxPool2d, norm2d


def conv2d(inputs: int, outputs: int, kernel: int, stride: int = 1) -> Conv2d:
    conv = Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class PaddedShortcut(nn.Module):
    """Shortcut A of He et al. 2016: every `stride`-th pixel; the new channels are zero."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, 0, self.extra))


def make_shortcut(inputs: int, outputs: int, stride: int, norm: str, kind: str) -> nn.Module:
    """Identity where shapes agree; else kind A (zero padding) or B (1x1 convolution and norm)."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "A":
        return PaddedShortcut(inputs, outputs, stride)
    layers = ("conv", conv2d(inputs, outputs, 1, stride)), ("norm", norm2d(norm, outputs))
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """y = relu(residual(x) + shortcut(x)); (B, inputs, H, W) to (B, outputs, H/stride, W/stride).

    The shortcut is registered and runs after the residual's layers: FedPart's order of groups.
    """

    keep = 1.0
    """p_l of stochastic depth, the residual's weight in evaluation mode."""
    dropped = False
    """Whether a batch in training mode goes without the residual, y = relu(shortcut(x))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.dropped:
            return self.relu(self.shortcut(x))
        residual = self.residual(x)
        if not self.training and self.keep != 1.0:
            residual = self.keep * residual
        return self.relu(residual + self.shortcut(x))


class BasicBlock(Block):
    """Two 3x3 convolutions; the first has the stride."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, norm: str, shortcut: str):
        super().__init__()
        self.conv1 = conv2d(inputs, planes, 3, stride)
        self.norm1 = norm2d(norm, planes)
        self.relu1 = nn.ReLU()
        self.conv2 = conv2d(planes, planes, 3)
        self.norm2 = norm2d(norm, planes)
        self.shortcut = make_shortcut(inputs, planes, stride, norm, shortcut)
        self.relu = nn.ReLU()

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))


class Bottleneck(Block):
    """1x1, 3x3 (with the stride, as in torchvision) and 1x1 to 4 x `planes` channels."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, norm: str, shortcut: str):
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = conv2d(inputs, planes, 1)
        self.norm1 = norm2d(norm, planes)
        self.relu1 = nn.ReLU()
        self.conv2 = conv2d(planes, planes, 3, stride)
        self.norm2 = norm2d(norm, planes)
        self.relu2 = nn.ReLU()
        self.conv3 = conv2d(planes, outputs, 1)
        self.norm3 = norm2d(norm, outputs)
        self.shortcut = make_shortcut(inputs, outputs, stride, norm, shortcut)
        self.relu = nn.ReLU()

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        x = self.relu2(self.norm2(self.conv2(x)))
        return self.norm3(self.conv3(x))


def _resnet(
    shape: tuple[int, ...],
    classes: int,
    norm: str,
    planes: tuple[int, ...],
    depths: tuple[int, ...],
    block: type[BasicBlock | Bottleneck] = BasicBlock,
    shortcut: str = "B",
    imagenet: bool = False,
) -> Chain:
    """Stage k has `depths[k]` blocks of `planes[k]` planes and halves the side if k > 0."""
    kernel, stride = (7, 2) if imagenet else (3, 1)
    stem = [
        ("conv", conv2d(shape[0], planes[0], kernel, stride)),
        ("norm", norm2d(norm, planes[0])),
        ("relu", nn.ReLU()),
    ]
    if imagenet:
        stem.append(("pool", MaxPool2d(3, 2, padding=1)))
    stages, width = [], planes[0]
    for k, (plane, depth) in enumerate(zip(planes, depths, strict=True)):
        blocks = []
        for j in range(depth):
            blocks.append(block(width, plane, 2 if k and not j else 1, norm, shortcut))
            width = plane * block.expansion
        stages.append(nn.Sequential(*blocks))
    return Chain(
        [
            ("stem", nn.Sequential(OrderedDict(stem))),
            ("stages", nn.Sequential(*stages)),
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("fc", nn.Linear(width, classes)),
        ]
    )


def resnet8(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """Fling's ResNet-8 (FedPart): ImageNet stem, one BasicBlock at each of 64, 128, 256."""
    return _resnet(shape, classes, norm, (64, 128, 256), (1, 1, 1), imagenet=True)


def resnet18(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """ResNet-18 with the CIFAR stem: 3x3 with stride 1 and no pooling."""
    return _resnet(shape, classes, norm, (64, 128, 256, 512), (2, 2, 2, 2))


def resnet18_imagenet(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """ResNet-18 of He et al. 2016: 7x7 stem with stride 2, then max pooling."""
    return _resnet(shape, classes, norm, (64, 128, 256, 512), (2, 2, 2, 2), imagenet=True)


def resnet20(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """ResNet-20 of He et al. 2016, section 4.2, shortcut A."""
    return _resnet(shape, classes, norm, (16, 32, 64), (3, 3, 3), shortcut="A")


def resnet20_b(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """ResNet-20 with shortcut B."""
    return _resnet(shape, classes, norm, (16, 32, 64), (3, 3, 3))


def resnet56(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """ResNet-56 of He et al. 2016, section 4.2, shortcut A."""
    return _resnet(shape, classes, norm, (16, 32, 64), (9, 9, 9), shortcut="A")


def resnet56_b(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """ResNet-56 with shortcut B."""
    return _resnet(shape, classes, norm, (16, 32, 64), (9, 9, 9))


def resnet56_bottleneck(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """The "ResNet56" of FedAlign and FedML: Bottleneck blocks, planes 16, 32, 64, times 4."""
    return _resnet(shape, classes, norm, (16, 32, 64), (6, 6, 6), block=Bottleneck)
