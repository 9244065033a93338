"""What travels: tensors in Flower's records, without a copy while both ends share a process."""

from __future__ import annotations

import hashlib
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fl_common.deferred import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flwr.app import RecordDict

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""Record names; those of Flower's own strategies and mods."""
SAMPLES, EXPERIMENT, MEMORY_ROUND, CHECKPOINTS, ACTIVE = (
    "samples", "experiment", "memory-round", "checkpoints", "active"
)  # fmt: skip
"""Settings that come with a message to train: the samples of all clients; whose memory it is, of
which round, and the rounds that the server may start again from; the groups of layers to train,
all if it is absent."""
MEMORY, MEMORY_LOST = "memory", "memory-lost"
"""The record that gives a client its memory back, and the number in a reply that asks for it."""
DIAGONAL = "diagonal"
"""The array of a reply that tells how a client's loss is curved."""
GRAD_NORM = "grad-norm"
"""The list of numbers in a reply that are the gradient's norm at each step; with "." and a group's
name, the norm of that part of it."""
GROUPS_LOST = "groups-lost"
"""The number in a reply that asks for a whole message: how many arrays the client lacks."""


class TensorArray(Array):
    """A Flower `Array` that holds a tensor and serialises it only when it leaves the process.

    On the wire, and in a pickle of Ray's, it is an ordinary `Array`.  The tensor is shared, not
    copied: who sends it does not change it afterwards, who receives it only reads.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__dict__.update(
            tensor=tensor,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            stype="numpy.ndarray",
        )

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The serialised bytes (NumPy's format), made anew at each access."""
        return Array.from_numpy_ndarray(self.numpy()).data

    def numpy(self) -> np.ndarray:
        """The tensor's own memory as an array."""
        return self.tensor.numpy()

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


TensorArray.__qualname__ = "Array"  # Flower writes and looks up this name on the wire


def pack(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """An ArrayRecord of CPU tensors, sharing their memory."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = TensorArray(tensor)
    return record


def unpack(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """The tensors of a record; to be read only, they may be the sender's own."""
    return {
        name: array.tensor if isinstance(array, TensorArray) else torch.from_numpy(array.numpy())
        for name, array in record.items()
    }


def vectors(content: RecordDict) -> dict[str, torch.Tensor]:
    """All tensors of a message but a memory given back, to be read only."""
    # Not content.array_records: that view and its content would keep each other, and the model in
    # them, alive until the next sweep of the garbage collector.
    records = [
        record
        for name, record in content.items()
        if isinstance(record, ArrayRecord) and name != MEMORY
    ]
    return {name: tensor for record in records for name, tensor in unpack(record).items()}


def payload_bytes(record: ArrayRecord) -> int:
    """numel x itemsize of all arrays: what the algorithm sends, without framing."""
    return sum(prod(array.shape) * np.dtype(array.dtype).itemsize for array in record.values())


def model_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex digest over names, dtypes, shapes and bytes of all tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name].detach().cpu().numpy())
        # ascontiguousarray makes a scalar (1,): the shape is the tensor's.
        shape = tuple(tensors[name].shape)
        digest.update(f"{name}:{array.dtype.str}:{shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
