"""The clients of one process: one model, one optimizer and one data set serve them all."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fl_client.graphs import BeginAnew, Graphs, records
from fl_client.optimizers import SGD, Adam
from fl_client.state import Memory, MemoryLost
from fl_client.together import Together
from fl_client.trainer import LocalData, local_round
from fl_common import assembly, wire
from fl_common.data.errors import DataError
from fl_common.determinism import prepare_process, release_memory
from fl_common.evaluation import evaluate
from fl_common.failures import first_line
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
    from collections.abc import Iterator, Sequence

    from fl_client.optimizers import Tensors
    from fl_client.together import Request
    from fl_client.trainer import LocalResult
    from fl_common.assembly import Share
    from fl_common.config import CoreConfig, Train
    from fl_common.groups import Groups
    from fl_common.layout import Flat
    from fl_common.local import LocalMethod

OPTIMIZER = "optimizer"
"""Prefix of the momentum in a client's memory."""


@dataclass(eq=False)
class Job:
    """A message to train, from its arrival to its reply."""

    partition: int
    content: RecordDict
    server_round: int
    data: LocalData
    methods: list[LocalMethod]
    memory: Memory | None
    remembered: Flat
    sent: Flat
    start: Flat
    """The model that the local round starts from, as the rule's `start` makes it of `sent`."""
    active: tuple[str, ...]
    metrics: dict[str, Any] = field(default_factory=dict)
    cpu_s: float = 0.0
    """Processor time so far [s]."""

    @property
    def settings(self) -> ConfigRecord:
        return self.content[wire.CONFIG]

    @property
    def evaluates(self) -> bool:
        return bool(self.settings.get("evaluate"))


def _asking(server_round: int, lost: dict[str, int]) -> RecordDict:
    """The reply of a client that lacks something; the server then sends the message with it."""
    return RecordDict({wire.METRICS: MetricRecord({"server-round": server_round, **lost})})


