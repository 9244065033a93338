"""The hooks of a client-side method.

Order within a step: `transform` -> forward -> `data_term` -> backward -> `add_gradient` -> clip
-> optimizer.  The trainer calls only the hooks that a method overrides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from fl_common.config import Group

METHODS: dict[str, type[Regularizer]] = {}


class Regularizer:
    """One method; one instance serves one local round."""

    name: ClassVar[str]
    Params: ClassVar[type[Group]]

    def __init_subclass__(cls) -> None:
        METHODS[cls.name] = cls

    def __init__(self, params: Group) -> None:
        self.params = params

    def begin(self, net: torch.nn.Module, w: list[torch.Tensor]) -> None:
        """Before the first step; `w`: the global parameters, one tensor per parameter, to be
        read only."""

    def transform(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch that the step sees; x (B, ...) float, y (B,) int64 or (B, C) float."""
        return x, y

    def data_term(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor | float:
        """A term of the loss, given the network's output (B, C)."""
        return 0.0

    def add_gradient(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        """Add closed-form terms to `grads` in place, at the current `params`."""

    def finish(self) -> None:
        """After the last step; hooks that were put on the network are removed here."""
