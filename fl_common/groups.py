"""Groups of layers, which FedPart trains and sends by turns, and each of which has its versions.

Groups are disjoint and cover all parameters; server and clients derive the same ones from the
model alone.  On the wire each group is one flat array.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fl_common.layout import COUNTERS, PARAMS, STATS
from fl_common.passes import evaluating

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fl_common.layout import Flat

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Groups:
    """Which parameters, in `named_parameters` order, belong to which group."""

    members: Mapping[str, tuple[int, ...]]
    """Indices of parameters by group, in the order of the forward pass."""
    sizes: tuple[int, ...]
    """Elements of each parameter."""

    def __post_init__(self) -> None:
        found = sorted(i for indices in self.members.values() for i in indices)
        if found != list(range(len(self.sizes))):
            raise ValueError("the groups do not hold every parameter exactly once")
        taken = {STATS, COUNTERS} if len(self.members) == 1 else {PARAMS, STATS, COUNTERS}
        if clash := taken & self.members.keys():
            raise ValueError(f"a layer cannot be called {min(clash)}: vectors travel by that name")

    @classmethod
    def whole(cls, net: nn.Module) -> Groups:
        """One group of all parameters: the vector that other strategies send."""
        sizes = tuple(p.numel() for p in net.parameters())
        return cls({PARAMS: tuple(range(len(sizes)))}, sizes)

    @classmethod
    def of(cls, net: nn.Module, shape: Sequence[int]) -> Groups:
        """Each layer with the norm that follows it, in the order in which a sample of `shape`
        goes through them; layers that it does not meet come last.

        FedPart's grouping (FLAIR-Community/Fling): a convolution with its BatchNorm, a block's
        shortcut after its other layers, the classifier last.  Layers without a parameter that is
        trained join the group of the next layer with one, or the last group.
        """
        place = {id(p): i for i, p in enumerate(net.parameters())}
        names = {module: name for name, module in net.named_modules()}
        order = [*_met(net, shape), *names]
        members: dict[str, list[int]] = {}
        seen: set[int] = set()
        last = None
        for module in dict.fromkeys(order):
            mine = [place[id(p)] for p in module.parameters(recurse=False)]
            mine = [i for i in mine if i not in seen]
            if not mine:
                continue
            seen.update(mine)
            if last is None or not isinstance(module, NORMS):
                # A layer's parametrizations are modules of their own, within it.
                last = names[module].partition(".parametrizations.")[0] or "model"
            members.setdefault(last, []).extend(mine)
        trained = _trained(net)
        joined: dict[str, list[int]] = {}
        held: list[int] = []
        for name, mine in members.items():
            held += mine
            if not trained.isdisjoint(mine):
                joined[name], held = held, []
        if held:
            joined.setdefault(next(reversed(joined), name), []).extend(held)
        return cls(
            {name: tuple(sorted(mine)) for name, mine in joined.items()},
            tuple(p.numel() for p in net.parameters()),
        )

    @classmethod
    def matching(cls, net: nn.Module, patterns: str) -> Groups:
        """Groups by the names of parameters: "conv1.*, layer1.*+layer2.*, fc.*" has three.

        Raises ValueError for a pattern without a parameter, for a parameter in no group or in two,
        and for a group without a parameter that is trained.
        """
        names = [name for name, _ in net.named_parameters()]
        owner: dict[str, str] = {}
        members: dict[str, list[int]] = {}
        for group in filter(None, (part.strip() for part in patterns.split(","))):
            for pattern in (part.strip() for part in group.split("+")):
                found = [i for i, name in enumerate(names) if fnmatchcase(name, pattern)]
                if not found:
                    raise ValueError(
                        f"{pattern}: no parameter has such a name; see `flatfed groups`"
                    )
                for i in found:
                    if names[i] in owner:
                        raise ValueError(f"{names[i]} is in {owner[names[i]]} and in {group}")
                    owner[names[i]] = group
                members.setdefault(group, []).extend(found)
        if left := [name for name in names if name not in owner]:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ValueError(f"{', '.join(left[:3])}{more}: in no group")
        trained = _trained(net)
        for group, mine in members.items():
            if trained.isdisjoint(mine):
                raise ValueError(
                    f"{group}: the network trains none of its parameters; join it to another with +"
                )
        return cls(
            {name: tuple(sorted(mine)) for name, mine in members.items()},
            tuple(p.numel() for p in net.parameters()),
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.members)

    def numel(self, name: str) -> int:
        """d_g, the elements of one group."""
        return sum(self.sizes[i] for i in self.members[name])

    def part(self, name: str, vector: torch.Tensor) -> torch.Tensor:
        """One group's elements (d_g,) of a vector (d,): a view where they lie together."""
        spans = self._spans(name)
        if len(spans) == 1:
            return vector if len(self.members) == 1 else vector[spans[0]]
        return torch.cat([vector[span] for span in spans])

    def split(self, vector: torch.Tensor) -> Flat:
        """Every group's `part` (d_g,) of a vector (d,)."""
        return {name: self.part(name, vector) for name in self.members}

    def norms(
        self, norms: torch.Tensor, active: Sequence[str], net: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Norms of groups (K,) from those of their parameters, (K, P) for the P parameters of the
        active groups that `net` trains, in order."""
        trained = _trained(net)
        parts = {name: [i for i in self.members[name] if i in trained] for name in active}
        column = {i: k for k, i in enumerate(sorted(i for part in parts.values() for i in part))}
        squares = norms.square()
        return {
            name: squares[:, [column[i] for i in part]].sum(1).sqrt()
            for name, part in parts.items()
        }

    def put(self, vector: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """Write groups to their places in a vector (d,); names that are no group are ignored."""
        for name in self.members:
            if name in parts:
                spans, start = self._spans(name), 0
                for span in spans:
                    length = span.stop - span.start
                    vector[span] = parts[name][start : start + length]
                    start += length

    def joined(self, flat: Flat, base: torch.Tensor | None = None) -> Flat:
        """`flat` with `PARAMS` in the place of its groups; those that it lacks come from `base`."""
        if PARAMS in flat:
            return flat
        parts = {name: flat[name] for name in self.members if name in flat}
        if base is None:
            vector = next(iter(parts.values())).new_empty(sum(self.sizes))
        else:
            vector = base.clone()
        self.put(vector, parts)
        rest = {name: tensor for name, tensor in flat.items() if name not in self.members}
        return {PARAMS: vector, **rest}

    def _spans(self, name: str) -> list[slice]:
        """Where a group's elements lie in a vector (d,), those that lie together in one slice."""
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + size)
        spans: list[slice] = []
        for i in self.members[name]:
            if spans and spans[-1].stop == starts[i]:
                spans[-1] = slice(spans[-1].start, starts[i + 1])
            else:
                spans.append(slice(starts[i], starts[i + 1]))
        return spans

    @contextmanager
    def only(
        self, net: nn.Module, active: Sequence[str], *, frozen_norms: bool = False
    ) -> Iterator[None]:
        """Train these groups alone: no other parameter requires a gradient, so that the backward
        pass ends at the first of them.  With `frozen_norms`, norms of other groups are in
        evaluation mode; one without parameters is in no group, and stays in training mode."""
        if len(active) == len(self.members):
            yield
            return
        trained = {i for name in active for i in self.members[name]}
        others = {id(p): p for i, p in enumerate(net.parameters()) if i not in trained}
        frozen = [p for p in others.values() if p.requires_grad]
        norms = [
            module
            for module in net.modules()
            if frozen_norms
            and isinstance(module, _NormBase)
            and module.training
            and any(id(p) in others for p in module.parameters(recurse=False))
        ]
        for p in frozen:
            p.requires_grad_(False)
        for norm in norms:
            norm.eval()
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(True)
            for norm in norms:
                norm.train()


def _trained(net: nn.Module) -> set[int]:
    """Indices of the parameters that require a gradient."""
    return {i for i, p in enumerate(net.parameters()) if p.requires_grad}


def _met(net: nn.Module, shape: Sequence[int]) -> list[nn.Module]:
    """The modules with parameters of their own, in the order in which a sample meets them."""
    met: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: met.append(module))
        for module in net.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        output_of_zeros(net, shape)
    finally:
        for hook in hooks:
            hook.remove()
    return met


def output_of_zeros(net: nn.Module, shape: Sequence[int]) -> torch.Tensor:
    """A network's logits (1, classes) for one sample of zeros, in evaluation mode."""
    first = next(net.parameters())
    with evaluating(net), torch.no_grad():
        if len(shape) == 2:  # (V, L), of which ids are given
            return net(torch.zeros(1, shape[1], dtype=torch.int64, device=first.device))
        return net(torch.zeros(1, *shape, dtype=first.dtype, device=first.device))
