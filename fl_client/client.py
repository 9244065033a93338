"""The clients of one process: one model, one optimizer and one data set serve them all."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fl_client.optimizers import SGD, Adam
from fl_client.state import Memory, MemoryLost
from fl_client.trainer import LocalData, local_round
from fl_common import assembly, wire
from fl_common.data.errors import DataError
from fl_common.determinism import prepare_process
from fl_common.evaluation import evaluate
from fl_common.fingerprint import code_sha256, versions
from fl_common.layout import PARAMS, Layout, concatenate, tensors_of
from fl_common.local import (
    OWNER,
    blank_memory,
    correction_of,
    local_methods,
    new_memory,
    owned,
)
from fl_common.sync import Cache, Incomplete
from regularizers.base import Regularizer

if TYPE_CHECKING:
    from fl_common.assembly import Share
    from fl_common.config import CoreConfig
    from fl_common.layout import Flat
    from fl_common.local import LocalMethod

OPTIMIZER = "optimizer"
"""Prefix of the momentum in a client's memory."""


def _asking(server_round: int, lost: dict[str, int]) -> RecordDict:
    """The reply of a client that lacks something: it is sent that with the message again."""
    return RecordDict({wire.METRICS: MetricRecord({"server-round": server_round, **lost})})


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
        """One local round from the model in `content`; `state` is what Flower keeps for the
        client.  Without the memory that the round starts from, or without what the message leaves
        out, the reply asks for it."""
        started = time.process_time()
        config, data, settings = self.config, self.local_data(partition), content[wire.CONFIG]
        server_round = int(settings["server-round"])
        methods = local_methods(config, settings, server_round, len(data.y))
        memory = self._memory(partition, content, state, methods)
        cache = Cache.of(config.client.state_dir, partition, content, state)
        lost = {}
        try:
            received = cache.complete(content)
        except Incomplete as lacking:
            lost[wire.GROUPS_LOST] = lacking.arrays
        try:
            remembered = memory.load() if memory else None
        except MemoryLost:
            lost[wire.MEMORY_LOST] = memory.base
        if lost:
            return _asking(server_round, lost)
        cache.keep(content, received)
        sent = self._model(received)
        if remembered is None:
            remembered = blank_memory(methods, sent)
        self._install(methods[0].start(sent, owned(remembered, OWNER)))
        self._load_optimizer(remembered)
        active = tuple(settings.get(wire.ACTIVE, self.groups.names))
        metrics = self._held_out(partition, "-before") if settings.get("evaluate") else {}

        regularizers = [method for method in methods if isinstance(method, Regularizer)]
        if not self.net.training:
            self.net.train()
        with self.groups.only(self.net, active, frozen_norms=methods[0].frozen_norms):
            try:
                for regularizer in regularizers:
                    regularizer.begin(self.net, sent, owned(remembered, regularizer.name))
                result = local_round(
                    self.net,
                    data,
                    methods,
                    correction_of(methods, sent, remembered),
                    self.optimizer,
                    config.train,
                    seed=config.run.seed,
                    server_round=server_round,
                    partition=partition,
                    norms=config.eval.grad_norm,
                )
            finally:
                for regularizer in regularizers:
                    regularizer.finish()

        trained = {kind: concatenate(tensors) for kind, tensors in self.tensors.items()}
        if memory is not None:
            new = new_memory(methods, remembered, sent, trained) | self._optimizer_state()
            memory.save(server_round, new)
        parts = {name: self.groups.part(name, trained[PARAMS]) for name in active}
        up = parts | {kind: vector for kind, vector in trained.items() if kind != PARAMS}
        if settings.get("evaluate"):
            metrics |= self._held_out(partition, "-after")
        metrics |= {
            "server-round": server_round,
            "num-examples": len(data.y),
            "steps": result.steps,
            "loss": result.loss,
            "cpu-s": time.process_time() - started,
        }
        if result.norms is not None:
            metrics |= self._norms(result.norms, settings)
        return self._reply(up, content, metrics)

    def _norms(self, norms: torch.Tensor, settings: ConfigRecord) -> dict[str, list[float]]:
        active = tuple(settings.get(wire.ACTIVE, self.layers.names))
        parts = self.layers.norms(norms, active)
        found = {f"{wire.GRAD_NORM}.{name}": part.tolist() for name, part in parts.items()}
        return {wire.GRAD_NORM: norms.square().sum(1).sqrt().tolist(), **found}

    def _memory(
        self, partition: int, content: RecordDict, state: RecordDict, methods: list[LocalMethod]
    ) -> Memory | None:
        """Where this client's memory is kept; None if its methods need none."""
        if not (self.config.train.keeps_state or any(method.memory for method in methods)):
            return None
        return Memory.of(self.config.client.state_dir, partition, content, state)

    def evaluate(self, partition: int, content: RecordDict, state: RecordDict) -> RecordDict:
        """The received model on the client's own held-out samples."""
        server_round = int(content[wire.CONFIG]["server-round"])
        cache = Cache.of(self.config.client.state_dir, partition, content, state)
        try:
            received = cache.complete(content)
        except Incomplete as lacking:
            return _asking(server_round, {wire.GROUPS_LOST: lacking.arrays})
        cache.keep(content, received)
        self._install(self._model(received))
        metrics = {
            "server-round": server_round,
            "num-examples": len(self.share(partition).held_out),
            **self._held_out(partition),
        }
        return RecordDict({wire.METRICS: MetricRecord(metrics)})

    def curvature(self, partition: int, content: RecordDict) -> RecordDict:
        """The diagonal of this client's Hessian at the received model, never its data: two
        estimates from different probes, per parameter or per tensor."""
        from fl_flatness.diagonals import estimate

        server_round = int(content[wire.CONFIG]["server-round"])
        self._install(self._model(wire.vectors(content)))
        data = self.local_data(partition)
        halves = estimate(self.net, data.x, data.y, self.transform.eval, self.config, server_round)
        numbers = {"server-round": server_round, "num-examples": len(data.y)}
        arrays = wire.pack({wire.DIAGONAL: halves})
        return RecordDict({wire.ARRAYS: arrays, wire.METRICS: MetricRecord(numbers)})

    @staticmethod
    def _reply(up: Flat, content: RecordDict, metrics: dict[str, Any]) -> RecordDict:
        """The vectors in the records in which they came; those that are new to it, in the first."""
        records: dict[str, Flat] = {wire.ARRAYS: dict(up)}
        for name, record in content.items():
            if isinstance(record, ArrayRecord) and name not in (wire.ARRAYS, wire.MEMORY):
                records[name] = {key: records[wire.ARRAYS].pop(key) for key in record if key in up}
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
        self.groups = assembly.groups_of(config, self.net, shape)
        if config.eval.grad_norm:
            self.layers = assembly.layers_of(config, self.net, shape)
        self.tensors = {k: list(tensors.values()) for k, tensors in tensors_of(self.net).items()}
        self.optimizer = (
            Adam(weight_decay=train.weight_decay)
            if train.optimizer == "adam"
            else SGD(train.momentum, nesterov=train.nesterov, weight_decay=train.weight_decay)
        )

    def _model(self, received: Flat) -> Flat:
        """What was received, with the groups of layers in one vector."""
        if self.net is None:
            self._make_resident()
        return self.groups.joined(received)

    @torch.no_grad()
    def _install(self, received: Flat) -> None:
        """Copy the received model into the resident one."""
        for kind, tensors in self.tensors.items():
            vector = received[kind].to(self.device)
            torch._foreach_copy_(tensors, self.layout.split(kind, vector))

    def _load_optimizer(self, remembered: Flat) -> None:
        """A fresh optimizer, unless the client keeps its own from round to round."""
        kept: dict[str, list[torch.Tensor]] = {}
        for key in sorted(remembered):
            tensor = remembered[key]
            owner, name = key.split(".")[:2]
            if owner == OPTIMIZER:
                kept.setdefault(name, []).append(tensor.to(self.device, copy=True))
        self.optimizer.load(kept or None)

    def _optimizer_state(self) -> Flat:
        """By "optimizer.name.i", i with leading zeros, so that the order of names is theirs."""
        if not self.config.train.keeps_state:
            return {}
        return {
            f"{OPTIMIZER}.{name}.{i:05d}": tensor.to("cpu", copy=True)
            for name, tensors in (self.optimizer.state() or {}).items()
            for i, tensor in enumerate(tensors)
        }
