"""Hessian-vector products of a network's mean loss over fixed data.

With g(theta) the gradient of the loss, H v = d(g^T v) / d theta (Pearlmutter 1994): one graph of
g per batch, and one backward pass through it per vector.  Batches are added by their numbers of
samples, in float64, and dropped, so that memory does not depend on how many there are.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fl_common.deferred import torch
from fl_common.passes import criterion_of, evaluating, unrounded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Curvature:
    """Loss, gradient and Hessian of `net` in evaluation mode at its present parameters.

    net: its mean loss is as in training (`criterion_of`), without penalties and decay.  Its mode,
        its gradients and the draws of the generators are left as they are.
    batches: pairs of inputs (B, ...), transformed already, and labels (B,), on the network's
        device; walked through at every product, so a list and not an iterator.  See `cut`.
    only: names of the parameters to differentiate by; all trainable ones unless given.

    Vectors are (d,), in the order of `net.named_parameters()`.  Products are as exact as the
    network's dtype, on a GPU too (no TF32); sums over batches and everything returned are float64.
    A parameter that the loss does not use has zeros.
    """

    def __init__(
        self, net: torch.nn.Module, batches: Batches, *, only: Sequence[str] | None = None
    ) -> None:
        if iter(batches) is batches:
            raise ValueError("batches: an iterator can be walked through once only; give a list")
        named = {name: p for name, p in net.named_parameters() if p.requires_grad}
        if missing := [name for name in only or () if name not in named]:
            raise ValueError(f"{missing[0]}: no trainable parameter of the network has this name")
        chosen = {name: p for name, p in named.items() if only is None or name in only}
        if not chosen:
            raise ValueError("the network has no trainable parameter: there is no curvature")
        self.net, self.batches = net, batches
        self.names, self.params = list(chosen), list(chosen.values())
        self.sizes = [p.numel() for p in self.params]
        self.d = sum(self.sizes)
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        self._differentiable = False
        """Whether a loss's graph was looked at, and is differentiable twice."""

    def loss(self) -> float:
        """Mean loss over the samples."""
        with evaluating(self.net), unrounded(), torch.no_grad():
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            count = 0
            for x, y in self.batches:
                total += self._loss(x, y).double() * len(y)
                count += len(y)
        return float(total) / _some(count)

    def gradient(self) -> torch.Tensor:
        """Of the mean loss over the samples, (d,)."""
        with evaluating(self.net), unrounded(), torch.enable_grad():
            total, count = torch.zeros(self.d, dtype=torch.float64, device=self.device), 0
            for x, y in self.batches:
                grads = torch.autograd.grad(
                    self._loss(x, y), self.params, allow_unused=True, materialize_grads=True
                )
                total.add_(_flat(grads), alpha=len(y))
                count += len(y)
        return total / _some(count)

    def product(self, v: torch.Tensor) -> torch.Tensor:
        """H v (d,) for v (d,)."""
        return self.products(v[None])[0]

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """H v (k, d) for each row v of `vectors` (k, d).

        The graph of a batch's gradient serves all k, so that a vector costs a third less than by
        itself.  Raises ValueError if a product is not finite.
        """
        parts = [self._parts(v) for v in vectors]
        with evaluating(self.net), unrounded(), torch.enable_grad():
            total = torch.zeros(len(parts), self.d, dtype=torch.float64, device=self.device)
            count = 0
            for x, y in self.batches:
                for row, hv in zip(total, self._batch(x, y, parts), strict=False):
                    row.add_(hv, alpha=len(y))
                count += len(y)
        if not total.isfinite().all():
            raise ValueError(
                "the curvature of the loss is not finite at these parameters: the model has "
                "diverged; a smaller train.lr, or train.clip-norm, keeps it from that"
            )
        return total / _some(count)

    def _batch(
        self, x: torch.Tensor, y: torch.Tensor, vectors: list[list[torch.Tensor]]
    ) -> Iterator[torch.Tensor]:
        """H v (d,) of one batch for each of `vectors`; nothing where all are zero."""
        attention = torch.nn.attention
        # The faster kernels of attention have no second derivative.
        with attention.sdpa_kernel(attention.SDPBackend.MATH):
            loss = self._loss(x, y)
        if not self._differentiable:
            refuse_once_differentiable(loss)
        grads = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
        self._differentiable = True
        # A gradient without a graph is constant: the parameter is unused, or enters linearly.
        live = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        if not live:
            return
        for left, v in zip(reversed(range(len(vectors))), vectors, strict=True):
            yield _flat(
                torch.autograd.grad(
                    [grads[i] for i in live],
                    self.params,
                    [v[i] for i in live],
                    retain_graph=left > 0,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return criterion_of(self.net)(self.net(x), y)

    def _parts(self, v: torch.Tensor) -> list[torch.Tensor]:
        """v (d,) cut into the shapes and dtypes of the parameters."""
        if v.shape != (self.d,):
            raise ValueError(f"a vector has shape {tuple(v.shape)}, the parameters ({self.d},)")
        pieces = v.to(self.device).split(self.sizes)
        return [
            piece.view(p.shape).to(p.dtype) for piece, p in zip(pieces, self.params, strict=True)
        ]


def refuse_once_differentiable(output: torch.Tensor) -> None:
    """Have ValueError raised when a gradient of `output` passes an operation that makes it a
    constant for torch, silently."""
    mark = torch.autograd.function.once_differentiable(None).__code__
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions]
        function = getattr(node, "_forward_cls", None)
        if getattr(getattr(function, "backward", None), "__code__", None) is mark:
            node.register_prehook(partial(_refuse, function.__name__))


def _refuse(name: str, grads: tuple[torch.Tensor, ...]) -> None:
    raise ValueError(
        f"{name}.backward is once_differentiable: the curvature behind it would be taken for 0; "
        "write it in differentiable operations, without that mark"
    )


def cut(
    x: torch.Tensor, y: torch.Tensor, batch_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of x (n, ...) and y (n,); the last may be smaller.  They share the samples' memory.

    Raises ValueError where there is nothing to cut.
    """
    if not len(y) or len(x) != len(y):
        raise ValueError(f"{len(x)} samples with {len(y)} labels: give at least one, and as many")
    if batch_size < 1:
        raise ValueError(f"batch size = {batch_size}: at least 1")
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def _flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in parts]).double()


def _some(count: int) -> int:
    if not count:
        raise ValueError("batches: there are no samples in them")
    return count
