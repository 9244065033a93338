"""The flat form of a model: which tensor lies where in which vector.

A model travels, is averaged and is stored as at most three vectors:

    params    (d,)  parameters, in the model's dtype
    stats     (q,)  floating buffers (BatchNorm's running statistics)
    counters  (c,)  int64 buffers (`num_batches_tracked`)

Strategies do their arithmetic on these.  Training never runs on views of them: parameters live
in tensors that torch allocated one by one, because kernels may sum differently at other
memory alignments.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from fl_common.deferred import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PARAMS, STATS, COUNTERS = "params", "stats", "counters"
Flat = dict[str, "torch.Tensor"]
"""Vectors by kind; a kind without a tensor is absent."""


@dataclass(frozen=True)
class Slot:
    """One tensor's place in its vector."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The slots of each kind, in `named_parameters` / `named_buffers` order."""

    slots: Mapping[str, tuple[Slot, ...]]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Layout:
        """Raises ValueError as `tensors_of`."""
        return cls(
            {
                kind: tuple(Slot(name, tuple(tensor.shape)) for name, tensor in tensors.items())
                for kind, tensors in tensors_of(model).items()
            }
        )

    def split(self, kind: str, vector: torch.Tensor) -> list[torch.Tensor]:
        """Views of `vector` (d,) in the shapes of this kind's tensors."""
        slots = self.slots[kind]
        parts = vector.split([slot.numel for slot in slots])
        return [part.view(slot.shape) for part, slot in zip(parts, slots, strict=True)]

    def named(self, flat: Flat) -> dict[str, torch.Tensor]:
        """Every tensor of `flat` under its state-dict name."""
        return {
            slot.name: view
            for kind, vector in flat.items()
            for slot, view in zip(self.slots[kind], self.split(kind, vector), strict=True)
        }


def tensors_of(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The model's tensors by kind and name, in registration order.

    Raises ValueError for tensors of one kind and more than one dtype: they have no common flat
    form.
    """
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        kinds.setdefault(PARAMS, {})[name] = parameter
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent:
            kind = STATS if buffer.is_floating_point() else COUNTERS
            kinds.setdefault(kind, {})[name] = buffer
    for kind, tensors in kinds.items():
        of_dtype = {tensor.dtype: name for name, tensor in tensors.items()}
        if len(of_dtype) > 1:
            found = ", ".join(f"{name} is {dtype}" for dtype, name in of_dtype.items())
            what = {PARAMS: "parameters", STATS: "floating buffers"}.get(kind, "integer buffers")
            remedy = "" if kind == PARAMS else ", or persistent=False to those that never change"
            raise ValueError(f"its {what} are not of one dtype: {found}; give them one{remedy}")
    return kinds


def on(device: torch.device, flat: Flat) -> Flat:
    """The vectors on this device; those that lie there already are not copied."""
    return {kind: vector.to(device) for kind, vector in flat.items()}


def concatenate(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A new vector (d,) on the tensors' device, holding a copy of all elements in order."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
