"""What every federated algorithm shares, and the two halves that each declares.

A strategy's file holds its server half (a `FederatedStrategy`: how replies become the next
model) and its client half (a `ClientRule`: what is added to local gradients).  Both work on the
vectors of `fl_common.layout`.  Sign convention, everywhere: delta_i = theta_i - w, local minus
global.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from pydantic import Field

from fl_common import wire
from fl_common.config import Group, NoParams, enter
from fl_common.deferred import torch
from fl_common.guards import Spec
from fl_common.layout import COUNTERS, PARAMS, STATS
from fl_common.local import LocalMethod, Work

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from flwr.serverapp import Grid

    from fl_common.config import CoreConfig
    from fl_common.groups import Groups
    from fl_common.layout import Flat

METHODS: dict[str, type[FederatedStrategy]] = {}
BLOCK = 1 << 16
"""Elements that the CPU adds at a time: adding across dtypes copies the addend, and a copy this
small stays in its cache."""


class Weighting(Group):
    """The weights omega_i of methods whose server averages models uniformly."""

    weighting: Literal["omega", "uniform"] = Field(
        "omega", description="omega: clients count by their samples; uniform: all count the same"
    )

    def omega(self, work: Work) -> float:
        """omega_i, or 1 with `weighting=uniform`."""
        return work.omega if self.weighting == "omega" else 1.0


class ClientRule(LocalMethod):
    """The client half of a strategy; this base class is plain local training."""


@dataclass(frozen=True)
class Reply:
    """One client's accepted answer."""

    samples: int
    """n_i, training samples."""
    steps: int
    """K_i, optimizer steps of the round."""
    model: Flat
    """theta_i by kind; in a partial update, its parameters by group."""

    @classmethod
    def of(cls, message: Message) -> Reply:
        """The answer in a message that the guards have passed."""
        metrics = message.content[wire.METRICS]
        return cls(
            samples=int(metrics["num-examples"]),
            steps=int(metrics["steps"]),
            model=wire.vectors(message.content),
        )


def over(vector: torch.Tensor, number: float) -> torch.Tensor:
    """vector / number, the same bits on every device: by a Python number, CUDA multiplies by its
    inverse.  A strategy whose clients remember something can do with a plain `/`: `Rounds._place`
    keeps its vectors on the CPU."""
    return vector / vector.new_full((), number)


class WeightedMean:
    """A mean of vectors, summed in float64 in the order they come.

    The weights need no normalising beforehand.  Equal float32 vectors with whole-numbered weights
    give back exactly that vector.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._sum: torch.Tensor | None = None

    def add(self, vector: torch.Tensor, weight: float = 1.0) -> None:
        """Add weight * vector (d,); the vector is not kept."""
        if self._sum is None:
            self._sum = torch.zeros_like(vector, dtype=torch.float64)
        for total, part in _blocks(self._sum, vector):
            total.add_(part, alpha=weight)
        self.weight += weight

    @property
    def sum(self) -> torch.Tensor:
        """sum of weight * vector (d,), float64, read-only."""
        if self._sum is None:
            raise ValueError("a mean of no vectors")
        return self._sum

    def value(self, dtype: torch.dtype) -> torch.Tensor:
        """The mean (d,), as a new tensor."""
        mean = torch.empty_like(self.sum, dtype=dtype)
        for part, total in _blocks(mean, self.sum):
            part.copy_(over(total, self.weight))
        return mean

    def take(self, dtype: torch.dtype) -> torch.Tensor:
        """The mean; lets go of the sum, as large as two models, so it can be taken once."""
        mean = self.value(dtype)
        self._sum = None
        return mean

    def take_sum(self) -> torch.Tensor:
        """`sum`; lets go of it, so it can be taken once."""
        total, self._sum = self.sum, None
        return total


def _blocks(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Matching blocks of two tensors of one size; on a GPU, each tensor as one block."""
    length = BLOCK if one.device.type == "cpu" else max(1, one.numel())
    return zip(*(v.reshape(-1).split(length) for v in (one, other)), strict=True)


