"""What stacked training is made of: batches side by side, and what torch does not do under vmap.

Tensors of A clients are (A, ...); clients are in non-increasing order of their samples, so that
those who still have steps to take are always the first.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fl_client.trainer import Correction
from fl_common.determinism import seed_of, uniform, words
from fl_common.local import PADDING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fl_client.cohort import Member
    from fl_common.config import Train
    from fl_common.layout import Slot
    from fl_common.local import Affine

    Tensors = list[torch.Tensor]
    State = dict[str, Tensors] | None

END = torch.iinfo(torch.int64).max
"""The largest number: in place of padding, it sorts after everything that is drawn."""


class Batches:
    """The batches of clients side by side, in non-increasing order of their samples."""

    def __init__(
        self,
        members: Sequence[Member],
        settings: Train,
        key: tuple[int, int],
        device: torch.device,
    ) -> None:
        size, epochs = settings.batch_size, settings.epochs
        samples = [len(member.data.y) for member in members]
        self.data, self.total = members[0].data, sum(samples)
        self.x = torch.cat([member.data.x for member in members])
        ends = [member.data.y for member in members]
        self.y = torch.cat([*ends, ends[0].new_full((1,), PADDING)])
        self.steps = [settings.steps(n) for n in samples]
        """K_i."""
        each = [steps // epochs for steps in self.steps]  # of an epoch
        self.sizes = [
            [_size(n, size, t, epochs * own, own) for n, own in zip(samples, each, strict=True)]
            for t in range(self.steps[0])
        ]
        """The batch size of each client in each step, [step][client]; 0: it has no steps left."""
        self.padded = False
        """Whether the last batch that was taken has clients with fewer samples than others."""

        keys = [seed_of("epoch", *key, m.partition, e) for m in members for e in range(epochs)]
        keys = numbers(keys, device).view(len(members), epochs)
        most, draws = samples[0], self.data.draws
        drawn = words(keys, most * (1 + draws), device).unflatten(-1, (most, 1 + draws))
        n, each, start = (
            numbers(values, device)[:, None]
            for values in (samples, each, [0, *accumulate(samples)][:-1])
        )
        outside = torch.arange(most, device=device) >= n[..., None]
        order = drawn[..., 0].masked_fill(outside, END).argsort(stable=True)  # (K, E, most)
        step = torch.arange(self.steps[0], device=device)[:, None, None]
        place = step % each * size + torch.arange(size, device=device)  # (S, K, B)
        epoch = step // each
        outside = (epoch >= epochs) | (place >= n)
        client = torch.arange(len(members), device=device)[:, None]
        # Client, epoch and place in its order of every cell (S, K, B).
        self._seen = (client, epoch.clamp(max=epochs - 1), place.clamp(max=most - 1))
        self.index = (order[self._seen] + start).masked_fill(outside, self.total)  # (S, K, B)
        u = uniform(drawn[..., 1:])
        self._u = u.gather(2, order[..., None].expand_as(u))

    def count(self, number: int) -> int:
        """A, the clients that take this step."""
        return sum(steps > number for steps in self.steps)

    def at(self, number: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """x (A, B, ...) as the networks see it, y (A, B) and each client's true batch size."""
        sizes = self.sizes[number][: self.count(number)]
        self.padded = min(sizes) < max(sizes)
        clients, most = len(sizes), max(sizes)
        index = self.index[number, :clients, :most]
        rows = index.flatten().clamp(max=self.total - 1) if self.padded else index.flatten()
        u = self._u
        if self.data.draws:
            client, epoch, place = self._seen
            u = u[client[:clients], epoch[number, :clients], place[number, :clients, :most]]
        x = self.data.seen(self.x.index_select(0, rows), u.flatten(0, 1))
        y = self.y.index_select(0, index.flatten()).view_as(index)
        return x.unflatten(0, index.shape), y, sizes


def _size(samples: int, size: int, step: int, steps: int, each: int) -> int:
    """The batch size of a client in this step, if an epoch has `each` steps, and all epochs
    `steps`; 0 after the last."""
    return min(size, samples - step % each * size) if step < steps else 0


