"""What a model's groups hold, and what a schedule of partial updates costs beside full ones.

Two accountings.  As published (Wang et al., NeurIPS 2024, main table): bytes up alone, in GB of
1,024e6 B; a full step is three forward passes, a partial one two.  And the true one: all that
travels, both ways, and multiply-adds of a backward pass that ends at the first active group.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd

from fl_common.assembly import groups_of, new_model
from fl_common.config import methods, resolve
from fl_common.data.catalogue import SOURCES
from fl_common.failures import first_line
from fl_common.groups import NORMS
from fl_common.layout import PARAMS, tensors_of
from fl_common.models.catalogue import check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from fl_common.config import CoreConfig
    from fl_common.groups import Groups

SHAPE, CLASSES = (3, 32, 32), 10
"""A sample's shape and the number of classes, where neither data set nor options say them."""


@dataclass(frozen=True)
class Pass:
    """One sample's way through a model, in multiply-adds (MACs)."""

    forward: int
    """Of convolutions and linear layers; what is neither is not counted."""
    backward: int
    """Of the same: gradients of inputs that need one, and of weights that are trained."""
    published: int
    """F of the published table: `forward`, 4 per element that a norm gives, and window + 1 per
    element that an average pool gives.  Inferred: it reproduces the table's cells."""
    changes: frozenset[str]
    """The kinds of buffers whose values the pass changes."""

    @property
    def step(self) -> int:
        return self.forward + self.backward


