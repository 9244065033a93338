"""The clients of one process: one model, one optimizer and one data set serve them all."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from flwr.app import MetricRecord, RecordDict

from fl_client.optimizers import SGD, Adam
from fl_client.trainer import LocalData, local_round
from fl_common import assembly, wire
from fl_common.config import methods
from fl_common.determinism import prepare_process
from fl_common.layout import PARAMS, Layout, concatenate, tensors_of

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

    from fl_common.config import CoreConfig
    from fl_common.layout import Flat
    from regularizers.base import Regularizer
    from strategies.base import ClientRule

OPTIMIZER = "optimizer"
"""The record of a client's state that keeps its momentum."""


class Clients:
    """Trains any partition of the configured data; resident between messages."""

    def __init__(self, config: CoreConfig) -> None:
        prepare_process(config.train.threads, config.train.deterministic)
        self.config = config
        self.device = assembly.training_device(config)
        self.data = assembly.load_data(config)
        self.partitions = assembly.split_data(config, self.data)
        self.transform = assembly.transform(config)
        self.on_device: dict[int, LocalData] = {}
        self.net: torch.nn.Module | None = None

    def describe(self, partition: int) -> RecordDict:
        """The roll call's answer: n_i and the label counts; the model is not touched."""
        answer = {
            "partition-id": partition,
            "num-examples": int(self.partitions.sizes[partition]),
            "label-counts": self.partitions.label_counts[partition].tolist(),
        }
        return RecordDict({wire.METRICS: MetricRecord(answer)})

    def train(
        self, partition: int, server_round: int, arrays: ArrayRecord, state: RecordDict
    ) -> RecordDict:
        """One local round from the model in `arrays`; `state` is the client's own memory."""
        started = time.process_time()
        config, data = self.config, self.local_data(partition)
        if self.net is None:
            self._make_resident()
        received = wire.unpack(arrays)
        w = self._install(received)
        extra = {name: v for name, v in received.items() if name not in self.tensors}
        rule, regularizers = self._methods()
        self._restore_optimizer(state)

        rule.begin(w, extra)
        try:
            for regularizer in regularizers:
                regularizer.begin(self.net, w)
            result = local_round(
                self.net,
                data,
                rule,
                regularizers,
                self.optimizer,
                config.train,
                seed=config.run.seed,
                server_round=server_round,
                partition=partition,
            )
        finally:
            for regularizer in regularizers:
                regularizer.finish()

        self._keep_optimizer(state)
        model = {kind: concatenate(tensors) for kind, tensors in self.tensors.items()}
        metrics = {
            "num-examples": len(data.y),
            "steps": result.steps,
            "loss": result.loss,
            "cpu-s": time.process_time() - started,
        }
        up = wire.pack({**model, **rule.finish()})
        return RecordDict({wire.ARRAYS: up, wire.METRICS: MetricRecord(metrics)})

    def local_data(self, partition: int) -> LocalData:
        """The partition's tensors; a GPU keeps them, on the CPU the mapped cache is near."""
        if partition not in self.on_device:
            indices, train = torch.from_numpy(self.partitions[partition]), self.data.train
            x, y = (torch.from_numpy(a).index_select(0, indices) for a in (train.x, train.y))
            data = LocalData(x.to(self.device), y.to(self.device), self.transform.train)
            if self.device.type == "cpu":
                return data
            self.on_device[partition] = data
        return self.on_device[partition]

    def _make_resident(self) -> None:
        train = self.config.train
        self.net = assembly.new_model(self.config, self.data, self.device)
        self.layout = Layout.of(self.net)
        self.tensors = {k: list(tensors.values()) for k, tensors in tensors_of(self.net).items()}
        self.optimizer = (
            Adam(weight_decay=train.weight_decay)
            if train.optimizer == "adam"
            else SGD(train.momentum, nesterov=train.nesterov, weight_decay=train.weight_decay)
        )

    def _methods(self) -> tuple[ClientRule, list[Regularizer]]:
        """This round's client rule and regularizers."""
        config = self.config
        strategy = methods("strategies")[config.strategy.name]
        known = methods("regularizers")
        return strategy.Rule(config.params_of(strategy.name)), [
            known[name](config.params_of(name)) for name in config.regularizer_names
        ]

    @torch.no_grad()
    def _install(self, received: Flat) -> list[torch.Tensor]:
        """Copy the received model into the resident one; gives w, one tensor per parameter."""
        views = {
            kind: self.layout.split(kind, received[kind].to(self.device)) for kind in self.tensors
        }
        for kind, tensors in self.tensors.items():
            torch._foreach_copy_(tensors, views[kind])
        return views[PARAMS]

    def _restore_optimizer(self, state: RecordDict) -> None:
        """A fresh optimizer, unless the client keeps its own from round to round."""
        kept: dict[str, list[torch.Tensor]] = {}
        if self.config.train.keep_optimizer and OPTIMIZER in state:
            for key, tensor in wire.unpack(state[OPTIMIZER]).items():
                kept.setdefault(key.split(".")[0], []).append(tensor.to(self.device, copy=True))
        self.optimizer.load(kept or None)

    def _keep_optimizer(self, state: RecordDict) -> None:
        if self.config.train.keep_optimizer and (kept := self.optimizer.state()):
            state[OPTIMIZER] = wire.pack(
                {f"{k}.{i}": t.cpu() for k, tensors in kept.items() for i, t in enumerate(tensors)}
            )
