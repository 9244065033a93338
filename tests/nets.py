"""Networks of the catalogue and batches for them, the same ones every time."""

from __future__ import annotations

import torch
from torch import nn

from fl_common.local import Work
from fl_common.models.catalogue import build

WORK = Work(omega=1.0, steps=1, lr=0.1, nominal_steps=1, base_lr=0.1)
SHAPE = (3, 32, 32)


def model(name: str = "resnet8", shape=SHAPE, **options) -> nn.Module:
    torch.manual_seed(0)
    return build(name, classes=10, shape=shape, **options).train()


def batch(size: int = 6, shape=SHAPE, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *shape, generator=generator, dtype=dtype)
    return x, torch.randint(10, (size,), generator=generator)
