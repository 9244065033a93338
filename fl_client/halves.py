"""bfloat16 copies of a network's weights, all of them made at once.

Autocast copies each weight of a convolution or a linear layer by itself, and its gradient back: two
kernels a layer, each too small for a card.  One copy of all of them has the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fl_common.models.layers import Chain, Conv2d

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_common.config import Train
    from fl_common.local import LocalMethod

CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv2d)
"""Layers whose parameters autocast copies."""


def halved(
    net: nn.Module, settings: Train, methods: Sequence[LocalMethod]
) -> dict[str, torch.Tensor]:
    """The parameters of `net` that a pass has in bfloat16; none in networks that are not the
    catalogue's, which may compute with their weights, and with methods whose data terms may run the
    network again."""
    known = type(net) is Chain and not any(method.alone for method in methods)
    if settings.dtype != "bfloat16" or not known:
        return {}
    return {
        name: parameter
        for path, module in net.named_modules()
        if type(module) in CAST
        for name, parameter in module.named_parameters(path, recurse=False)
    }


def copies(params: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """bfloat16 copies of these parameters; their gradients flow back to the parameters."""
    return dict(zip(params, _Halves.apply(*params.values()), strict=True))


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        halves = _copied(weights, torch.bfloat16)
        frozen = [h for h, w in zip(halves, weights, strict=True) if not w.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return tuple(halves)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = [g for g, needed in zip(grads, ctx.needs_input_grad, strict=True) if needed]
        found = iter(_copied(wanted, torch.float32))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


def _copied(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    copied = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copied, list(tensors))
    return copied
