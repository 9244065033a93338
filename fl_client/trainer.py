"""The local round: a plain function of model, data, methods and seed.

Ray, gRPC and the in-process engine are ways to call it; it knows none of them.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _NormBase

from fl_common.determinism import generator_state, seed_device, seed_of, set_generator_state
from fl_common.layout import PARAMS, Layout
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fl_client.optimizers import Optimizer
    from fl_common.config import Train
    from fl_common.local import Affine, LocalMethod


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
    norms: torch.Tensor | None = None
    """(K, P) on the CPU, float64: the norm of the loss's gradient on each parameter that was
    trained, at each step; without closed-form terms, before clipping."""


def local_round(
    net: torch.nn.Module,
    data: LocalData,
    methods: Sequence[LocalMethod],
    correction: Affine,
    optimizer: Optimizer,
    settings: Train,
    *,
    seed: int,
    server_round: int,
    partition: int,
    norms: bool = False,
) -> LocalResult:
    """Train `net` in place for `settings.epochs` epochs over `data`.

    Randomness: the order of an epoch comes from (seed, round, partition, epoch), all draws of a
    step, dropout included, from (seed, round, partition, step).  `methods`, of which at most one
    has a perturbation, have begun; `correction`: their closed-form terms.  A network with a `loss`
    method, (output, y) -> scalar, is trained on that instead of the cross-entropy.  `norms`: record
    the gradient's.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    if not params:
        raise ValueError("no parameter of this round's groups requires a gradient")
    device = params[0].device.type
    criterion = getattr(net, "loss", cross_entropy)
    lr = settings.lr_of(server_round)
    precision = (
        partial(torch.autocast, device, torch.bfloat16)
        if settings.dtype == "bfloat16"
        else nullcontext
    )
    transforms = _overriding("transform", methods)
    data_terms = _overriding("data_term", methods)
    perturbation = next(filter(None, (method.perturbation() for method in methods)), None)
    correct = Correction(correction, net, clips=bool(settings.clip_norm))

    def gradient(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss and its gradient, which is in `.grad` too."""
        with precision():
            output = net(x)
            loss = criterion(output, y)
            for data_term in data_terms:
                loss = loss + data_term(x, output, y)
        if loss.requires_grad:  # not where nothing that is trained took part
            loss.backward()
        for p in params:
            if p.grad is None:  # this step did not use it
                p.grad = torch.zeros_like(p)
        return loss.detach(), [p.grad for p in params]

    if not net.training:
        net.train()
    losses, sizes, lengths = [], [], []
    key = (seed, server_round, partition)
    for step, (x, y) in enumerate(batches(data, settings, key)):
        seed_device(device, seed_of("step", *key, step))
        x = data.transform(x)
        for transform in transforms:
            x, y = transform(x, y)

        if perturbation is None:
            loss, grads = gradient(x, y)
        else:
            draws = generator_state(device)
            loss, grads = gradient(x, y)
            for p in params:
                p.grad = None
            with torch.no_grad():
                perturbation.apply(params, grads)
            del grads
            set_generator_state(device, draws)
            with frozen_statistics(net):
                _, grads = gradient(x, y)
            with torch.no_grad():
                perturbation.undo(params)
                perturbation.mix(grads)

        with torch.no_grad():
            if norms:
                lengths.append(torch.stack(torch._foreach_norm(grads)))
            correct(params, grads)
            if settings.clip_norm:
                torch.nn.utils.clip_grad_norm_(params, settings.clip_norm)
            optimizer.step(params, grads, lr, correct.decay)
        for p in params:
            p.grad = None
        losses.append(loss)
        sizes.append(len(x))

    weights = torch.tensor(sizes, dtype=torch.float64)
    mean = torch.stack(losses).to("cpu", torch.float64) @ weights / weights.sum()
    recorded = torch.stack(lengths).to("cpu", torch.float64) if norms else None
    return LocalResult(steps=len(sizes), loss=float(mean), norms=recorded)


def batches(
    data: LocalData, settings: Train, key: tuple[int, int, int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of every epoch in its own order; the last one of an epoch may be smaller."""
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(seed_of("order", *key, epoch))
        order = torch.randperm(len(data.y), generator=generator).to(data.y.device)
        x, y = data.x.index_select(0, order), data.y.index_select(0, order)
        yield from zip(x.split(settings.batch_size), y.split(settings.batch_size), strict=True)


class Correction:
    """An `Affine` on the training device, applied to one step's gradients after the other."""

    def __init__(self, terms: Affine, net: torch.nn.Module, clips: bool) -> None:
        self.scale = terms.scale
        # Without clipping it is all the same who adds it, and the optimizer does for nothing.
        self.slope = terms.slope if clips else 0.0
        self.decay = terms.decay + (0.0 if clips else terms.slope)
        self.constant: list[torch.Tensor] = []
        if terms.constant is not None:
            device = next(net.parameters()).device
            views = Layout.of(net).split(PARAMS, terms.constant.to(device))
            trained = zip(net.parameters(), views, strict=True)
            self.constant = [view for p, view in trained if p.requires_grad]

    def __call__(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        if self.scale != 1.0:
            torch._foreach_mul_(grads, self.scale)
        if self.slope:
            torch._foreach_add_(grads, params, alpha=self.slope)
        if self.constant:
            torch._foreach_add_(grads, self.constant)


@contextmanager
def frozen_statistics(net: torch.nn.Module) -> Iterator[None]:
    """Normalisation by the batch's own statistics, which leave the running ones as they are."""
    norms = [
        module
        for module in net.modules()
        if isinstance(module, _NormBase) and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _overriding(hook: str, methods: Sequence[Any]) -> list[Callable[..., Any]]:
    """The bound hooks of those methods whose class does more than its base."""
    base = getattr(Regularizer, hook)
    return [
        getattr(method, hook) for method in methods if getattr(type(method), hook, base) is not base
    ]
