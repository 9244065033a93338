"""Several clients' local rounds at once: one forward and backward pass for all of them.

Parameters, buffers and batches are stacked, (A, ...) for the A clients that still have steps to
take, and the network runs under vmap.  Order, augmentation and dropout are drawn as for a client
alone, from (seed, round, partition, epoch or step), so that the numbers differ from one-by-one
training by the rounding of sums alone.  A client's smaller last batch is filled up with samples
that count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.func import vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from fl_client.stacked import Batches, Dropouts, Rules, corrections, first_of, padded, stack
from fl_client.trainer import (
    LocalResult,
    Step,
    batches,
    frozen_statistics,
    handed_on,
    overriding,
    perturbation_of,
    precision_of,
    taken_gradients,
)
from fl_common.determinism import generator_state, seed_device, seed_of, set_generator_state
from fl_common.layout import PARAMS, Layout
from fl_common.local import PADDING, mean_losses, norm_of
from fl_common.passes import called_with, unrounded
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_client.graphs import Graphs
    from fl_client.optimizers import Optimizer
    from fl_client.trainer import LocalData
    from fl_common.config import Train
    from fl_common.layout import Flat
    from fl_common.local import Affine, LocalMethod

    Tensors = list[torch.Tensor]
    State = dict[str, Tensors] | None


ALIKE = 0.01
"""How far gradients, and buffers, may differ in a check, relative to their norm: more than by
rounding, less than by a wrong rule."""


@dataclass
class Known:
    """What has been learned about a network under vmap; kept from round to round."""

    checked: set[bool] = field(default_factory=set)
    """The kinds of batches that torch was found to stack correctly: with padding (True), without
    (False)."""
    dropouts: dict[torch.Size, list[tuple[torch.Tensor, float]]] = field(default_factory=dict)
    """By the shape of a batch, for each dropout in the order in which they run: ones in the shape
    (B, ...) of its input, and its p.  Dropout of the ones gives a client's mask."""


@dataclass(eq=False)
class Member:
    """One client of a cohort, before the round and after it."""

    partition: int
    data: LocalData
    methods: Sequence[LocalMethod]
    correction: Affine
    start: Flat
    """The model that it starts from; `trained` will lie on the same device."""
    optimizer: State = None
    """The optimizer state that it kept; members that have one took equally many steps."""
    result: LocalResult | None = None
    trained: Flat = field(default_factory=dict)


def why_alone(
    net: torch.nn.Module, methods: Sequence[LocalMethod], samples: int, settings: Train
) -> str:
    """Why a client cannot be trained at once with others, as far as can be told beforehand; "" if
    it may be tried.  Where torch then fails to stack the network, `cohort_round` raises."""
    for method in methods:
        if method.alone:
            return f"{getattr(method, 'name', 'strategy')}: {method.alone}"
    if hasattr(net, "loss"):
        return "the network has a loss of its own"
    norms = any(isinstance(module, _NormBase) and module.training for module in net.modules())
    if norms and samples % settings.batch_size == 1:
        return "BatchNorm meets a batch of one sample"
    return ""


