"""The local round: a plain function of model, data, methods and seed.

Ray, gRPC and the in-process engine are ways to call it; it knows none of them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from fl_common.determinism import seed_device, seed_of
from regularizers.base import Regularizer
from strategies.base import ClientRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fl_client.optimizers import Optimizer
    from fl_common.config import Train


@dataclass(frozen=True)
class LocalData:
    """A partition on the training device."""

    x: torch.Tensor
    """(n, C, H, W) uint8 images or (n, F) features."""
    y: torch.Tensor
    """(n,) int64 labels."""
    transform: Callable[[torch.Tensor], torch.Tensor]
    """Normalises and augments a batch; draws from the device's default generator."""


@dataclass(frozen=True)
class LocalResult:
    steps: int
    """K_i, optimizer steps taken."""
    loss: float
    """Mean training loss over the samples of the round, regularizers' data terms included."""


def local_round(
    net: torch.nn.Module,
    data: LocalData,
    rule: ClientRule,
    regularizers: Sequence[Regularizer],
    optimizer: Optimizer,
    settings: Train,
    *,
    seed: int,
    server_round: int,
    partition: int,
) -> LocalResult:
    """Train `net` in place for `settings.epochs` epochs over `data`.

    Randomness: the order of an epoch comes from (seed, round, partition, epoch), all draws of a
    step, dropout included, from (seed, round, partition, step).  `rule.begin` and the
    regularizers' have been called; a network with a `loss` method, (output, y) -> scalar, is
    trained on that instead of the cross-entropy.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    device = params[0].device.type
    criterion = getattr(net, "loss", cross_entropy)
    lr = settings.lr * settings.lr_decay ** (server_round - 1)
    precision = (
        partial(torch.autocast, device, torch.bfloat16)
        if settings.dtype == "bfloat16"
        else nullcontext
    )
    transforms = _overriding("transform", regularizers)
    data_terms = _overriding("data_term", regularizers)
    gradient_terms = _overriding("add_gradient", [rule, *regularizers])

    if not net.training:
        net.train()
    losses, sizes = [], []
    key = (seed, server_round, partition)
    for step, (x, y) in enumerate(batches(data, settings, key)):
        seed_device(device, seed_of("step", *key, step))
        x = data.transform(x)
        for transform in transforms:
            x, y = transform(x, y)

        with precision():
            output = net(x)
            loss = criterion(output, y)
            for data_term in data_terms:
                loss = loss + data_term(output, y)
        loss.backward()

        # A parameter that this step did not use has no gradient.
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        with torch.no_grad():
            for add_gradient in gradient_terms:
                add_gradient(params, grads)
            if settings.clip_norm:
                torch.nn.utils.clip_grad_norm_(params, settings.clip_norm)
            optimizer.step(params, grads, lr)
        for p in params:
            p.grad = None
        losses.append(loss.detach())
        sizes.append(len(x))

    weights = torch.tensor(sizes, dtype=torch.float64)
    mean = torch.stack(losses).to("cpu", torch.float64) @ weights / weights.sum()
    return LocalResult(steps=len(sizes), loss=float(mean))


def batches(
    data: LocalData, settings: Train, key: tuple[int, int, int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of every epoch in its own order; the last one of an epoch may be smaller."""
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(seed_of("order", *key, epoch))
        order = torch.randperm(len(data.y), generator=generator).to(data.y.device)
        x, y = data.x.index_select(0, order), data.y.index_select(0, order)
        yield from zip(x.split(settings.batch_size), y.split(settings.batch_size), strict=True)


def _overriding(hook: str, methods: Sequence[Any]) -> list[Callable[..., Any]]:
    """The bound hooks of those methods whose class does more than its base."""
    bases = (ClientRule, Regularizer)
    return [
        getattr(method, hook)
        for method in methods
        if all(getattr(type(method), hook) is not getattr(base, hook, None) for base in bases)
    ]
