"""SGD and Adam over a list of tensors, with their state as explicit lists.

The update rules are torch.optim's, through the same fused kernels.  torch.optim itself is not
used: building one imports torch._dynamo (over a CPU second in every client process), and its
per-step bookkeeping shows in small models.
"""

from __future__ import annotations

from typing import Protocol

import torch

Tensors = list[torch.Tensor]


class Optimizer(Protocol):
    """`state()` is None before the first step; `load(None)` makes the optimizer fresh."""

    def step(self, params: Tensors, grads: Tensors, lr: float, decay: float = 0.0) -> None:
        """One step in place; `decay` is added to the optimizer's weight decay."""

    def state(self) -> dict[str, Tensors] | None: ...
    def load(self, state: dict[str, Tensors] | None) -> None: ...


class SGD:
    """v <- m v + g + wd theta; theta -= lr v, or lr (g + wd theta + m v) with Nesterov."""

    def __init__(
        self, momentum: float = 0.0, *, nesterov: bool = False, weight_decay: float = 0.0
    ) -> None:
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.velocity: Tensors = []

    def step(self, params: Tensors, grads: Tensors, lr: float, decay: float = 0.0) -> None:
        first = bool(self.momentum) and not self.velocity
        if first:
            self.velocity = [torch.empty_like(p) for p in params]
        torch._fused_sgd_(
            params,
            grads,
            self.velocity,
            weight_decay=self.weight_decay + decay,
            momentum=self.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
            is_first_step=first,
        )

    def state(self) -> dict[str, Tensors] | None:
        return {"velocity": self.velocity} if self.velocity else None

    def load(self, state: dict[str, Tensors] | None) -> None:
        self.velocity = state["velocity"] if state else []


class Adam:
    """Adam with betas (0.9, 0.999) and eps 1e-8; decay is coupled (added to the gradient)."""

    def __init__(self, *, weight_decay: float = 0.0) -> None:
        self.weight_decay = weight_decay
        self.m: Tensors = []
        self.v: Tensors = []
        self.steps: Tensors = []

    def step(self, params: Tensors, grads: Tensors, lr: float, decay: float = 0.0) -> None:
        if not self.m:
            self.m = [torch.zeros_like(p) for p in params]
            self.v = [torch.zeros_like(p) for p in params]
            self.steps = [torch.zeros((), dtype=torch.float32, device=p.device) for p in params]
        torch._foreach_add_(self.steps, 1)
        torch._fused_adam_(
            params,
            grads,
            self.m,
            self.v,
            [],
            self.steps,
            lr=lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=self.weight_decay + decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    def state(self) -> dict[str, Tensors] | None:
        return {"m": self.m, "v": self.v, "steps": self.steps} if self.m else None

    def load(self, state: dict[str, Tensors] | None) -> None:
        self.m, self.v, self.steps = (
            (state["m"], state["v"], state["steps"]) if state else ([], [], [])
        )
