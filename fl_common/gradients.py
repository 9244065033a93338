"""Closed-form terms that methods add to gradients, all tensors of a model at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_common.deferred import torch

if TYPE_CHECKING:
    Tensors = list[torch.Tensor]


def add_pull(grads: Tensors, params: Tensors, anchor: Tensors, weight: float) -> None:
    """grads += weight * (params - anchor): the gradient of (weight / 2) ||params - anchor||^2.

    Lists of tensors of like shapes, detached.  Exactly zero while params equal the anchor; with
    weight 0 nothing is touched, so that the method's neutral setting changes no bit.
    """
    if weight:
        torch._foreach_add_(grads, torch._foreach_sub(params, anchor), alpha=weight)
