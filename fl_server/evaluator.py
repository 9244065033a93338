"""The server's own copy of the network, and what is measured on it: accuracy, loss, flatness."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from fl_common import assembly
from fl_common.evaluation import evaluate
from fl_common.groups import output_of_zeros
from fl_common.layout import Layout, concatenate, tensors_of
from fl_common.user_code import told
from fl_server.exchange import RunFailed

if TYPE_CHECKING:
    from fl_common.config import CoreConfig
    from fl_common.data.sources import Dataset
    from fl_common.layout import Flat
    from fl_server.flatness import FlatnessOf
    from fl_server.roster import Member

PART_S = 0.1
"""A part of an evaluation that takes at least so long is worth a process of its own [s]."""


class Evaluator:
    """The server's network, which takes one global model after the other."""

    def __init__(
        self, config: CoreConfig, first: Member, device: torch.device, processes: int
    ) -> None:
        """For data like those of the client `first`.  Raises RunFailed."""
        self.config, self.device = config, device
        try:
            self.net = assembly.new_model(config, len(first.classes), first.shape, device)
            self.layout = Layout.of(self.net)
            if ":" in config.model.name:
                _check_own(self.net, first)
        except Exception as error:  # the model may be the user's own
            raise RunFailed(f"model.name = {config.model.name}: {told(error)}") from error
        self.strides = {
            kind: [tensor.stride() for tensor in tensors.values()]
            for kind, tensors in tensors_of(self.net).items()
        }
        """The strides of each tensor: one that was put away is made anew with them."""
        self.data: Dataset | None = None
        self.most, self.processes = processes, 1
        """The most processes that an evaluation may use, and how many the next one uses."""

    def load_data(self, first: Member) -> None:
        """Load the data set on whose test split models are evaluated.  Raises RunFailed."""
        data = assembly.load_data(self.config)
        if data.classes != first.classes:
            raise RunFailed(
                f"the server's data have other classes than the clients' ({len(data.classes)} and "
                f"{len(first.classes)}); set data.path to a test set like theirs, or "
                "eval.on=clients"
            )
        source, elsewhere = self.config.data.source, self.config.engine.name == "grpc"
        own = ":" in source and self.config.data.partition != "local" and not elsewhere
        if own and data.fingerprint != first.data:
            raise RunFailed(
                f"data.source = {source}: it gives other samples each time it is called, so that "
                "test samples may be training samples too; let it draw by its seed="
            )
        self.data = data

    def model(self) -> Flat:
        """The model that the network has, on the CPU."""
        return {k: concatenate(t.values()).cpu() for k, t in tensors_of(self.net).items()}

    def install(self, model: Flat) -> None:
        """Take the values of a model."""
        with torch.no_grad():
            for kind, tensors in tensors_of(self.net).items():
                views = self.layout.split(kind, model[kind].to(self.device))
                given = zip(tensors.values(), views, self.strides[kind], strict=True)
                for tensor, view, stride in given:
                    if tensor.shape != view.shape:  # it was put away
                        tensor.data = tensor.data.new_empty_strided(view.shape, stride)
                torch._foreach_copy_(list(tensors.values()), views)

    def put_away(self) -> None:
        """Give back the memory of its tensors until the next `install`."""
        for tensors in tensors_of(self.net).values():
            for tensor in tensors.values():
                tensor.data = tensor.data.new_empty(0)

    def evaluate(self, model: Flat) -> tuple[float, float]:
        """Accuracy and loss of a model on the server's test set."""
        self.install(model)
        started = time.perf_counter()
        test, transform = self.data.test, assembly.transform(self.config, self.device).eval
        everything = np.arange(len(test))
        found = evaluate(self.net, test, everything, transform, self.device, self.processes)
        if self.processes == 1:
            parts = int((time.perf_counter() - started) / PART_S)
            self.processes = max(1, min(self.most, parts))
        return found

    @cached_property
    def flatness(self) -> FlatnessOf:
        """What measures the flatness of the loss on test samples that are drawn once."""
        from fl_server.flatness import FlatnessOf

        transform = assembly.transform(self.config, self.device).eval
        return FlatnessOf.of(self.config, self.data.test, transform, self.device)


def _check_own(net: torch.nn.Module, first: Member) -> None:
    """Raises ValueError, or what the network raises, unless it trains and maps a sample to logits.

    A label without a logit would fail only at the clients, and a logit without a label nowhere.
    """
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError("no parameter of it is to be trained")
    output, logits = output_of_zeros(net, first.shape), (1, len(first.classes))
    given = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if given != logits:
        raise ValueError(f"makes {given} of one sample {first.shape}; it must make logits {logits}")