def numbers(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """A tensor (n,) on the device.  A GPU gets the numbers as kernel arguments: a copy from the
    host would have to wait for it."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    found = torch.zeros(len(values), dtype=dtype, device=device)
    torch._foreach_add_(found.unbind(), list(values))
    return found


def corrections(
    terms: Sequence[Affine], stacked: Callable[[Tensors], Tensors], like: torch.Tensor
) -> Correction:
    """The closed-form terms of K clients.  `stacked` makes (K, ...) tensors of K vectors; `like`
    has their dtype and device."""

    def number(values: list[float]) -> float | torch.Tensor:
        same = len(set(values)) == 1
        return values[0] if same else numbers(values, like.device, like.dtype)

    constant: Tensors = []
    if any(term.constant is not None for term in terms):
        zero = next(torch.zeros_like(t.constant) for t in terms if t.constant is not None)
        constant = stacked([zero if term.constant is None else term.constant for term in terms])
    parts = (number([getattr(t, name) for t in terms]) for name in ("scale", "slope", "decay"))
    return Correction(*parts, constant)


class Rules(TorchFunctionMode):
    """Replaces torch's functions in a pass under vmap, where torch's own would not do."""

    masks: Iterator[torch.Tensor]
    """One for each dropout that drops, (B, ...)."""
    samples: Tensors
    """(B,) 0 for padding; empty if there is none."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        kwargs = kwargs or {}
        if func is functional.dropout and (found := _dropped(*args, **kwargs)):
            return found[0] * next(self.masks)
        if func is functional.batch_norm and self.samples:
            return _batch_norm(self.samples[0], *args, **kwargs)
        if func is functional.embedding:
            return _embedding(*args, **kwargs)
        return func(*args, **kwargs)


class Dropouts(TorchFunctionMode):
    """Records each dropout that draws: ones in the shape of its input, and p."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, float]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        kwargs = kwargs or {}
        if func is functional.dropout and (found := _dropped(*args, **kwargs)):
            self.seen.append((torch.ones_like(found[0]), found[1]))
        return func(*args, **kwargs)


def _dropped(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[torch.Tensor, float] | None:
    """Input and p of a dropout that draws; None for one that does not."""
    return (input, p) if training and p else None


def _batch_norm(
    samples: torch.Tensor,
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """torch's batch_norm of x (B, C, ...), with statistics of the samples, not of the padding."""
    if not training:
        return functional.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    over, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    counted = samples.to(wide.dtype).view(-1, *[1] * (x.dim() - 1))
    n = counted.sum() * x[0, 0].numel()
    mean = (wide * counted).sum(over) / n
    centred = wide - mean.view(shape)
    var = (centred.square() * counted).sum(over) / n
    if running_mean is not None and running_var is not None:
        running_mean.mul_(1 - momentum).add_(momentum * mean.detach())
        running_var.mul_(1 - momentum).add_(momentum * var.detach() * (n / (n - 1)))
    normal = centred * (var + eps).rsqrt().view(shape)
    if weight is not None:
        normal = normal * weight.view(shape)
    if bias is not None:
        normal = normal + bias.view(shape)
    return normal.to(x.dtype)


def _embedding(
    input: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, **more: Any
) -> torch.Tensor:
    """torch's embedding, whose vmap rule applies `padding_idx` to the first client only."""
    vectors = functional.embedding(input, weight, None, **more)
    if padding_idx is None:
        return vectors
    padding = (input == padding_idx % len(weight)).unsqueeze(-1)
    return torch.where(padding, vectors.detach(), vectors)


def first_of(state: State, count: int) -> State:
    """The first `count` clients' part of an optimizer's state; all share the step numbers."""
    if state is None:
        return None
    return {
        name: tensors if name == "steps" else [tensor[:count] for tensor in tensors]
        for name, tensors in state.items()
    }


def stack(vectors: Tensors, slots: Sequence[Slot], device: torch.device) -> Tensors:
    """The tensors (K, ...) of K vectors (d,), each allocated separately; one vector for all is
    copied to the device once."""
    if all(vector is vectors[0] for vector in vectors):
        rows = vectors[0].to(device).expand(len(vectors), -1)
    else:
        rows = torch.stack(vectors).to(device)
    parts = rows.split([slot.numel for slot in slots], dim=1)
    return [
        part.clone(memory_format=torch.contiguous_format).view(-1, *slot.shape)
        for part, slot in zip(parts, slots, strict=True)
    ]


def padded(parts: Tensors, value: int = 0) -> torch.Tensor:
    """Tensors (n_i, ...) stacked, each filled up with `value` to the longest."""
    length = max(map(len, parts))
    if all(len(part) == length for part in parts):
        return torch.stack(parts)
    whole = parts[0].new_full((len(parts), length, *parts[0].shape[1:]), value)
    for row, part in zip(whole, parts, strict=True):
        row[: len(part)] = part
    return whole
