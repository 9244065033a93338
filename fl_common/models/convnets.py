"""Plain networks with biases and torch's default initialisation; each is a `Chain`.

Layers are named conv1, relu1, pool1, conv2, ..., flatten, fc1, ..., fc. All but `mlp` take
images (C, H, W); the first fully connected layer fits the side.
"""

from itertools import pairwise
from math import prod

from torch import nn

from fl_common.models.layers import Chain, GroupNorm, MaxPool2d, norm2d, with_head


def _dense(widths: tuple[int, ...], classes: int, first_relu: int) -> list[tuple[str, nn.Module]]:
    """Linear and ReLU from each width to the next, then `fc`; ReLUs number from `first_relu`."""
    layers = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        layers.append((f"fc{i + 1}", nn.Linear(inputs, outputs)))
        layers.append((f"relu{first_relu + i}", nn.ReLU()))
    return [*layers, ("fc", nn.Linear(widths[-1], classes))]


def _lenet(
    shape: tuple[int, ...], classes: int, channels: tuple[int, int], hidden: tuple[int, int]
) -> Chain:
    """Twice [conv 5x5, ReLU, max pool 2], two hidden layers, fc."""
    first, second = channels
    height, width = (((side - 4) // 2 - 4) // 2 for side in shape[1:])
    return Chain(
        [
            ("conv1", nn.Conv2d(shape[0], first, 5)),
            ("relu1", nn.ReLU()),
            ("pool1", MaxPool2d(2)),
            ("conv2", nn.Conv2d(first, second, 5)),
            ("relu2", nn.ReLU()),
            ("pool2", MaxPool2d(2)),
            ("flatten", nn.Flatten()),
            *_dense((second * height * width, *hidden), classes, first_relu=3),
        ]
    )


def lenet(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """LeNet: channels 6 and 16; 400-120-84-classes at 32 px."""
    return _lenet(shape, classes, (6, 16), (120, 84))


def lenet64(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """The LeNet of FedDyn, FedDC and MAN: 64 channels; 1600-384-192-classes at 32 px."""
    return _lenet(shape, classes, (64, 64), (384, 192))


def moon_cnn(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """MOON's simple-CNN: the layers of `lenet` up to 84, head 84-84-256, 256-classes."""
    return with_head(lenet(shape, classes, norm), width=256)


def cnn(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """Two conv 3x3 (32, 64), one max pool, dropout; 12544-128-classes at 32 px."""
    height, width = ((side - 4) // 2 for side in shape[1:])
    return Chain(
        [
            ("conv1", nn.Conv2d(shape[0], 32, 3)),
            ("relu1", nn.ReLU()),
            ("conv2", nn.Conv2d(32, 64, 3)),
            ("relu2", nn.ReLU()),
            ("pool", MaxPool2d(2)),
            ("dropout1", nn.Dropout(0.25)),
            ("flatten", nn.Flatten()),
            ("fc1", nn.Linear(64 * height * width, 128)),
            ("relu3", nn.ReLU()),
            ("dropout2", nn.Dropout(0.5)),
            ("fc", nn.Linear(128, classes)),
        ]
    )


def tiny_convnet(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """MAN's ConvNet for Tiny-ImageNet: 4096-512-384-classes at 64 px; always GroupNorm(4).

    Thrice [conv 3x3 64, GroupNorm, ReLU, max pool 2]. ReLU and max pooling commute; the third
    ReLU stands after its pool, because there MAN's code penalises the activation
    (vcl-iisc/fedMAN, man_code_sam/utils_models.py), so that ReLU outputs are MAN's five terms.
    """
    layers, inputs = [], shape[0]
    for i in (1, 2, 3):
        relu, pool = (f"relu{i}", nn.ReLU()), (f"pool{i}", MaxPool2d(2))
        layers.append((f"conv{i}", nn.Conv2d(inputs, 64, 3, padding=1)))
        layers.append((f"norm{i}", GroupNorm(4, 64)))
        layers += [pool, relu] if i == 3 else [relu, pool]
        inputs = 64
    features = 64 * (shape[1] // 8) * (shape[2] // 8)
    dense = _dense((features, 512, 384), classes, first_relu=4)
    return Chain([*layers, ("flatten", nn.Flatten()), *dense])


def digits_cnn(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """For small images such as scikit-learn's digits (1, 8, 8); `group` is GroupNorm(4).

    Twice [conv 3x3 (16, 32), norm, ReLU], a max pool between them; 512-classes at 8 px.
    Trained centrally on the digits (10 epochs, SGD 0.1, batch 32) it reaches 0.98; without norm
    layers it needs standardised inputs for that.
    """
    return Chain(
        [
            ("conv1", nn.Conv2d(shape[0], 16, 3, padding=1)),
            ("norm1", norm2d(norm, 16, groups=4)),
            ("relu1", nn.ReLU()),
            ("pool", MaxPool2d(2)),
            ("conv2", nn.Conv2d(16, 32, 3, padding=1)),
            ("norm2", norm2d(norm, 32, groups=4)),
            ("relu2", nn.ReLU()),
            ("flatten", nn.Flatten()),
            ("fc", nn.Linear(32 * (shape[1] // 2) * (shape[2] // 2), classes)),
        ]
    )


def mlp(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """F-64-32-classes with ReLU; F is the number of features, or of an image's values."""
    return Chain([("flatten", nn.Flatten()), *_dense((prod(shape), 64, 32), classes, first_relu=1)])