class Clients:
    """Trains any partition of the configured data; resident between messages."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.device = assembly.training_device(config)
        prepare_process(config.train.threads, config.train.deterministic, self.device.type)
        if self.device.type == "cuda":  # torch draws and records graphs on the current device
            torch.cuda.set_device(self.device)
        self.data = assembly.load_data(config)
        self.partitions = assembly.split_data(config, self.data)
        self.transform = assembly.transform(config, self.device)
        self.shape = assembly.input_shape(config, self.data)
        self.shares: dict[int, Share] = {}
        self.on_device: dict[int, LocalData] = {}
        self.net: torch.nn.Module | None = None
        """Resident; made, with all down to `optimizer`, when the first model comes."""
        self.graphs: Graphs | None = None
        self.layout: Layout | None = None
        self.groups: Groups | None = None
        self.layers: Groups | None = None
        """With eval.grad-norm: those whose norms are reported."""
        self.tensors: dict[str, Tensors] = {}
        self.optimizer: SGD | Adam | None = None
        self.uploaded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.together = Together(self)

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
            "shape": list(self.shape),
            "data": self.data.fingerprint,
            "code": code_sha256(),
            **versions(),
        }
        return RecordDict({wire.METRICS: MetricRecord(numbers), wire.CONFIG: ConfigRecord(words)})

    def train(self, partition: int, content: RecordDict, state: RecordDict) -> RecordDict:
        """One local round from the model in `content`; `state` is what Flower keeps for the
        client.  A client that lacks its memory, or arrays that the message leaves out, replies by
        asking for them."""
        job = self.begin(partition, content, state)
        return job if isinstance(job, RecordDict) else self.train_alone(job)

    def train_together(
        self, requests: Sequence[Request], at_once: int
    ) -> list[RecordDict | Exception | None]:
        """`train`'s reply to each of these requests, or the error in its place; None for clients
        that must wait for others that lack something.  At most `at_once` clients are trained at a
        time, in one pass for all of them."""
        return self.together.train(requests, at_once)

    def choose_cohort(self, requests: Sequence[Request], workers: int) -> tuple[int, str]:
        """`at_once` for engine.cohort=auto, and the reason in words: measured on these requests of
        the first round, against `workers` processes that train one client at a time each.  The
        requests are still to be trained afterwards."""
        try:
            return self.together.choose(requests, workers)
        finally:
            release_memory()  # a trial of many clients takes many times one's

    def begin(self, partition: int, content: RecordDict, state: RecordDict) -> Job | RecordDict:
        """The job of a local round, or the reply that asks for what the client lacks."""
        started = time.process_time()
        config, data, settings = self.config, self.local_data(partition), content[wire.CONFIG]
        server_round = int(settings["server-round"])
        methods = local_methods(config, settings, server_round, len(data.y))
        memory = self._memory(partition, content, state, methods)
        found = self._found(partition, content, state, memory)
        if isinstance(found, RecordDict):
            return found
        sent, remembered = found
        if remembered is None:
            remembered = blank_memory(methods, sent)
        return Job(
            partition,
            content,
            server_round,
            data,
            methods,
            memory,
            remembered,
            sent,
            start=methods[0].start(sent, owned(remembered, OWNER)),
            active=tuple(settings.get(wire.ACTIVE, self.groups.names)),
            cpu_s=time.process_time() - started,
        )

    def _found(
        self, partition: int, content: RecordDict, state: RecordDict, memory: Memory | None
    ) -> tuple[Flat, Flat | None] | RecordDict:
        """The model that a message refers to, and what the client remembers (None before its first
        round); or the reply that asks for what the client lacks."""
        cache = Cache.of(self.config.client.state_dir, partition, content, state)
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
            return _asking(int(content[wire.CONFIG]["server-round"]), lost)
        cache.keep(content, received)
        return self._model(received), remembered

    def train_alone(self, job: Job) -> RecordDict:
        """The job's local round and its reply."""
        started = time.process_time()
        self.evaluate_job(job, job.start, "-before")
        result = self.local_round(job, self.config.train)
        place = job.sent[PARAMS].device
        trained = {kind: concatenate(t).to(place) for kind, t in self._tensors().items()}
        self.evaluate_job(job, None, "-after")
        job.cpu_s += time.process_time() - started
        return self.finish(job, trained, result, self.optimizer.state())

    def local_round(self, job: Job, settings: Train) -> LocalResult:
        """Train the resident network as the job says, with the optimizer that its client kept.

        If passes cannot be recorded, or those that were leave too little memory, the round is run
        again without them.
        """
        try:
            return self._local_round(job, settings)
        except torch.OutOfMemoryError as error:
            if not (self.graphs and self.graphs.bytes):
                raise
            self.graphs.refuse(first_line(error))
        except BeginAnew:
            pass
        # After the `try`: the error, and the memory that it held, is gone.
        torch.cuda.empty_cache()
        return self._local_round(job, settings)

    def _local_round(self, job: Job, settings: Train) -> LocalResult:
        self._install(job.start)
        self.optimizer.load(self.kept(job.remembered))
        regularizers = [method for method in job.methods if isinstance(method, Regularizer)]
        with self.training(job):
            try:
                for regularizer in regularizers:
                    remembered = owned(job.remembered, regularizer.name)
                    regularizer.begin(self.net, job.start, remembered)
                return local_round(
                    self.net,
                    job.data,
                    job.methods,
                    correction_of(job.methods, job.sent, job.remembered),
                    self.optimizer,
                    settings,
                    seed=self.config.run.seed,
                    server_round=job.server_round,
                    partition=job.partition,
                    norms=self.config.eval.grad_norm,
                    graphs=self.graphs,
                )
            finally:
                self.net.zero_grad()  # a step that failed has left some
                for regularizer in regularizers:
                    regularizer.finish()

    @contextmanager
    def training(self, job: Job) -> Iterator[None]:
        """The network in training mode, with only the job's groups trainable."""
        if not self.net.training:
            self.net.train()
        frozen_norms = job.methods[0].frozen_norms
        with self.groups.only(self.net, job.active, frozen_norms=frozen_norms):
            yield

    def evaluate_job(self, job: Job, model: Flat | None, suffix: str) -> None:
        """If the message asks for it, evaluate `model`, or the resident network as it is, on the
        client's held-out samples."""
        if job.evaluates:
            if model is not None:
                self._install(model)
            job.metrics |= self._held_out(job.partition, suffix)

    def finish(
        self, job: Job, trained: Flat, result: LocalResult, optimizer: dict[str, Tensors] | None
    ) -> RecordDict:
        """Save the client's new memory and make the reply."""
        started = time.process_time()
        if job.memory is not None:
            new = new_memory(job.methods, job.remembered, job.sent, trained)
            job.memory.save(job.server_round, new | self._optimizer_state(optimizer))
        parts = {name: self.groups.part(name, trained[PARAMS]) for name in job.active}
        up = parts | {kind: vector for kind, vector in trained.items() if kind != PARAMS}
        metrics = job.metrics | {
            "server-round": job.server_round,
            "num-examples": len(job.data.y),
            "steps": result.steps,
            "loss": result.loss,
            "cpu-s": job.cpu_s + time.process_time() - started,
        }
        if result.norms is not None:
            metrics |= self._norms(result.norms, job.settings)
        return self._reply(up, job.content, metrics)

    def _norms(self, norms: torch.Tensor, settings: ConfigRecord) -> dict[str, list[float]]:
        active = tuple(settings.get(wire.ACTIVE, self.layers.names))
        parts = self.layers.norms(norms, active, self.net)
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
        """Evaluate the received model, with the client's own parts in it if the rule is `personal`,
        on its held-out samples."""
        settings, share = content[wire.CONFIG], self.share(partition)
        server_round = int(settings["server-round"])
        rule, *_ = local_methods(self.config, settings, server_round, len(share.train))
        memory = self._memory(partition, content, state, [rule]) if rule.personal else None
        found = self._found(partition, content, state, memory)
        if isinstance(found, RecordDict):
            return found
        sent, remembered = found
        self._install(rule.start(sent, owned(remembered or {}, OWNER)) if rule.personal else sent)
        metrics = {
            "server-round": server_round,
            "num-examples": len(share.held_out),
            **self._held_out(partition),
        }
        return RecordDict({wire.METRICS: MetricRecord(metrics)})

    def curvature(self, partition: int, content: RecordDict) -> RecordDict:
        """The diagonal of this client's Hessian at the received model, never its data: two
        estimates from different probes, (2, d) per parameter or (2, tensors) per tensor."""
        from fl_flatness.diagonals import as_sent, estimate

        server_round = int(content[wire.CONFIG]["server-round"])
        self._install(self._model(wire.vectors(content)))
        data = self.local_data(partition)
        halves = estimate(self.net, data.x, data.y, self.transform.eval, self.config, server_round)
        numbers = {"server-round": server_round, "num-examples": len(data.y)}
        arrays = wire.pack({wire.DIAGONAL: as_sent(halves, self.config.flatness.match, self.net)})
        return RecordDict({wire.ARRAYS: arrays, wire.METRICS: MetricRecord(numbers)})

    @staticmethod
    def _reply(up: Flat, content: RecordDict, metrics: dict[str, Any]) -> RecordDict:
        """A reply with each vector in the record that it came in, and new ones in the first."""
        records: dict[str, Flat] = {wire.ARRAYS: dict(up)}
        for name, record in wire.array_records(content).items():
            if name not in (wire.ARRAYS, wire.MEMORY):
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
        """The partition's tensors on the training device.  A GPU keeps those of its first client,
        and of all clients if they take a small part of its memory.  The CPU keeps none: it copies
        them from the mapped cache."""
        if self.device.type == "cpu":
            return self._brought(partition)
        if partition not in self.on_device:
            several = bool(self.on_device)
            if several and not self._holds_all():
                return self._brought(partition)
            for name in range(len(self.partitions)) if several else [partition]:
                if name not in self.on_device:
                    self.on_device[name] = self._brought(name)
        return self.on_device[partition]

    def _brought(self, partition: int) -> LocalData:
        """The partition's samples, copied to the training device."""
        indices, train = torch.from_numpy(self.share(partition).train), self.data.train
        x, y = (torch.from_numpy(a).index_select(0, indices) for a in (train.x, train.y))
        x, y = x.to(self.device), y.to(self.device)
        return LocalData(x, y, self.transform.train, self.transform.draws)

    def _holds_all(self) -> bool:
        """Whether all partitions are a small part of a GPU's memory.  They are then brought there
        together, so that later rounds copy nothing."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.partitions is not None and self.data.train.x.nbytes < free / 10

    def _make_resident(self) -> None:
        config, train, shape = self.config, self.config.train, self.shape
        net = assembly.new_model(config, len(self.data.classes), shape, self.device)
        self.net = net.train()  # all of it, as after an evaluation, whatever its class has left
        self.graphs = Graphs() if records(train, config.model.name, self.device) else None
        self.layout = Layout.of(self.net)
        self.groups = assembly.groups_of(config, self.net, shape)
        if config.eval.grad_norm:
            self.layers = assembly.layers_of(config, self.net, shape)
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
        for kind, tensors in self._tensors().items():
            vector = self._uploaded(kind, received[kind])
            torch._foreach_copy_(tensors, self.layout.split(kind, vector))

    def _tensors(self) -> dict[str, Tensors]:
        """The resident network's tensors by kind.  A pass of a network of one's own may have put
        new buffers in the place of others."""
        if not self.tensors or ":" in self.config.model.name:
            self.tensors = {kind: list(t.values()) for kind, t in tensors_of(self.net).items()}
        return self.tensors

    def _uploaded(self, kind: str, vector: torch.Tensor) -> torch.Tensor:
        """On the training device; a model that many clients get goes to a GPU once."""
        if vector.device == self.device:
            return vector
        if kind not in self.uploaded or self.uploaded[kind][0] is not vector:
            self.uploaded[kind] = (vector, vector.to(self.device))
        return self.uploaded[kind][1]

    def kept(self, remembered: Flat) -> dict[str, Tensors] | None:
        """The optimizer state that the client kept from its last round, each tensor in the memory
        format of its parameter, as fused kernels need it; None: it starts afresh."""
        keys = sorted(key for key in remembered if key.startswith(f"{OPTIMIZER}."))
        if not keys:
            return None
        trained = [p for p in self.net.parameters() if p.requires_grad]
        kept: dict[str, list[torch.Tensor]] = {}
        for key in keys:
            tensor, (_, name, place) = remembered[key], key.split(".")
            like = trained[int(place)] if tensor.dim() else tensor
            own = torch.empty_like(like, device=self.device).copy_(tensor)
            kept.setdefault(name, []).append(own)
        return kept

    @staticmethod
    def steps_taken(remembered: Flat) -> tuple[float, ...]:
        """Adam's step counts in what a client remembers; empty for SGD."""
        prefix = f"{OPTIMIZER}.steps."
        return tuple(float(remembered[k]) for k in sorted(remembered) if k.startswith(prefix))

    def _optimizer_state(self, state: dict[str, Tensors] | None) -> Flat:
        """An optimizer's state by "optimizer.name.i", with leading zeros in i: sorted names are in
        the order of the tensors."""
        if not self.config.train.keeps_state:
            return {}
        return {
            f"{OPTIMIZER}.{name}.{i:05d}": tensor.to("cpu", copy=True)
            for name, tensors in (state or {}).items()
            for i, tensor in enumerate(tensors)
        }
