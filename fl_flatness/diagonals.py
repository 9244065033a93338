"""A client's part in H_N and H_D: the diagonal of its own Hessian, and nothing else of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_common.deferred import torch
from fl_common.determinism import seed_of
from fl_flatness.products import Curvature, cut
from fl_flatness.trace import diagonal

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_common.config import CoreConfig

BATCH = 128
"""Samples per graph."""


def estimate(
    net: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    transform: Callable[[torch.Tensor], torch.Tensor],
    config: CoreConfig,
    server_round: int,
) -> torch.Tensor:
    """Two independent estimates, (2, d) float64, over the client's samples x (n, ...) and y (n,),
    at most `flatness.samples` of them.

    All clients take the same probes in a round, so that like clients give equal estimates.
    """
    flatness, seed = config.flatness, config.run.seed
    chosen = subsample(len(y), flatness.samples, seed).to(y.device)
    curvature = Curvature(net, cut(transform(x[chosen]), y[chosen], BATCH))
    probes = seed_of("match", seed, server_round)
    return diagonal(curvature, probes=flatness.match_probes, seed=probes)


def as_sent(halves: torch.Tensor, mode: str, net: torch.nn.Module) -> torch.Tensor:
    """What a client answers with, float32 on the CPU: the estimates (2, d) as they are, or with
    fedalign-code their sums over each tensor (2, tensors)."""
    if mode == "fedalign-code":
        parts = halves.split([p.numel() for p in net.parameters() if p.requires_grad], dim=1)
        halves = torch.stack([part.sum(1) for part in parts], dim=1)
    return halves.to("cpu", torch.float32)


def subsample(n: int, most: int, seed: int) -> torch.Tensor:
    """Indices of at most `most` of n samples, ascending, the same for a seed."""
    generator = torch.Generator().manual_seed(seed_of("flatness-samples", seed))
    return torch.randperm(n, generator=generator)[:most].sort().values
