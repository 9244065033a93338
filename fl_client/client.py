"""The clients of one process: one model, one optimizer and one data set serve them all."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fl_client.optimizers import SGD, Adam
from fl_client.trainer import LocalData, local_round
from fl_common import assembly, wire
from fl_common.config import methods
from fl_common.data.errors import DataError
from fl_common.determinism import prepare_process
from fl_common.evaluation import evaluate
from fl_common.fingerprint import code_sha256, versions
from fl_common.layout import PARAMS, Layout, concatenate, tensors_of

if TYPE_CHECKING:
    from fl_common.assembly import Share
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
        self.shares: dict[int, Share] = {}
        self.on_device: dict[int, LocalData] = {}
        self.net: torch.nn.Module | None = None

    def describe(self, partition: int) -> RecordDict:
        """The roll call's answer: who this is, with how many samples of which classes."""
        share = self.share(partition)
        labels = self.data.train.y[share.train]
        classes = list(self.data.classes)
        numbers = {
            "partition-id": partition,
            "num-examples": len(labels),
            "held-out": len(share.held_out),
            "label-counts": np.bincount(labels, minlength=len(classes)).tolist(),
        }
        words = {
            "classes": classes,
            "shape": list(assembly.input_shape(self.config, self.data)),
            "data": self.data.fingerprint,
            "code": code_sha256(),
            **versions(),
        }
        return RecordDict({wire.METRICS: MetricRecord(numbers), wire.CONFIG: ConfigRecord(words)})

    def train(self, partition: int, content: RecordDict, state: RecordDict) -> RecordDict:
        """One local round from the model in `content`; `state` is the client's own memory."""
        started = time.process_time()
        config, data, settings = self.config, self.local_data(partition), content[wire.CONFIG]
        server_round = int(settings["server-round"])
        received = _tensors(content)
        w = self._install(received)
        extra = {name: v for name, v in received.items() if name not in self.tensors}
        rule, regularizers = self._methods(settings)
        self._restore_optimizer(state)
        metrics = self._held_out(partition, "-before") if settings.get("evaluate") else {}

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
        if settings.get("evaluate"):
            metrics |= self._held_out(partition, "-after")
        metrics |= {
            "server-round": server_round,
            "num-examples": len(data.y),
            "steps": result.steps,
            "loss": result.loss,
            "cpu-s": time.process_time() - started,
        }
        up = {kind: concatenate(tensors) for kind, tensors in self.tensors.items()}
        return self._reply({**up, **rule.finish()}, content, metrics)

    def evaluate(self, partition: int, content: RecordDict) -> RecordDict:
        """The received model on the client's own held-out samples."""
        self._install(_tensors(content))
        metrics = {
            "server-round": int(content[wire.CONFIG]["server-round"]),
            "num-examples": len(self.share(partition).held_out),
            **self._held_out(partition),
        }
        return RecordDict({wire.METRICS: MetricRecord(metrics)})

    @staticmethod
    def _reply(up: Flat, content: RecordDict, metrics: dict[str, float]) -> RecordDict:
        """The vectors in records like those that came; what did not come is beside the model."""
        came = {
            key: name
            for name, record in content.items()
            if isinstance(record, ArrayRecord)
            for key in record
        }
        records: dict[str, Flat] = {}
        for key, vector in up.items():
            records.setdefault(came.get(key, wire.ARRAYS), {})[key] = vector
        packed = {name: wire.pack(vectors) for name, vectors in records.items()}
        return RecordDict({**packed, wire.METRICS: MetricRecord(metrics)})

    def _held_out(self, partition: int, suffix: str = "") -> dict[str, float]:
        share = self.share(partition)
        if not len(share.held_out):
            raise DataError("this client holds no samples out; set eval.on=clients or both")
        accuracy, loss = evaluate(
            self.net, share.held_out_of, share.held_out, self.transform.eval, self.device
        )
        return {f"accuracy{suffix}": accuracy, f"loss{suffix}": loss}

    def share(self, partition: int) -> Share:
        """Which samples are this partition's."""
        if partition not in self.shares:
            parts = self.partitions
            if parts is not None and not 0 <= partition < len(parts):
                raise DataError(f"partition-id {partition}, but clients.number = {len(parts)}")
            self.shares[partition] = assembly.share_of(self.config, self.data, parts, partition)
        return self.shares[partition]

    def local_data(self, partition: int) -> LocalData:
        """The partition's tensors; a GPU keeps them, on the CPU the mapped cache is near."""
        if partition not in self.on_device:
            indices, train = torch.from_numpy(self.share(partition).train), self.data.train
            x, y = (torch.from_numpy(a).index_select(0, indices) for a in (train.x, train.y))
            data = LocalData(x.to(self.device), y.to(self.device), self.transform.train)
            if self.device.type == "cpu":
                return data
            self.on_device[partition] = data
        return self.on_device[partition]

    def _make_resident(self) -> None:
        config, train = self.config, self.config.train
        shape = assembly.input_shape(config, self.data)
        self.net = assembly.new_model(config, len(self.data.classes), shape, self.device)
        self.layout = Layout.of(self.net)
        self.tensors = {k: list(tensors.values()) for k, tensors in tensors_of(self.net).items()}
        self.optimizer = (
            Adam(weight_decay=train.weight_decay)
            if train.optimizer == "adam"
            else SGD(train.momentum, nesterov=train.nesterov, weight_decay=train.weight_decay)
        )

    def _methods(self, settings: ConfigRecord) -> tuple[ClientRule, list[Regularizer]]:
        """This round's client rule and regularizers."""
        config, known = self.config, methods("regularizers")
        regularizers = [known[name](config.params_of(name)) for name in config.regularizer_names]
        return methods("strategies")[config.strategy.name].rule(config, settings), regularizers

    @torch.no_grad()
    def _install(self, received: Flat) -> list[torch.Tensor]:
        """Copy the received model into the resident one; gives w, one tensor per parameter
        that is trained."""
        if self.net is None:
            self._make_resident()
        views = {
            kind: self.layout.split(kind, received[kind].to(self.device)) for kind in self.tensors
        }
        for kind, tensors in self.tensors.items():
            torch._foreach_copy_(tensors, views[kind])
        # A frozen parameter travels, but no method and no optimizer touches it.
        params = zip(self.tensors[PARAMS], views[PARAMS], strict=True)
        return [view for parameter, view in params if parameter.requires_grad]

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


def _tensors(content: RecordDict) -> Flat:
    """All arrays of a message, to be read only."""
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return {key: tensor for record in records for key, tensor in wire.unpack(record).items()}
