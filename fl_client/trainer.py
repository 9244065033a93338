"""The local round: a plain function of model, data, methods and seed.

Ray, gRPC and the in-process engine are ways to call it; it knows none of them.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from fl_client.halves import copies, halved
from fl_common.determinism import (
    generator_state,
    seed_device,
    seed_of,
    set_generator_state,
    uniform,
    words,
)
from fl_common.layout import PARAMS, Layout
from fl_common.local import norm_of, norms_of, per_tensor
from fl_common.passes import called_with, criterion_of
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from fl_client.graphs import Graphs
    from fl_client.optimizers import Optimizer
    from fl_common.config import Train
    from fl_common.local import Affine, LocalMethod, Perturbation

    Tensors = list[torch.Tensor]

AT_ONCE = 1 << 20
"""Elements of an epoch's samples that are transformed at once, in whole batches: launching an
operation on one batch of small images takes as long as the operation."""


@dataclass(frozen=True)
class LocalData:
    """A partition on the training device."""

    x: torch.Tensor
    """(n, C, H, W) uint8 images, (n, F) features, or (n, L) token ids."""
    y: torch.Tensor
    """(n,) int64 labels."""
    transform: Callable[..., torch.Tensor]
    """Prepares a batch x (B, ...); takes u (B, D) too if it draws."""
    draws: int = 0
    """D, the numbers from U[0, 1) that a sample draws in every epoch."""

    def seen(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """A batch as the network sees it; u (B, D)."""
        return self.transform(x, u) if self.draws else self.transform(x)


@dataclass(frozen=True)
class LocalResult:
    """What a local round returns besides the trained network."""

    steps: int
    """K_i, optimizer steps taken."""
    loss: float
    """Mean training loss over the samples of the round, without regularizers' terms, but for those
    that change its labels (`relabels`)."""
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
    graphs: Graphs | None = None,
) -> LocalResult:
    """Train `net`, which is in training mode, in place for `settings.epochs` epochs over `data`.

    Randomness: the order and the augmentation of an epoch come from (seed, round, partition,
    epoch), all other draws of a step, dropout's too, from (seed, round, partition, step).
    `methods`, of which at most one has a perturbation, are past their `begin`; `correction`: their
    closed-form terms.  `norms`: record the gradient's norms.  `graphs`: recorded passes of this
    network.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    device = params[0].device.type
    criterion = criterion_of(net)
    precision = precision_of(settings, device)
    transforms = overriding("transform", methods)
    data_terms = overriding("data_term", methods)
    halves = halved(net, settings, methods)
    step = Step(
        perturbation=perturbation_of(methods),
        correction=Correction.of(handed_on(correction, settings), net),
        clip_norm=settings.clip_norm,
        optimizer=optimizer,
        lr=settings.lr_of(server_round),
        norms=norms,
    )

    drawing = [(method, name) for method in methods for name in method.drawn]

    def gradient(
        x: torch.Tensor, y: torch.Tensor, *drawn: torch.Tensor
    ) -> tuple[torch.Tensor, Tensors]:
        for (method, name), tensor in zip(drawing, drawn, strict=True):
            setattr(method, name, tensor)
        with precision():
            output = called_with(net, copies(halves), x) if halves else net(x)
            whole = loss = criterion(output, y)
            for data_term in data_terms:
                added = data_term(x, output, y)
                whole = whole + added
                if data_term.__self__.relabels:
                    loss = loss + added
        if whole.requires_grad:  # not if no trained parameter took part
            whole.backward()
        return loss.detach(), taken_gradients(params)

    if graphs and graphs.fit(methods):
        gradient = graphs.of(gradient, net, 0, lambda: params, methods)
    losses, sizes = [], []
    key = (seed, server_round, partition)
    for number, (x, y) in enumerate(batches(data, settings, key)):
        seed_device(device, seed_of("step", *key, number))
        for transform in transforms:
            x, y = transform(x, y)
        repeated = partial(_repeated, net, device, step.perturbation and generator_state(device))
        drawn = [getattr(method, name) for method, name in drawing]
        try:
            losses.append(step(params, partial(gradient, x, y, *drawn), repeated))
        except ValueError as error:
            if len(x) == 1 and "more than 1 value per channel" in str(error):
                raise ValueError(
                    "BatchNorm cannot train on a batch of one sample, the last of "
                    f"{len(data.y)} in batches of {settings.batch_size}; set another "
                    "train.batch-size, give every client more samples, or use GroupNorm "
                    "(model.norm=group, or in a model of your own)"
                ) from error
            raise
        sizes.append(len(x))

    weights = torch.tensor(sizes, dtype=torch.float64)
    mean = torch.stack(losses).to("cpu", torch.float64) @ weights / weights.sum()
    recorded = torch.stack(step.lengths).to("cpu", torch.float64) if norms else None
    return LocalResult(steps=len(sizes), loss=float(mean), norms=recorded)


