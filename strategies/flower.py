"""Flower's own strategies that average arrays, with our clients: `strategy.name = "flwr:FedAdam"`.

Such a strategy sees one array, the trainable parameters as a vector (its arithmetic is element by
element, or by distances between whole models), and one metric record.  BatchNorm statistics and
counters travel in a record of their own and are averaged as for our strategies: Flower's server
optimizers would take momentum steps on them.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flwr import serverapp
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from fl_common import wire
from fl_common.config import NoParams, items_of
from fl_common.deferred import torch
from fl_common.layout import PARAMS, STATS
from strategies.base import METHODS, BufferMean, ClientRule, FederatedStrategy, Reply
from strategies.fedprox import FedProxParams, FedProxRule

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flwr.app import ConfigRecord
    from flwr.serverapp import Grid

    from fl_common.config import CoreConfig
    from fl_common.groups import Groups
    from fl_common.guards import Spec
    from fl_common.layout import Flat
    from fl_common.local import Work

PREFIX = "flwr:"
BUFFERS = "buffers"
NAMES = (
    "Bulyan", "FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedMedian", "FedProx",
    "FedTrimmedAvg", "FedYogi", "Krum", "MultiKrum", "QFedAvg",
)  # fmt: skip
OURS = {
    "fraction_train": 1.0,
    "fraction_evaluate": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "train_loss_key": "loss",
}
"""Arguments that we set ourselves: our server draws the cohort (`clients.per-round`)."""


def parse(name: str, params: str) -> tuple[Any, dict[str, Any]]:
    """The class behind "flwr:Name" and its arguments from "eta=0.1,beta_1=0.9".

    Raises ValueError with one line for what is unknown or cannot be read.
    """
    cls = getattr(serverapp.strategy, name.removeprefix(PREFIX))
    scalars = {
        key: parameter
        for key, parameter in inspect.signature(cls).parameters.items()
        if key not in OURS and not key.endswith(("_fn", "_key", "_rule"))
    }
    given: dict[str, Any] = {}
    for item in items_of(params):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or key not in scalars:
            raise ValueError(
                f'strategy.params = "{params}": {key} is not an argument of {name}; it has '
                + (", ".join(scalars) or "none")
            )
        if key in given:
            raise ValueError(f'strategy.params = "{params}": {key} is given twice; give it once')
        whole = isinstance(scalars[key].default, int)
        given[key] = _number(text, whole)
        if given[key] is None:
            kind = "whole number" if whole else "finite number"
            raise ValueError(f'strategy.params = "{params}": {key} = {text} is not a {kind}')
    missing = [k for k, p in scalars.items() if p.default is p.empty and k not in given]
    if missing:
        raise ValueError(f'strategy.params = "{params}": {name} needs {", ".join(missing)}')
    return cls, given


def _number(text: str, whole: bool) -> float | None:
    """The number in `text`: finite or, with `whole`, an integer from 0 on; None if it is not."""
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and not (whole and value < 0) else None


def _ours(cls: Any) -> dict[str, Any]:
    known = inspect.signature(cls).parameters
    return {key: value for key, value in OURS.items() if key in known}


ROBUST = {"Bulyan", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"}
"""Those that judge the clients' models; they get BatchNorm's statistics too, which could else undo
what they keep out."""
STATEFUL = ("current_arrays", "m_t", "v_t", "momentum_vector")
"""Where Flower's strategies keep what the next round depends on."""
HOLDERS: dict[type, tuple[Callable[[Any], np.ndarray], Callable[[np.ndarray], Any]]] = {
    ArrayRecord: (
        lambda record: next(iter(record.values())).numpy(),  # some rename the key
        lambda array: ArrayRecord({PARAMS: Array(array)}),
    ),
    dict: (lambda arrays: arrays[PARAMS], lambda array: {PARAMS: array}),
    list: (lambda arrays: arrays[0], lambda array: [array]),
}
"""How to take the one vector out of each kind of container that they use, and to put it back."""


