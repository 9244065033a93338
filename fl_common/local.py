"""What a method may do to a client's local round, defined once for strategies and regularizers.

A method's closed-form terms are all affine in the parameters, so they are declared as numbers and
one vector, added up once per round, and cost one pass over the gradient, however many there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fl_common import wire
from fl_common.config import methods
from fl_common.deferred import torch
from fl_common.layout import PARAMS

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from flwr.app import ConfigRecord

    from fl_common.config import CoreConfig, Group
    from fl_common.layout import Flat

    Tensors = list[torch.Tensor]

PADDING = -100
"""The label of what fills up a smaller batch beside larger ones; cross-entropy leaves it out."""
OWNER = "strategy"
"""Prefix of what the strategy's rule remembers; a regularizer's is its own name."""


@dataclass(frozen=True)
class Work:
    """One client's part of a round, as both sides know it before it begins."""

    omega: float
    """omega_i = n_i N / sum_all n, the client's samples over their mean."""
    steps: int
    """K_i = E ceil(n_i / B), optimizer steps."""
    lr: float
    """eta, the local learning rate of this round."""
    nominal_steps: int
    """E ceil(n / B) with n the mean number of samples, as official codes have it."""
    base_lr: float
    """The learning rate of round 1."""
    server_round: int = 1
    """The round, from 1 on."""

    @classmethod
    def of(cls, config: CoreConfig, server_round: int, samples: int, total: int) -> Work:
        """`samples`: n_i; `total`: the samples of all N clients."""
        train, number = config.train, config.clients.number
        return cls(
            omega=samples * number / total,
            steps=train.steps(samples),
            lr=train.lr_of(server_round),
            nominal_steps=train.steps(total / number),
            base_lr=train.lr,
            server_round=server_round,
        )


@dataclass(frozen=True)
class Affine:
    """grad <- scale * grad + slope * theta + constant."""

    constant: torch.Tensor | None = None
    """(d,) where the model was sent, in its dtype; None: zero."""
    slope: float = 0.0
    """Clipped with the gradient."""
    scale: float = 1.0
    decay: float = 0.0
    """More slope, which the optimizer adds after clipping, as it adds weight decay."""

    @classmethod
    def pull(cls, weight: float, anchor: torch.Tensor) -> Affine | None:
        """weight (theta - anchor), the gradient of (weight / 2) ||theta - anchor||^2; with weight
        0 nothing, so that a method's neutral setting changes no bit."""
        return cls(constant=-weight * anchor, slope=weight) if weight else None

    def then(self, other: Affine) -> Affine:
        """Both terms as one, this one applied first."""
        scaled = None if self.constant is None else other.scale * self.constant
        parts = [part for part in (scaled, other.constant) if part is not None]
        return Affine(
            constant=sum(parts[1:], start=parts[0]) if parts else None,
            slope=other.scale * self.slope + other.slope,
            scale=other.scale * self.scale,
            decay=self.decay + other.decay,
        )


class Perturbation:
    """Where the second gradient of a step is taken: theta + eps, eps = rho g / (||g|| + 1e-12).

    Foret et al., Sharpness-Aware Minimization, ICLR 2021 (https://arxiv.org/abs/2010.01412),
    eq. 2; one norm over all parameters.  The step's gradient is (1 - share) g1 + share g2.
    """

    stacked = False
    """Whether parameters and gradients are those of A clients, (A, ...), with a norm each."""

    def __init__(self, rho: float, share: float = 1.0) -> None:
        self.rho, self.share = rho, share
        self.kept: Tensors = []
        self.first: Tensors = []

    def epsilon(self, params: Tensors, grads: Tensors) -> tuple[Tensors, torch.Tensor]:
        """The direction of eps, and the factor that scales it to eps."""
        return grads, self.rho / (norm_of(grads, self.stacked) + 1e-12)

    def apply(self, params: Tensors, grads: Tensors) -> None:
        """theta <- theta + eps, in place.  theta is kept, since subtracting eps would not restore
        its bits.  `grads`, g1, is used up."""
        if not self.kept:
            self.kept = [torch.empty_like(p) for p in params]
        torch._foreach_copy_(self.kept, params)
        direction, factor = self.epsilon(params, grads)
        if self.share == 1.0:  # `grads` is not needed any more, and none of it is kept
            torch._foreach_mul_(direction, per_tensor(factor, direction))
        else:
            self.first = grads
            direction = torch._foreach_mul(direction, per_tensor(factor, direction))
        torch._foreach_add_(params, direction)

    def undo(self, params: Tensors) -> None:
        """theta again, bit for bit, in place."""
        torch._foreach_copy_(params, self.kept)

    def mix(self, grads: Tensors) -> None:
        """The step's gradient, in the place of `grads`, g2."""
        if self.share != 1.0:
            torch._foreach_mul_(grads, self.share)
            torch._foreach_add_(grads, self.first, alpha=1.0 - self.share)
            self.first = []


def norms_of(tensors: Tensors, stacked: bool = False) -> torch.Tensor:
    """The Euclidean norm of each tensor (P,); with `stacked`, of each client's part, (P, A)."""
    if stacked:
        flat = [tensor.reshape(len(tensor), -1) for tensor in tensors]
        return torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in flat])
    return torch.stack(torch._foreach_norm(tensors))