def batches(
    data: LocalData, settings: Train, key: tuple[int, int, int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of every epoch in its own order, as the network sees them; the last one of an epoch
    may be smaller.  `key`: seed, round, partition."""
    size, n, device = settings.batch_size, len(data.y), data.y.device
    for epoch in range(settings.epochs):
        numbers = words(seed_of("epoch", *key, epoch), n * (1 + data.draws), device)
        numbers = numbers.view(n, 1 + data.draws)
        order = numbers[:, 0].argsort(stable=True)
        u = numbers[:, 1:]
        if data.draws:
            u = uniform(u.index_select(0, order))
        x, y = data.x.index_select(0, order), data.y.index_select(0, order)
        some = size * max(1, AT_ONCE // (size * x[:1].numel()))
        for x_s, y_s, u_s in zip(x.split(some), y.split(some), u.split(some), strict=True):
            yield from zip(data.seen(x_s, u_s).split(size), y_s.split(size), strict=True)


@dataclass
class Step:
    """One optimizer step, in place: of one client, or with `stacked` of A clients whose parameters
    and gradients are (A, ...)."""

    perturbation: Perturbation | None
    correction: Correction
    clip_norm: float
    optimizer: Optimizer
    lr: float
    norms: bool
    stacked: bool = False
    lengths: Tensors = field(default_factory=list)
    """With `norms`, the gradient norms of each step: (P,), or (P, A)."""

    def __call__(
        self,
        params: Tensors,
        gradient: Callable[[], tuple[torch.Tensor, Tensors]],
        repeated: Callable[[], AbstractContextManager[None]],
    ) -> torch.Tensor:
        """The loss, or each client's (A,), without data terms.  `gradient` returns it and gradients
        that may be overwritten; under `repeated` it makes the same draws again and leaves running
        statistics alone."""
        loss, grads = gradient()
        if self.perturbation is not None:
            with torch.no_grad():
                self.perturbation.apply(params, grads)
            del grads
            with repeated():
                _, grads = gradient()
            with torch.no_grad():
                self.perturbation.undo(params)
                self.perturbation.mix(grads)
        with torch.no_grad():
            if self.norms:
                self.lengths.append(norms_of(grads, self.stacked))
            decay = self.correction(params, grads)
            if self.clip_norm:
                # As torch.nn.utils.clip_grad_norm_ has it.
                factor = self.clip_norm / (norm_of(grads, self.stacked) + 1e-6)
                torch._foreach_mul_(grads, per_tensor(factor.clamp_(max=1.0), grads))
            if isinstance(decay, torch.Tensor):
                add_scaled(grads, params, decay)
                decay = 0.0
            self.optimizer.step(params, grads, self.lr, decay)
        return loss


def taken_gradients(params: Tensors) -> Tensors:
    """The gradients out of `.grad`, zero where the step did not use a parameter.

    Each has its own memory, since they are overwritten: a backward pass may give views of one
    tensor, or of parts of it, to several parameters, such as the biases of norms whose outputs are
    added up.
    """
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    taken: set[int] = set()
    for i, grad in enumerate(grads):
        if (place := grad.untyped_storage().data_ptr()) in taken:
            grads[i] = grad.clone()
        taken.add(place)
    for p in params:
        p.grad = None
    return grads


def precision_of(settings: Train, device: str) -> Callable[[], AbstractContextManager[None]]:
    """Makes the context of a forward pass: autocast with `train.dtype=bfloat16`, else none."""
    if settings.dtype == "bfloat16":
        return partial(torch.autocast, device, torch.bfloat16)
    return nullcontext


def perturbation_of(methods: Sequence[LocalMethod]) -> Perturbation | None:
    """That of the first method that has one."""
    return next(filter(None, (method.perturbation() for method in methods)), None)


def handed_on(terms: Affine, settings: Train) -> Affine:
    """`terms` with the slope as decay, which SGD's kernel adds for free; without clipping the same.

    Not for Adam: slope theta + constant is exactly 0 where weights have not moved, such as those of
    words that a client does not have; as decay it leaves a rounding error, which Adam scales up to
    a step.
    """
    if settings.clip_norm or settings.optimizer == "adam":
        return terms
    return replace(terms, slope=0.0, decay=terms.decay + terms.slope)


@dataclass(frozen=True)
class Correction:
    """An `Affine` on the training device, applied to the gradients of every step: of one client, or
    of A clients whose tensors are stacked, with numbers (A,) where they differ."""

    scale: float | torch.Tensor
    slope: float | torch.Tensor
    decay: float | torch.Tensor
    constant: Tensors
    """By trained parameter; empty: zero."""

    @classmethod
    def of(cls, terms: Affine, net: torch.nn.Module) -> Correction:
        """One client's."""
        constant: Tensors = []
        if terms.constant is not None:
            device = next(net.parameters()).device
            views = Layout.of(net).split(PARAMS, terms.constant.to(device))
            trained = zip(net.parameters(), views, strict=True)
            constant = [view for p, view in trained if p.requires_grad]
        return cls(terms.scale, terms.slope, terms.decay, constant)

    def first(self, count: int) -> Correction:
        """The first `count` clients' part."""
        parts = (
            number[:count] if isinstance(number, torch.Tensor) else number
            for number in (self.scale, self.slope, self.decay)
        )
        return Correction(*parts, [tensor[:count] for tensor in self.constant])

    def __call__(self, params: Tensors, grads: Tensors) -> float | torch.Tensor:
        """Apply the terms to `grads` in place; returns the decay, to be added after clipping."""
        if isinstance(self.scale, torch.Tensor) or self.scale != 1.0:
            torch._foreach_mul_(grads, per_tensor(self.scale, grads))
        add_scaled(grads, params, self.slope)
        if self.constant:
            torch._foreach_add_(grads, self.constant)
        return self.decay


def add_scaled(grads: Tensors, params: Tensors, factor: float | torch.Tensor) -> None:
    """grads += factor * params, in place; `factor`: one number, or each client's (A,)."""
    if isinstance(factor, torch.Tensor):
        torch._foreach_add_(grads, torch._foreach_mul(params, per_tensor(factor, params)))
    elif factor:
        torch._foreach_add_(grads, params, alpha=factor)


@contextmanager
def _repeated(net: torch.nn.Module, device: str, draws: Tensors) -> Iterator[None]:
    set_generator_state(device, draws)
    with frozen_statistics(net):
        yield


@contextmanager
def frozen_statistics(net: torch.nn.Module) -> Iterator[None]:
    """Norms in training mode leave their running statistics as they are.

    InstanceNorm does not see its own meanwhile: it updates them whatever `track_running_stats` is,
    rounds them even with momentum 0, and in evaluation mode takes the batch's without that flag.
    """
    norms = [
        module
        for module in net.modules()
        if isinstance(module, _NormBase) and module.track_running_stats
    ]
    flagged = [norm for norm in norms if not isinstance(norm, _InstanceNorm)]
    hidden = [
        (norm, norm.running_mean, norm.running_var)
        for norm in norms
        if isinstance(norm, _InstanceNorm) and norm.training
    ]
    for norm in flagged:
        norm.track_running_stats = False
    for norm, _, _ in hidden:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm in flagged:
            norm.track_running_stats = True
        for norm, mean, var in hidden:
            norm.running_mean, norm.running_var = mean, var


def overriding(hook: str, methods: Sequence[Any]) -> list[Callable[..., Any]]:
    """The bound `hook` of each method whose class overrides it."""
    base = getattr(Regularizer, hook)
    return [
        getattr(method, hook) for method in methods if getattr(type(method), hook, base) is not base
    ]
