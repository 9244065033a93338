"""The hooks of a client-side method.

Order within a step: `transform` -> forward -> `data_term` -> backward -> the second pass of a
`perturbation` (forward, `data_term`, backward once more) -> `correction` -> clip -> optimizer.
The trainer calls only the hooks that a method overrides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fl_common.config import NoParams, enter
from fl_common.local import LocalMethod

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    import torch
    from torch.utils.hooks import RemovableHandle

    from fl_common.config import CoreConfig, Group
    from fl_common.layout import Flat

METHODS: dict[str, type[Regularizer]] = {}


class Regularizer(LocalMethod):
    """One method; one instance serves one local round."""

    name: ClassVar[str]
    Params: ClassVar[type[Group]] = NoParams
    refuses: ClassVar[dict[str, str]] = {}
    """Other regularizers that make no sense with this one, with the reason and the remedy."""
    neutral: ClassVar[str]
    """The setting at which it is the plain run, bit for bit."""
    copies: ClassVar[int] = 0
    """Memory that it takes on a client during a round [models]."""
    alone: ClassVar[str] = "it does not say that it works on several clients at once"
    stacked = False
    """Whether several clients are trained at once (`fl_client.cohort`).  Then `begin` and `finish`
    are called on the first client's instance only; the forward pass runs under vmap, where hooks
    see one client's tensors, without gradients; and `stacked_term` replaces `data_term`."""
    hooks: Sequence[RemovableHandle] = ()
    """The hooks that `begin` puts on the network; `finish` removes them."""
    seen: list[torch.Tensor]
    """With `stacked`: the tensors that hooks of the first client's instance collect in a pass, a
    list from before `begin` on; `stacked_term` finds each as (A, ...), with its graph."""

    def __init_subclass__(cls) -> None:
        enter(METHODS, cls)

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        """What is wrong with the settings for this method, one line each."""
        return []

    @classmethod
    def prepare(cls, net: torch.nn.Module, params: Group) -> None:
        """Adapt a newly built network to the method, on clients and on the server, which evaluates
        it.  Raises ValueError if the network is not suitable."""

    @classmethod
    def warnings(cls, config: CoreConfig) -> list[str]:
        """Settings that work, but not as a user may expect; told once."""
        return []

    def begin(self, net: torch.nn.Module, sent: Flat, memory: Flat) -> None:
        """Called before the first step.  `sent`: all that was received, its model as the strategy's
        `start` left it, which `net` holds too; `memory`: what this method remembers of the client's
        last round, or `blank`."""

    def transform(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch that the step sees; x (B, ...) float, y (B,) int64 or (B, C) float."""
        return x, y

    def data_term(
        self, x: torch.Tensor, output: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor | float:
        """A term of the loss, given the step's batch and the network's output (B, C)."""
        return 0.0

    def stacked_term(
        self, each: Sequence[Self], output: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor | float:
        """The data terms (A,) of A clients, with a graph, given their outputs (A, B, C) and labels
        (A, B), PADDING where a client's batch is smaller; `each`: their instances."""
        return 0.0

    def finish(self) -> None:
        """Called after the last step, or when one has failed; removes `hooks` from the network."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = ()