def norm_of(tensors: Tensors, stacked: bool = False) -> torch.Tensor:
    """The Euclidean norm of all elements, a scalar on the tensors' device; with `stacked`, each
    client's (A,)."""
    norms = norms_of(tensors, stacked)
    return torch.linalg.vector_norm(norms, dim=0) if stacked else torch.linalg.vector_norm(norms)


def per_tensor(factor: float | torch.Tensor, tensors: Tensors) -> float | torch.Tensor | Tensors:
    """`factor` as `_foreach_mul` takes it: a scalar unchanged, each client's own (A,) as one tensor
    per entry, shaped to broadcast."""
    if not isinstance(factor, torch.Tensor) or not factor.dim():
        return factor
    return [factor.view(-1, *[1] * (tensor.dim() - 1)) for tensor in tensors]


def mean_losses(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each client's batch (A,), of output (A, B, C) and y (A, B) int64, in
    which PADDING counts for nothing."""
    losses = torch.nn.functional.cross_entropy(
        output.flatten(0, 1), y.flatten(), reduction="none", ignore_index=PADDING
    )
    return losses.view_as(y).sum(1) / (y != PADDING).sum(1)


class LocalMethod:
    """The client half of a strategy, or a regularizer; one instance serves one client's round.

    As it stands it changes nothing.
    """

    memory: tuple[str, ...] = ()
    """Names of what a client remembers from one round it took part in to the next."""
    also: ClassVar[str] = ""
    """What it remembers with some of its settings only, in words."""
    personal: bool = False
    """Whether a client starts from a model that is in part its own, and evaluates that."""
    alone: ClassVar[str] = ""
    """Why clients with this method are trained one by one, whatever `engine.cohort` says; "" if
    they need not be, for example where it overrides only `start`, `correction` and
    `perturbation`."""

    replays: bool = False
    """After `begin`: whether a step's pass can be recorded, because all steps of one `variant` run
    the same kernels on the same tensors.  They do if the data term depends on the batch, output,
    network and what is `drawn` alone, and `transform` leaves the network as it is."""
    drawn: Sequence[str] = ()
    """With `replays`: names of the attributes, all tensors, that `transform` sets in every step for
    the data term."""
    relabels: ClassVar[bool] = False
    """Whether its data term changes the labels of the loss, and so is part of the reported loss."""

    def __init__(self, params: Group, work: Work) -> None:
        self.params, self.work = params, work

    def blank(self, sent: Flat) -> Flat:
        """What a client remembers before its first round; `sent`: what came down."""
        return {name: torch.zeros_like(sent[PARAMS]) for name in self.memory}

    @property
    def frozen_norms(self) -> bool:
        """Whether norms outside the groups that train are in evaluation mode."""
        return False

    def start(self, sent: Flat, memory: Flat) -> Flat:
        """The model that the local round starts from, and that a client evaluates if it is
        `personal`."""
        return sent

    def correction(self, sent: Flat, memory: Flat) -> Affine | None:
        """The closed-form terms of this round's gradients."""

    def perturbation(self) -> Perturbation | None:
        """The second pass of every step."""

    def variant(self) -> Hashable:
        """With `replays`, after `transform`: which of several passes the step has, by whatever else
        decides on its kernels, such as the layers that it skips."""
        return ()

    def remember(self, memory: Flat, sent: Flat, model: Flat) -> Flat:
        """The new memory after training from `sent` to `model`, both as they travelled.

        Client and server both call it, on the CPU, and get the same bits: the server keeps what
        a client might lose, and nothing of it goes over the wire.
        """
        return {}


def local_methods(
    config: CoreConfig, settings: ConfigRecord, server_round: int, samples: int
) -> list[LocalMethod]:
    """The strategy's rule and the regularizers of one client's round; `settings`: what came with
    the message; `samples`: n_i."""
    work = Work.of(config, server_round, samples, int(settings[wire.SAMPLES]))
    rule = methods("strategies")[config.strategy.name].rule(config, settings, work)
    known = methods("regularizers")
    chosen = [known[name](config.params_of(name), work) for name in config.regularizer_names]
    return [rule, *chosen]


def correction_of(methods: Sequence[LocalMethod], sent: Flat, memory: Flat) -> Affine:
    """All closed-form terms in one; the strategy's last, since it may scale what there is."""
    whole = Affine()
    for owner, method in reversed(owners(methods)):
        term = method.correction(sent, owned(memory, owner))
        if term is not None:
            whole = whole.then(term)
    return whole


def blank_memory(methods: Sequence[LocalMethod], sent: Flat) -> Flat:
    """What all methods remember at first, by "owner.name"."""
    return {
        f"{owner}.{name}": vector
        for owner, method in owners(methods)
        for name, vector in method.blank(sent).items()
    }


def new_memory(methods: Sequence[LocalMethod], memory: Flat, sent: Flat, model: Flat) -> Flat:
    """What all methods remember after a round, by "owner.name"."""
    return {
        f"{owner}.{name}": vector
        for owner, method in owners(methods)
        for name, vector in method.remember(owned(memory, owner), sent, model).items()
    }


def owners(methods: Sequence[LocalMethod]) -> list[tuple[str, LocalMethod]]:
    """The methods, each with the prefix of what it remembers."""
    return [(getattr(method, "name", OWNER), method) for method in methods]


def owned(memory: Flat, owner: str) -> Flat:
    """What one method remembers, by its own names."""
    prefix = f"{owner}."
    return {k.removeprefix(prefix): v for k, v in memory.items() if k.startswith(prefix)}
