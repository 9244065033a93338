"""A classifier of short documents; a `Chain`.

A document of L tokens out of V has shape (V, L), one column per token with a single 1; the input is
mostly their ids instead.
"""

import torch
from torch import nn

from fl_common.models.layers import Chain


class Words(nn.Embedding):
    """x (B, L) int64 ids, or (B, V, L) float columns, to vectors (B, width, L).

    A column of weights gives the weighted sum of the words' vectors.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vectors = x.mT @ self.weight if x.is_floating_point() else super().forward(x)
        return vectors.mT


class Windows(nn.ModuleDict):
    """Windows of every width w beside each other: conv w, ReLU, maximum over time.

    (B, C, L) to (B, len(widths) * channels).  A maximum that is reached twice shares its gradient
    (amax), which needs no atomic sums on a GPU.
    """

    def __init__(self, inputs: int, channels: int, widths: tuple[int, ...]):
        super().__init__({f"width{w}": nn.Sequential() for w in widths})
        for w, branch in zip(widths, self.values(), strict=True):
            branch.add_module("conv", nn.Conv1d(inputs, channels, w))
            branch.add_module("relu", nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x).amax(2) for branch in self.values()], dim=1)


def text_cnn(shape: tuple[int, ...], classes: int, norm: str) -> Chain:
    """Kim's CNN-rand, smaller: vectors of 32, windows of 3, 4 and 5 tokens with 32 channels each.

    Kim, Convolutional Neural Networks for Sentence Classification, EMNLP 2014
    (https://arxiv.org/abs/1408.5882): there vectors of 300 and 100 channels; dropout of 0.5 before
    `fc` as there, its bound on the rows of `fc` left out.  Token 0 is padding: its vector is zero
    at first and gets no gradient from ids.
    """
    return Chain(
        [
            ("words", Words(shape[0], 32, padding_idx=0)),
            ("windows", Windows(32, 32, (3, 4, 5))),
            ("dropout", nn.Dropout(0.5)),
            ("fc", nn.Linear(96, classes)),
        ]
    )