def passing(net: torch.nn.Module, shape: Sequence[int]) -> Pass:
    """Counts a sample's way through `net` on a real pass, whose graph says what needs a gradient.
    The pass is of two samples: BatchNorm in training refuses a single value per channel."""
    sums: Counter[str] = Counter()

    def count(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        x = inputs[0]
        if isinstance(layer, _ConvNd | torch.nn.Linear):
            # An element meets one slice of the weight, (inputs / groups, *kernel) or (inputs,).
            met = x if getattr(layer, "transposed", False) else out
            macs = met.numel() * layer.weight[0].numel()
            sums["forward"] += macs
            sums["backward"] += macs * (x.requires_grad + layer.weight.requires_grad)
        elif isinstance(layer, NORMS):
            sums["extra"] += 4 * out.numel()
        elif isinstance(layer, _AvgPoolNd | _AdaptiveAvgPoolNd):
            sums["extra"] += x.numel() + out.numel()

    buffers = [(kind, t) for kind, found in tensors_of(net).items() for t in found.values()]
    before = [tensor.detach().clone() for _, tensor in buffers]
    dtype, generator = next(net.parameters()).dtype, torch.Generator().manual_seed(0)
    hooks = [module.register_forward_hook(count) for module in net.modules()]
    try:
        net(torch.randn(2, *shape, dtype=dtype, generator=generator))
    finally:
        for hook in hooks:
            hook.remove()
    changes = {k for (k, t), old in zip(buffers, before, strict=True) if not torch.equal(t, old)}
    forward, backward, extra = (sums[what] // 2 for what in ("forward", "backward", "extra"))
    return Pass(forward, backward, forward + extra, frozenset(changes))


@dataclass(frozen=True)
class Plan:
    """A configured model and its groups; no data is read for it."""

    config: CoreConfig
    net: torch.nn.Module
    groups: Groups
    shape: tuple[int, ...]
    classes: int

    @classmethod
    def of(cls, config: CoreConfig, shape: tuple[int, ...] | None, classes: int | None) -> Plan:
        """`shape` (C, H, W) or (F,) and `classes` where the data set is known by reading alone.

        Raises ValueError, one line for each mistake.
        """
        model, source = config.model, SOURCES.get(config.data.source)
        if source and source.shape:
            if shape not in (None, source.shape) or classes not in (None, source.classes):
                raise ValueError(
                    f"data.source = {config.data.source}: its samples are {_sides(source.shape)}, "
                    f"its classes {source.classes}; leave out --shape and --classes"
                )
            shape, classes = source.shape, source.classes
        shape, classes = shape or SHAPE, classes or CLASSES
        if errors := check(model.name, shape, norm=model.norm, head=model.head):
            raise ValueError("\n".join(errors))
        try:
            net = new_model(config, classes, shape, torch.device("cpu"))
            return cls(config, net, groups_of(config, net, shape), shape, classes)
        except Exception as error:  # the model may be the user's own
            raise ValueError(f"{model.name}: {first_line(error)}") from error

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of all that travels, by group and by kind of buffers."""
        width = next(self.net.parameters()).element_size()
        sizes = {name: width * self.groups.numel(name) for name in self.groups.names}
        for kind, tensors in tensors_of(self.net).items():
            if kind != PARAMS:
                sizes[kind] = sum(tensor.nbytes for tensor in tensors.values())
        return sizes

    @property
    def buffers(self) -> int:
        """Bytes of what travels besides the groups."""
        return sum(size for name, size in self.sizes.items() if name not in self.groups.names)

    def __str__(self) -> str:
        return (
            f"{self.config.model.name}: {sum(self.groups.sizes):,} parameters in "
            f"{len(self.groups.names)} groups; samples of {_sides(self.shape)}, "
            f"{self.classes} classes"
        )


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


@dataclass(frozen=True)
class Report:
    """What `flatfed cost` tells; of every pair, full updates come first, then FedPart."""

    plan: Plan
    samples: float
    """n of each client."""
    macs: dict[str, float]
    """Of one sample: forward, as published, a full step, the mean partial step."""
    costs: dict[int, dict[str, tuple[float, float]]]
    """By number of rounds, of the first cycle and of the run.  Of the whole cohort: published_gb
    (up) [1,024e6 B], bytes_up, bytes_down [bytes]; of a client that takes part in every round:
    published_tmacs, tmacs [1e12 MACs]."""

    def as_json(self) -> dict[str, Any]:
        config = self.plan.config
        return {
            "model": config.model.name,
            "parameters": sum(self.plan.groups.sizes),
            "groups": len(self.plan.groups.names),
            "clients": config.clients.number,
            "cohort": config.cohort_size,
            "samples": self.samples,
            "epochs": config.train.epochs,
            "macs_per_sample": self.macs,
            "costs": [{"rounds": rounds} | pairs for rounds, pairs in self.costs.items()],
        }


def report(plan: Plan, samples: float, cohort: Callable[[int], list[int]]) -> Report:
    """`samples`: of each client; `cohort`: who takes part in a round, counted from 1.

    Evaluation on clients is not counted, nor what regularizers add to a step.  Raises ValueError
    if the run is not as long as its cycles.
    """
    config, names, sizes = plan.config, plan.groups.names, plan.sizes
    strategy = methods("strategies")[config.strategy.name](config)
    strategy.bind(plan.groups)
    plan.net.train()
    passes, weights = {}, {}  # by active groups; weights: bytes of parameters
    for active in (names, *((name,) for name in names)):
        frozen_norms = strategy.params.bn_frozen == "eval"
        with plan.groups.only(plan.net, active, frozen_norms=frozen_norms):
            passes[active] = passing(plan.net, plan.shape)
        weights[active] = sum(sizes[name] for name in active)
    lengths = sorted({strategy.schedule.cycle, config.run.rounds})
    actives = [strategy.schedule.active(t) for t in range(1, lengths[-1] + 1)]
    cohorts = [cohort(t) for t in range(1, lengths[-1] + 1)]
    down = _down(
        sizes,
        [{*active, *passes[active].changes} for active in actives],
        cohorts,
        tracked=config.sync.mode == "versions",
    )
    full, whole = passes[names], sum(sizes.values())
    buffers, work = plan.buffers, samples * config.train.epochs / 1e12
    scales = {
        "published_gb": config.cohort_size / 1.024e9,
        "published_tmacs": work * full.published,
        "bytes_up": 1,
        "bytes_down": 1,
        "tmacs": work,
    }
    rows = [
        {
            "published_gb": (weights[names], weights[active]),
            "published_tmacs": (3, 3 if active == names else 2),
            "bytes_up": (len(who) * whole, len(who) * (weights[active] + buffers)),
            "bytes_down": (len(who) * whole, received),
            "tmacs": (full.step, passes[active].step),
        }
        for active, who, received in zip(actives, cohorts, down, strict=True)
    ]

    def of(rounds: int) -> dict[str, tuple[float, float]]:
        return {
            key: tuple(
                scale * sum(arm) for arm in zip(*(row[key] for row in rows[:rounds]), strict=True)
            )
            for key, scale in scales.items()
        }

    macs = {
        "forward": full.forward,
        "published_forward": full.published,
        "full_step": full.step,
        "partial_step": sum(passes[(name,)].step for name in names) / len(names),
    }
    return Report(plan, samples, macs, {rounds: of(rounds) for rounds in lengths})


def plan_of(values: Mapping[str, Any]) -> Plan | None:
    """The plan of a run by its settings.  None where only reading the samples tells their shape,
    or where the settings are those of another version."""
    settings = {key: value for key, value in values.items() if not key.startswith("engine.")}
    try:  # nodes elsewhere have the data: none is read here
        config = resolve({**settings, "engine.name": "grpc"}, absolute_paths=False)
        return Plan.of(config, None, None) if SOURCES[config.data.source].shape else None
    except (KeyError, ValueError):
        return None


def published_tmacs(values: Mapping[str, Any], samples: float, rounds: int) -> float | None:
    """What a run with these settings costs a client by the published accounting [1e12 MACs].  The
    client has so many samples and takes part in the first `rounds` rounds.  None as in `plan_of`.
    """
    plan = plan_of(values)
    if plan is None:
        return None
    config, names, partial = plan.config, plan.groups.names, 0
    if config.strategy.name == "fedpart":
        strategy = methods("strategies")["fedpart"](config)
        strategy.bind(plan.groups)
        actives = map(strategy.schedule.active, range(1, rounds + 1))
        partial = sum(active != names for active in actives)
    forwards = 3 * rounds - partial
    forward = passing(plan.net.train(), plan.shape).published
    return forwards * forward * samples * config.train.epochs / 1e12


def _down(
    sizes: dict[str, int], changes: list[set[str]], cohorts: list[list[int]], tracked: bool
) -> Iterator[int]:
    """Bytes down by round: to each client what changed since it last took part, at first all;
    without `tracked` always all."""
    current = dict.fromkeys(sizes, 0)
    held: dict[int, dict[str, int]] = {}
    for changed, who in zip(changes, cohorts, strict=True):
        total = 0
        for name in who:
            has = held.get(name, {}) if tracked else {}
            total += sum(size for part, size in sizes.items() if has.get(part) != current[part])
            held[name] = dict(current)
        yield total
        for part in changed & sizes.keys():
            current[part] += 1


def cost_table(told: Report) -> RenderableType:
    """Both accountings: full updates, FedPart, and their ratio."""
    from rich.console import Group

    config, per_sample = told.plan.config, {k: _number(v / 1e6) for k, v in told.macs.items()}
    made = _table("", "full updates", "FedPart", "ratio")
    for rounds, costs in told.costs.items():
        made.add_row(f"{'run' if rounds == config.run.rounds else 'first cycle'}, {rounds} rounds")
        for label, key, unit in (
            ("as published: up, GB", "published_gb", 1),
            ("as published: TMACs", "published_tmacs", 1),
            ("true: up, MB", "bytes_up", 1e6),
            ("true: down, MB", "bytes_down", 1e6),
            ("true: TMACs", "tmacs", 1),
        ):
            full, partial = costs[key]
            ratio = f"{partial / full:.3f}" if full else ""
            made.add_row(f"  {label}", _number(full / unit), _number(partial / unit), ratio)
        made.add_section()
    return Group(
        str(told.plan),
        f"{config.cohort_size} of {config.clients.number} clients a round, {told.samples:g} "
        f"samples each, E = {config.train.epochs}",
        made,
        "GB: 1,024e6 bytes, MB: 10^6 bytes, of the whole cohort; TMACs: 10^12 multiply-adds of one "
        "client",
        f"MACs of a sample, in millions: forward {per_sample['forward']} (as published "
        f"{per_sample['published_forward']}), full step {per_sample['full_step']}, mean partial "
        f"step {per_sample['partial_step']}",
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}"


def groups_table(plan: Plan) -> RenderableType:
    """The groups, in the order in which rounds train them, and what travels in every round."""
    from rich.console import Group

    made = _table("group", "parameters", "elements", "bytes", "share")
    sizes, tensors = plan.sizes, tensors_of(plan.net)
    total = sum(sizes[name] for name in plan.groups.names)

    def add(name: str, what: str, elements: int, size: int) -> None:
        made.add_row(name, what, f"{elements:,}", f"{size:,}", f"{size / total:.2%}")

    for name in plan.groups.names:
        add(name, _patterns(plan, name), plan.groups.numel(name), sizes[name])
    made.add_section()
    add("all groups", "", sum(plan.groups.sizes), total)
    for kind in [kind for kind in sizes if kind not in plan.groups.members]:
        elements = sum(tensor.numel() for tensor in tensors[kind].values())
        add(kind, "buffers, with every round", elements, sizes[kind])
    return Group(str(plan), made, "parameters: as fedpart.groups takes them; share: of all groups")


def _patterns(plan: Plan, group: str) -> str:
    """A group's parameters; those of a module as "module.*" where it has no others."""
    names = [name for name, _ in plan.net.named_parameters()]
    mine = {names[i] for i in plan.groups.members[group]}

    def pattern(name: str) -> str:
        for i in (i for i, letter in enumerate(name) if letter == "."):
            if all(other in mine for other in names if other.startswith(name[: i + 1])):
                return f"{name[: i + 1]}*"
        return name

    return "+".join(dict.fromkeys(pattern(name) for name in names if name in mine))


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(box=SIMPLE, pad_edge=False)
    for column in columns:
        left = column in ("", "group", "parameters")
        made.add_column(column, justify="left" if left else "right", overflow="fold")
    return made
