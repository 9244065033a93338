"""Recorded passes: on a GPU, a step's forward and backward pass launched as one.

A step of a small model is a hundred kernels of a few microseconds, and starting them one by one
takes longer than running them.  A CUDA graph starts the same kernels on the same tensors together,
so that bits do not change.  A pass is recorded when it comes for the second time with the same
shapes: the first one lets libraries choose their kernels.  What differs from step to step goes
through tensors that stay where they are; closed-form terms and the optimizer are not recorded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from fl_client.trainer import overriding, perturbation_of
from fl_common.config import AUTO
from fl_common.failures import first_line
from fl_common.models.catalogue import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from fl_common.config import Train
    from fl_common.local import LocalMethod

    Tensors = list[torch.Tensor]
    Gradient = Callable[..., tuple[torch.Tensor, Tensors]]
    """Of a batch: the loss, or each client's, and gradients that may be overwritten."""

_log = logging.getLogger(__name__)


class BeginAnew(Exception):
    """Recording was given up; the round must be run again from its start."""


@dataclass
class Recorded:
    """One recorded pass; called with the inputs of a step, it gives their loss and gradients."""

    inputs: Tensors
    replay: Callable[[], None]
    """Runs it on `inputs`."""
    loss: torch.Tensor
    grads: Tensors

    def __call__(
        self, inputs: Sequence[torch.Tensor], copied: bool
    ) -> tuple[torch.Tensor, Tensors]:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.replay()
        grads = [grad.clone() for grad in self.grads] if copied else self.grads
        return self.loss.clone(), grads


class Graphs:
    """The recorded passes of a network whose tensors stay where they are."""

    def __init__(self) -> None:
        self.passes: dict[Hashable, Recorded | None] = {}
        """By all that determines a pass's kernels; None for a pass seen once, not yet recorded."""
        self.stacks: dict[Hashable, Tensors] = {}
        """Stacked parameters at fixed addresses (`in_place`)."""
        self.refused = ""
        """Why recording was given up; "" if it was not."""
        self.pool: Any = None
        self.bytes = 0
        """Approximate size of the recorded passes' inputs and gradients."""

    @staticmethod
    def fit(methods: Sequence[LocalMethod], *, stacked: bool = False) -> bool:
        """Whether passes with these methods, after their `begin`, can be recorded; `stacked`: of
        several clients at once, each of which would have its own draws to copy."""
        return all(
            method.replays and not (stacked and method.drawn)
            for method in methods
            if overriding("transform", [method]) or overriding("data_term", [method])
        )

    def of(
        self,
        gradient: Gradient,
        net: torch.nn.Module,
        clients: int,
        leaves: Callable[[], Tensors],
        methods: Sequence[LocalMethod],
    ) -> Gradient:
        """A function like `gradient` that replays recorded passes of it.

        `gradient` is a pass of `net` that sets the gradients of `leaves`.  `clients`: how many it
        trains at once, on stacked parameters of `in_place`; 0: one, on `net`'s own.

        The function raises BeginAnew, and logs why, where recording fails.
        """
        trained = tuple(p.requires_grad for p in net.parameters())
        norms = [module for module in net.modules() if isinstance(module, _NormBase)]
        perturbation = perturbation_of(methods)
        # A step that mixes its two gradients needs the first one after the second pass.
        copied = perturbation is not None and perturbation.share != 1.0

        def replayed(*inputs: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
            if self.refused:
                return gradient(*inputs)
            what_norms_do = tuple(
                (norm.training, norm.track_running_stats, norm.running_mean is None)
                for norm in norms
            )
            shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
            variants = tuple(method.variant() for method in methods)
            key = (clients, trained, what_norms_do, variants, shapes)
            if key not in self.passes:
                self.passes[key] = None
                before = list(net.buffers())
                result = gradient(*inputs)
                if [*map(id, before)] != [*map(id, net.buffers())]:
                    self.refuse("the network puts new buffers in the place of others")
                return result
            if self.passes[key] is None:
                size = sum(tensor.nbytes for tensor in (*leaves(), *inputs))
                if self.bytes + size > self.most():
                    return gradient(*inputs)
                try:
                    self.passes[key] = self.record(gradient, inputs)
                except Exception as error:
                    if isinstance(error, torch.OutOfMemoryError) and clients:
                        raise  # there may be room for fewer
                    self.refuse(first_line(error))
                    # The memory of the broken pass is freed with its frames, which `error` holds.
                    raise BeginAnew from None
                self.bytes += size
            return self.passes[key](inputs, copied)

        return replayed

    def record(self, gradient: Gradient, inputs: Sequence[torch.Tensor]) -> Recorded:
        """Record one pass without running it; raises whatever prevents that."""
        held = [torch.empty_like(tensor).copy_(tensor) for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                loss, grads = gradient(*held)
        finally:  # where ending a capture fails, torch stays on the capture's stream
            torch.cuda.set_stream(stream)
        return Recorded(held, graph.replay, loss, grads)

    def refuse(self, reason: str) -> None:
        """Record nothing from now on, and say so."""
        self.refused = reason
        _log.warning("train.graphs: passes are not recorded (%s)", reason)
        self.forget()

    def forget(self) -> None:
        """Let go of everything that was recorded, and of its memory."""
        self.passes, self.stacks, self.pool, self.bytes = {}, {}, None, 0

    @staticmethod
    def most() -> float:
        """The limit on `bytes`, a quarter of the card: clients of unequal sizes have batches of
        many shapes, each recorded separately."""
        if not torch.cuda.is_available():
            return inf
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 4

    def in_place(self, name: Hashable, tensors: Tensors) -> Tensors:
        """These tensors, copied to where those of the last call with this name lie."""
        kept = self.stacks.get(name)
        if kept is None or [t.shape for t in kept] != [t.shape for t in tensors]:
            self.stacks[name] = tensors
            return tensors
        with torch.no_grad():
            torch._foreach_copy_(kept, tensors)
        return kept


def records(train: Train, model: str, device: torch.device) -> bool:
    """Whether passes are recorded; with `auto`, those of networks that are known to run the same
    kernels in every step."""
    on = train.graphs == "on" or (train.graphs == AUTO and model in MODELS)
    return on and device.type == "cuda"