def bytes_of(net: torch.nn.Module, data: LocalData, settings: Train) -> int:
    """Rough memory of one client of a cohort [bytes]: what a forward pass saves for its backward
    pass, as much for the gradients there, six copies of the parameters, and its data."""
    device, held = data.x.device.type, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        else:  # oneDNN's
            held[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    draws = generator_state(device)
    keep = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with keep, frozen_statistics(net), precision_of(settings, device)():
        output = net(next(batches(data, settings, (0, 0, 0)))[0])
    set_generator_state(device, draws)
    del output
    parameters = sum(p.nbytes for p in net.parameters())
    return 2 * sum(held.values()) + 6 * parameters + data.x.nbytes


def cohort_round(
    net: torch.nn.Module,
    members: Sequence[Member],
    optimizer: Optimizer,
    settings: Train,
    *,
    seed: int,
    server_round: int,
    norms: bool,
    known: Known,
    graphs: Graphs | None,
) -> None:
    """Train all members at once; their `result`, `trained` and `optimizer` are set.

    `net`: the resident network, whose parameters that require a gradient are trained; its own
    tensors stay as they are.  `known`: before the network's first step with padding, and its first
    without, one member's gradient and buffers are compared with those of a pass of its own.
    `graphs`: recorded passes of `net`.  Raises RuntimeError or the like where torch cannot stack
    the network, or stacks it wrongly; then no member has changed.
    """
    order = sorted(members, key=lambda member: len(member.data.y), reverse=True)
    first = order[0]
    regularizers = [m for m in first.methods if isinstance(m, Regularizer)]
    try:
        for regularizer in regularizers:
            regularizer.stacked, regularizer.seen = True, []
            regularizer.begin(net, first.start, {})
        if graphs and not graphs.fit(first.methods, stacked=True):
            graphs = None
        key = (seed, server_round)
        _Cohort(net, order, optimizer, settings, key, norms, known, graphs).train()
    finally:
        for regularizer in regularizers:
            regularizer.finish()
            regularizer.stacked = False


class _Cohort:
    """One round of clients that are trained at once; `key` is (seed, round)."""

    def __init__(
        self,
        net: torch.nn.Module,
        members: list[Member],
        optimizer: Optimizer,
        settings: Train,
        key: tuple[int, int],
        norms: bool,
        known: Known,
        graphs: Graphs | None,
    ) -> None:
        self.net, self.members, self.optimizer, self.settings = net, members, optimizer, settings
        self.key, self.known, self.graphs = key, known, graphs
        self.device = next(net.parameters()).device
        self.layout = Layout.of(net)
        self.stacks = {
            kind: stack([member.start[kind] for member in members], slots, self.device)
            for kind, slots in self.layout.slots.items()
        }
        if graphs:
            self.stacks = {
                kind: graphs.in_place((kind, len(members)), tensors)
                for kind, tensors in self.stacks.items()
            }
        self.trained = [p.requires_grad for p in net.parameters()]
        self.batches = Batches(members, settings, key, self.device)
        perturbation = perturbation_of(members[0].methods)
        if perturbation:
            perturbation.stacked = True
        self.correction = corrections(
            [handed_on(member.correction, settings) for member in members],
            self._stack_params,
            self.stacks[PARAMS][0],
        )
        self.step = Step(
            perturbation=perturbation,
            correction=self.correction,
            clip_norm=settings.clip_norm,
            optimizer=optimizer,
            lr=settings.lr_of(key[1]),
            norms=norms,
            stacked=True,
        )
        self.terms = [
            [m.methods[i] for m in members]
            for i, method in enumerate(members[0].methods)
            if overriding("stacked_term", [method])
        ]
        self.precision = precision_of(settings, self.device.type)
        self.rules = Rules()
        self.dropouts = self._dropouts()

    def train(self) -> None:
        clients, batches = len(self.members), self.batches
        gradient = self._gradient  # a local: a cohort that refers to itself outlives its round
        if self.graphs:
            methods = self.members[0].methods
            gradient = self.graphs.of(gradient, self.net, clients, lambda: self.leaves, methods)
        state = self._stacked_state()
        count, losses = 0, []
        for number in range(batches.steps[0]):
            if count != batches.count(number):  # some have no steps left
                count = batches.count(number)
                state = state or self.optimizer.state()  # made by the first step, of all
                self.optimizer.load(first_of(state, count))
                self._take_first(count)
            x, y, masks = self._batch(number)
            samples = [(y != PADDING).to(torch.float32)] if batches.padded else []
            if batches.padded not in self.known.checked:
                self._check(x, y, masks, samples, batches.sizes[number][:count])
            repeated = partial(frozen_statistics, self.net)
            loss = self.step(self.leaves, partial(gradient, x, y, *masks, *samples), repeated)
            losses.append(functional.pad(loss, (0, clients - count)) if count < clients else loss)
        self._finish(state or self.optimizer.state(), torch.stack(losses))

    def _stack_params(self, vectors: Tensors) -> Tensors:
        """(K, ...) for each parameter that is trained."""
        stacked = stack(vectors, self.layout.slots[PARAMS], self.device)
        return [tensor for tensor, trained in zip(stacked, self.trained, strict=True) if trained]

    def _take_first(self, count: int) -> None:
        """Take views of the first `count` clients' tensors, the trained ones as leaves."""
        named = {
            kind: {
                slot.name: tensor[:count]
                for slot, tensor in zip(self.layout.slots[kind], tensors, strict=True)
            }
            for kind, tensors in self.stacks.items()
        }
        self.params = named.pop(PARAMS)
        for tensor, trained in zip(self.params.values(), self.trained, strict=True):
            tensor.requires_grad_(trained)
        self.leaves = [p for p in self.params.values() if p.requires_grad]
        self.step.correction = self.correction.first(count)
        self.buffers = {name: t for tensors in named.values() for name, t in tensors.items()}
        if self.step.perturbation:
            self.step.perturbation.kept = []

    def _gradient(
        self, x: torch.Tensor, y: torch.Tensor, *more: torch.Tensor
    ) -> tuple[torch.Tensor, Tensors]:
        """The losses (A,) of the clients' batches and the gradients of their parameters; `more`:
        the masks of dropouts, then, if there is padding, which samples count."""
        each = [methods[: len(x)] for methods in self.terms]
        masks, samples = list(more[: len(self.dropouts)]), list(more[len(self.dropouts) :])
        with self.precision():
            output, seen = vmap(self._forward)(self.params, self.buffers, x, masks, samples)
            whole = losses = mean_losses(output, y)
            for methods, noted in zip(each, seen, strict=True):
                methods[0].seen = noted
                added = methods[0].stacked_term(methods, output, y)
                whole = whole + added
                if methods[0].relabels:
                    losses = losses + added
                methods[0].seen = []
        if whole.requires_grad:
            whole.sum().backward()
        return losses.detach(), taken_gradients(self.leaves)

    def _check(
        self, x: torch.Tensor, y: torch.Tensor, masks: Tensors, samples: Tensors, sizes: list[int]
    ) -> None:
        """Compare one client's gradient and buffers, in a pass for two, with those of a pass of its
        own.  Raises NotImplementedError where they differ.

        Layers that are unknown to us are stacked by torch's rules, not all of which are right; and
        a layer that mixes the samples of a batch mixes the padding in.  Without autocast: bfloat16
        can round a gradient by more than a wrong rule changes it.
        """
        k = max(range(len(sizes)), key=lambda k: (-sizes[k], k))  # most padding; not the first
        two, cut = sorted({0, k}), slice(sizes[k])

        def copies(of: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
            return (
                {n: p[of].detach().clone().requires_grad_(p.requires_grad) for n, p in params},
                {n: buffer[of].clone() for n, buffer in buffers},
            )

        def came_to(
            loss: torch.Tensor,
            own: dict[str, torch.Tensor],
            after: dict[str, torch.Tensor],
            of: Any,
        ) -> tuple[Tensors, Tensors]:
            """Gradients, and what was added to buffers."""
            leaves = [p for p in own.values() if p.requires_grad]
            found = ()
            if loss.requires_grad:
                found = torch.autograd.grad(loss, leaves, materialize_grads=True)
            return list(found), [after[n] - b[of] for n, b in buffers if b.is_floating_point()]

        params, buffers = self.params.items(), self.buffers.items()
        with unrounded():
            own, after = copies(two)
            several = [[each[two] for each in tensors] for tensors in (masks, samples)]
            output, _ = vmap(self._forward)(own, after, x[two], *several)
            stacked = came_to(mean_losses(output, y[two]).sum(), own, after, two)
            own, after = copies(k)
            masks = [mask[k][cut] for mask in masks]
            output, _ = self._forward(own, after, x[k][cut], masks, [])
            alone = came_to(mean_losses(output[None], y[k][None, cut]).sum(), own, after, k)
        what = ("another gradient", "other buffers")
        for other, ours, theirs in zip(what, stacked, alone, strict=True):
            if not theirs:
                continue
            apart = norm_of([a[-1] - b for a, b in zip(ours, theirs, strict=True)])
            if not apart <= ALIKE * norm_of(theirs):
                raise NotImplementedError(f"it gives {other} than for a client alone")
        self.known.checked.add(self.batches.padded)

    def _forward(
        self,
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        masks: Tensors,
        samples: Tensors,
    ) -> tuple[torch.Tensor, list[Tensors]]:
        """One client's pass: its output, and what hooks noted."""
        for methods in self.terms:
            methods[0].seen = []
        self.rules.masks, self.rules.samples = iter(masks), samples
        with self.rules:
            output = called_with(self.net, {**params, **buffers}, x)
        return output, [methods[0].seen for methods in self.terms]

    def _batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        """x (A, B, ...), y (A, B) and the masks of dropouts (A, B, ...) of a step."""
        x, y, sizes = self.batches.at(number)
        members = self.members[: len(x)]
        if not (self.dropouts or self._transforms(members[0])):
            return x, y, []
        xs, ys, masks = [], [], [[] for _ in self.dropouts]
        for member, size, own_x, own_y in zip(members, sizes, x, y, strict=True):
            seed_device(self.device.type, seed_of("step", *self.key, member.partition, number))
            own_x, own_y = own_x[:size], own_y[:size]
            for transform in self._transforms(member):
                own_x, own_y = transform(own_x, own_y)
            xs.append(own_x)
            ys.append(own_y)
            for mask, (ones, p) in zip(masks, self.dropouts, strict=True):
                mask.append(functional.dropout(ones[:size], p))
        if not self._transforms(members[0]):
            return x, y, [padded(mask) for mask in masks]
        return padded(xs), padded(ys, PADDING), [padded(mask) for mask in masks]

    @staticmethod
    def _transforms(member: Member) -> list[Any]:
        return overriding("transform", member.methods)

    def _dropouts(self) -> list[tuple[torch.Tensor, float]]:
        """The entry of `Known.dropouts` for this round's batches; made by a pass if it is new."""
        if [] in self.known.dropouts.values():  # no dropout, whatever the batch
            return []
        x, _, _ = self.batches.at(0)
        if x[0].shape not in self.known.dropouts:
            draws = generator_state(self.device.type)
            found = Dropouts()
            with torch.no_grad(), frozen_statistics(self.net), self.precision(), found:
                self.net(x[0])
            set_generator_state(self.device.type, draws)
            if any(len(ones) != len(x[0]) for ones, _ in found.seen):
                raise NotImplementedError("a dropout of something other than samples")
            self.known.dropouts[x[0].shape] = found.seen
        return self.known.dropouts[x[0].shape]

    def _stacked_state(self) -> State:
        """The members' optimizer states side by side, zeros for a member without one; None if no
        member has one.  In the memory format of the stacked parameters, as fused kernels need it:
        those of a network may have channels innermost."""
        kept = [member.optimizer for member in self.members]
        known = next(filter(None, kept), None)
        if known is None:
            self.optimizer.load(None)
            return None
        stacked: dict[str, Tensors] = {}
        for name, like in known.items():
            stacked[name] = [
                tensor.clone()
                if name == "steps"
                else torch.stack(
                    [own[name][i] if own else torch.zeros_like(tensor) for own in kept]
                ).contiguous()
                for i, tensor in enumerate(like)
            ]
        return stacked

    def _finish(self, state: State, losses: torch.Tensor) -> None:
        """Give each member its result, trained model and optimizer state; losses (S, K)."""
        batches = self.batches
        sizes = torch.tensor(batches.sizes, dtype=torch.float64)
        losses = losses.to("cpu", torch.float64)
        means = (losses * sizes).sum(0) / sizes.sum(0)
        lengths = [
            functional.pad(found, (0, len(self.members) - found.shape[1]))
            for found in self.step.lengths
        ]
        recorded = torch.stack(lengths).to("cpu", torch.float64) if lengths else None
        vectors = {}
        for kind, tensors in self.stacks.items():
            rows = torch.cat([tensor.detach().reshape(len(tensor), -1) for tensor in tensors], 1)
            vectors[kind] = rows.to(self.members[0].start[kind].device)
        for k, (member, steps) in enumerate(zip(self.members, batches.steps, strict=True)):
            member.trained = {kind: rows[k].clone() for kind, rows in vectors.items()}
            norms = None if recorded is None else recorded[:steps, :, k].clone()
            member.result = LocalResult(steps=steps, loss=float(means[k]), norms=norms)
            member.optimizer = self._own_state(state, member, k, steps)

    def _own_state(self, state: State, member: Member, k: int, steps: int) -> State:
        """Client k's part of the optimizer's state; its step number is its own."""
        if not (state and self.settings.keeps_state):
            return None
        before = member.optimizer or {}
        return {
            name: [
                (before[name][i] if name in before else torch.zeros_like(tensor)) + steps
                if name == "steps"
                else tensor[k].clone()
                for i, tensor in enumerate(tensors)
            ]
            for name, tensors in state.items()
        }