class FlowerStrategy:
    """One of Flower's strategies behind the interface of a `FederatedStrategy`."""

    name: ClassVar[str]
    Params = NoParams
    refuses: ClassVar[dict[str, str]]
    redundant = FederatedStrategy.redundant
    partial, tracked, on_card = False, False, False
    robust: ClassVar[bool]

    regularizers = FederatedStrategy.regularizers
    warnings = FederatedStrategy.warnings

    def __init__(self, config: CoreConfig | None = None) -> None:
        cls, given = parse(self.name, config.strategy.params if config else "")
        self.inner = cls(**given, **_ours(cls))
        self.w: Flat = {}

    def bind(self, groups: Groups) -> None:
        """Flower's strategies know nothing of layers.  A run begins, which logs a line per round
        itself: Flower's own lines are silenced."""
        logging.getLogger("flwr").setLevel(logging.WARNING)

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        try:
            inner = cls(config).inner
        except Exception as error:  # whatever Flower's class raises for its arguments
            return [str(error)]
        if isinstance(inner, serverapp.strategy.Bulyan):
            needed = 4 * inner.num_malicious_nodes + 3
            if config.cohort_size < needed:
                return [
                    f"{cls.name} needs {needed} clients in a round (4 * num_malicious_nodes + 3), "
                    f"not {config.cohort_size}; see clients.per-round"
                ]
        return []

    @classmethod
    def rule(cls, config: CoreConfig, settings: ConfigRecord, work: Work) -> ClientRule:
        """Plain training, or FedProx's term where Flower's FedProx has sent its `proximal-mu`."""
        mu = settings.get("proximal-mu")
        if mu is None:
            return ClientRule(NoParams(), work)
        return FedProxRule(FedProxParams(mu=float(mu)), work)

    def state(self) -> Flat:
        """The server optimizer's vectors by "attribute.container"."""
        found = {name: getattr(self.inner, name, None) for name in STATEFUL}
        return {
            f"{name}.{kind.__name__}": torch.from_numpy(take(value).copy())
            for name, value in found.items()
            for kind, (take, _) in HOLDERS.items()
            if isinstance(value, kind) and value  # one may have been emptied
        }

    def load_state(self, state: Flat) -> None:
        kinds = {kind.__name__: hold for kind, (_, hold) in HOLDERS.items()}
        for key, vector in state.items():
            name, _, kind = key.partition(".")
            setattr(self.inner, name, kinds[kind](vector.numpy()))

    def expected(self) -> dict[str, dict[str, Spec]]:
        return _by_record(FederatedStrategy.specs(self.w))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        self.w = wire.unpack(arrays)
        return self._configure("configure_train", server_round, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        self.w = wire.unpack(arrays)
        return self._configure("configure_evaluate", server_round, config, grid)

    def _configure(
        self, method: str, server_round: int, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        if not list(grid.get_node_ids()):  # Flower's sampling would wait for a node for ever
            return []
        parts = {name: wire.pack(part) for name, part in _by_record(self.w).items()}
        arrays = parts.pop(wire.ARRAYS)
        messages = list(getattr(self.inner, method)(server_round, arrays, config, grid))
        # Flower puts the same content into all messages; each needs its own.
        return [
            Message(
                RecordDict({**message.content, **parts}),
                message.metadata.dst_node_id,
                message.metadata.message_type,
                group_id=message.metadata.group_id,
            )
            for message in messages
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's strategies take all replies at once; buffers are averaged as they come, except
        statistics where the strategy is robust."""
        buffers, stripped = BufferMean(), []
        judged = [PARAMS, *([STATS] if self.robust and STATS in self.w else [])]
        for message in replies:
            reply = Reply.of(message)
            buffers.add(reply)
            metrics = message.content[wire.METRICS].items()
            content = {
                # A copy: some strategies write to it, and a client may remember the same vector.
                wire.ARRAYS: wire.pack({kind: reply.model[kind].clone() for kind in judged}),
                # Without lists: Flower averages them too, but they are as long as a client's steps.
                wire.METRICS: MetricRecord({k: v for k, v in metrics if not isinstance(v, list)}),
            }
            stripped.append(Message(RecordDict(content), reply_to=message))
            del message, reply  # else they would stay alive while the next one arrives
        arrays, metrics = self.inner.aggregate_train(server_round, stripped)
        if arrays is None:
            return None, None
        found = {k: v.to(self.w[k].dtype) for k, v in wire.unpack(arrays).items()}
        self.w = buffers.value(self.w) | found
        return wire.pack(self.w), metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return self.inner.aggregate_evaluate(server_round, list(replies))


def _by_record(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Parameters in one record; buffers, if there are any, in another."""
    rest = {key: value for key, value in parts.items() if key != PARAMS}
    return {wire.ARRAYS: {PARAMS: parts[PARAMS]}, **({BUFFERS: rest} if rest else {})}


REFUSES = {
    "FedProx": {
        "proximal": "it is the same term twice; set proximal_mu in strategy.params alone",
    },
}
"""`FederatedStrategy.refuses` of those that refuse any."""

for _name in NAMES:
    _own = {"name": PREFIX + _name, "refuses": REFUSES.get(_name, {}), "robust": _name in ROBUST}
    METHODS[PREFIX + _name] = type(_name, (FlowerStrategy,), _own)