class BufferMean:
    """How buffers are aggregated, whatever the algorithm: floating-point statistics are averaged
    with weights n_i, integer counters are the first client's."""

    def __init__(self) -> None:
        self.stats = WeightedMean()
        self.counters: Flat = {}

    def add(self, reply: Reply) -> None:
        if STATS in reply.model:
            self.stats.add(reply.model[STATS], reply.samples)
        if COUNTERS in reply.model and not self.counters:
            self.counters = {COUNTERS: reply.model[COUNTERS]}

    def value(self, like: Flat) -> Flat:
        """The new buffers, in the dtypes of the model `like`."""
        stats = {STATS: self.stats.value(like[STATS].dtype)} if STATS in like else {}
        return stats | self.counters


class FederatedStrategy(Strategy):
    """The server half: an algorithm overrides `begin`, `add` and `step`.

    Implements Flower's five methods, so it runs wherever a Flower strategy does.  The grid decides
    who takes part: `configure_train` writes to every node that it lists, in its order.
    `aggregate_train` takes replies one by one and holds at most one client's model.
    """

    name: ClassVar[str]
    Params: ClassVar[type[Group]] = NoParams
    Rule: ClassVar[type[ClientRule]] = ClientRule
    regularizers: ClassVar[tuple[str, ...]] = ()
    """Regularizers that are part of this strategy; their parameters keep their own keys."""
    refuses: ClassVar[dict[str, str]] = {}
    """Regularizers that make no sense with this strategy, with the reason and the remedy."""
    redundant: ClassVar[dict[str, str]] = {}
    """Regularizers that work with it but add nothing, with the reason; a warning says so once."""
    keeps: ClassVar[tuple[str, ...]] = ()
    """Names of the vectors (d,) that the server keeps from round to round; zero at first."""
    sends: ClassVar[tuple[str, ...]] = ()
    """Those of `keeps` that are sent to clients with the model."""
    partial: ClassVar[bool] = False
    """Whether a round may train and send some groups of layers only."""
    tracked: ClassVar[bool] = True
    """Whether messages may leave out what their receiver already has."""
    on_card: ClassVar[bool] = True
    """Whether all its vector arithmetic is torch's, and so runs on any device."""

    def __init_subclass__(cls) -> None:
        enter(METHODS, cls)

    def __init__(self, config: CoreConfig | None = None) -> None:
        """Without `config` the parameters are the defaults, and nothing is known of clients."""
        self.config = config
        self.params = config.params_of(self.name) if config else self.Params()
        self.w: Flat = {}
        self.kept: Flat = {}
        self.groups: Groups | None = None
        self.server_round, self.samples = 0, 0
        """Of the round under way: its number, and the samples of all clients of the run."""

    def bind(self, groups: Groups) -> None:
        """The groups of the model's layers, before the first round.  Raises ValueError."""
        self.groups = groups

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        """What is wrong with the settings of this strategy, one line each."""
        errors = []
        if config.strategy.params:
            keys = f"its own keys, {cls.name}.*" if cls.Params.model_fields else "no keys"
            errors.append(
                f'strategy.params = "{config.strategy.params}": {cls.name} has {keys}; '
                "leave it empty"
            )
        if why := cls.plain_sgd(config):
            errors += [
                f"{key}: not with strategy.name={cls.name}: {why}; leave it at {default}"
                for key, given, default in (
                    ("train.momentum", config.train.momentum != 0, 0),
                    ("train.optimizer", config.train.optimizer != "sgd", "sgd"),
                )
                if given
            ]
        return errors

    @classmethod
    def plain_sgd(cls, config: CoreConfig) -> str:
        """Why clients must take plain SGD steps (no momentum, no Adam); "" if they need not."""
        return ""

    def warnings(self, config: CoreConfig, model: Flat, works: Sequence[Work] = ()) -> list[str]:
        """Settings that work, but less well than a user may expect; told once, after `bind`.
        `works`: what each client would do in round 1."""
        return [
            f"{name} with strategy {self.name}: {self.redundant[name]}"
            for name in config.regularizer_names
            if name in self.redundant
        ]

    @classmethod
    def rule(cls, config: CoreConfig, settings: ConfigRecord, work: Work) -> ClientRule:
        """The client half of one round; `settings`: what came with the message."""
        return cls.Rule(config.params_of(cls.name), work)

    # What an algorithm declares

    def begin(self, w: torch.Tensor) -> None:
        """Before the first reply of a round; `w` (d,) is the model that was sent."""
        raise NotImplementedError

    def add(self, reply: Reply) -> None:
        """Add one reply to the sums; replies come in partition order."""
        raise NotImplementedError

    def step(self) -> torch.Tensor:
        """The next global parameters (d,), after the last reply."""
        raise NotImplementedError

    # What it may use

    def work(self, reply: Reply) -> Work:
        """The client's part of the round, by the same computation as on the client."""
        return Work.of(self.config, self.server_round, reply.samples, self.samples)

    def delta(self, reply: Reply) -> torch.Tensor:
        """Delta_i = theta_i - w (d,), in the model's dtype."""
        return reply.model[PARAMS] - self.w[PARAMS]

    def buffers(self) -> BufferMean:
        """A new aggregator for a round's buffers."""
        return BufferMean()

    def expected(self) -> dict[str, dict[str, Spec]]:
        """The array records of a good reply to `configure_train`."""
        return {wire.ARRAYS: self.specs(self.w)}

    @staticmethod
    def specs(model: Flat) -> dict[str, Spec]:
        return {kind: Spec.of(vector) for kind, vector in model.items()}

    def state(self) -> Flat:
        """Everything besides the model that the next round depends on."""
        return dict(self.kept)

    def load_state(self, state: Flat) -> None:
        """Restore what `state` returned."""
        self.kept = dict(state)

    # Flower's Strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        self.w = wire.unpack(arrays)
        self.server_round, self.samples = server_round, int(config.get(wire.SAMPLES, 0))
        if not self.kept:
            self.kept = {name: torch.zeros_like(self.w[PARAMS]) for name in self.keeps}
        down = wire.pack({**self.w, **{name: self.kept[name] for name in self.sends}})
        return list(_messages(MessageType.TRAIN, server_round, down, config, grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.begin(self.w[PARAMS])
        buffers, loss, samples = self.buffers(), 0.0, 0
        for message in replies:
            if not message.has_content():
                continue
            reply = Reply.of(message)
            self.add(reply)
            buffers.add(reply)
            loss += reply.samples * float(message.content[wire.METRICS]["loss"])
            samples += reply.samples
            del message, reply  # else they would stay alive while the next one arrives
        if not samples:
            return None, None
        new, sent = self.step(), Spec.of(self.w[PARAMS])
        if (given := Spec.of(new)) != sent:
            raise ValueError(f"{self.name}.step() gave {given}; the model is {sent}")
        # The old model is let go of before the new one is stored.
        self.w = model = {PARAMS: new, **buffers.value(self.w)}
        return wire.pack(model), MetricRecord({"loss": loss / samples, "num-examples": samples})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        return list(_messages(MessageType.EVALUATE, server_round, arrays, config, grid))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Means of all metrics over the clients' samples."""
        sums: dict[str, float] = {}
        samples = 0
        for message in replies:
            if message.has_content():
                metrics = message.content[wire.METRICS]
                n = int(metrics["num-examples"])
                samples += n
                for key in sorted(set(metrics) - {"num-examples"}):
                    sums[key] = sums.get(key, 0.0) + n * float(metrics[key])
        if not samples:
            return None
        return MetricRecord({key: value / samples for key, value in sums.items()})

    def summary(self) -> None:
        print(f"{self.name}: {self.params.model_dump(by_alias=True)}")


def _messages(
    kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
) -> Iterator[Message]:
    settings = ConfigRecord({**config, "server-round": server_round})
    for node_id in grid.get_node_ids():
        content = RecordDict({wire.ARRAYS: arrays, wire.CONFIG: settings})
        yield Message(content, node_id, kind, group_id=str(server_round))
