"""What travels: tensors in Flower's records, without a copy while both ends share a process."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from io import BytesIO
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, Metadata
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import ErrorCode
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable import inflatable_object, inflatable_utils

from fl_common.deferred import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
"""The array of a reply that holds the diagonal of a client's Hessian."""
GRAD_NORM = "grad-norm"
"""The list of numbers in a reply that are the gradient's norm at each step; with "." and a group's
name, the norm of that part of it."""
GROUPS_LOST = "groups-lost"
"""The number in a reply that asks for a whole message: how many arrays the client lacks."""
REFUSED = "refused"
"""The setting of a message that tells a node why it cannot take part; the reply is ignored."""


class TensorArray(Array):
    """A Flower `Array` that holds a tensor and serialises it only when it leaves the process.

    On the wire, and in a pickle of Ray's, it is an ordinary `Array`.  The tensor is shared, not
    copied: the sender must not change it afterwards, and the receiver only reads it.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__dict__.update(
            tensor=tensor,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            stype="numpy.ndarray",
        )

    @property
    def data(self) -> bytes:
        """The serialised bytes (NumPy's format), made anew at each access."""
        array, head = self.numpy(), BytesIO()
        # In C order, as the header says; ascontiguousarray alone makes a scalar (1,).
        array = np.ascontiguousarray(array).reshape(array.shape)
        np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
        # One copy; NumPy's own `save` into memory makes two.
        return b"".join((head.getvalue(), array.reshape(-1).view(np.uint8)))

    def numpy(self) -> np.ndarray:
        """The tensor's own memory as an array; a copy of what lies on a GPU."""
        return self.tensor.cpu().numpy()

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


TensorArray.__qualname__ = "Array"  # Flower writes and looks up this name on the wire


class ArrivedArray(Array):
    """A Flower `Array` as it came, in pieces of 5 MB, which are freed as it is decoded: a large
    model is in memory once.  Flower's own holds the pieces, joins them, and copies the result."""

    @classmethod
    def inflate(
        cls, object_content: bytes, children: dict[str, inflatable_object.InflatableObject] | None
    ) -> Array:
        """As Flower does, with its checks.  Raises ValueError."""
        children = children or {}
        empty = dict.fromkeys(children, ArrayChunk(memoryview(b"")))
        array = super().inflate(object_content, empty)
        names = inflatable_object.get_object_children_ids_from_object_content(object_content)
        order = json.loads(inflatable_object.get_object_body(object_content, cls))["arraychunk_ids"]
        array.__dict__["pieces"] = deque(children[names[i]].data for i in order)
        return array

    @property
    def nbytes(self) -> int:
        """Serialised bytes that have not been decoded yet."""
        return sum(map(len, self.pieces))

    @property
    def data(self) -> bytes:
        """The serialised bytes, joined anew at each access; b"" once `numpy` was called."""
        return b"".join(self.pieces)

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["pieces"] = deque([memoryview(value)])

    def numpy(self) -> np.ndarray:
        """The array; can be called once.  Raises ValueError, and what NumPy raises."""
        if self.stype != "numpy.ndarray":
            raise ValueError(f"serialised as {self.stype}")
        return np.lib.format.read_array(self, allow_pickle=False)

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end, as from a file."""
        found = []
        while size and self.pieces:
            piece = self.pieces.popleft()
            found.append(piece[:size])
            if len(piece) > size:
                self.pieces.appendleft(piece[size:])
            size -= len(found[-1])
        return b"".join(found)


class ArrivedRecord(ArrayRecord):
    """A Flower `ArrayRecord` that keeps its `ArrivedArray`s; Flower's own joins and copies them."""

    @classmethod
    def inflate(
        cls, object_content: bytes, children: dict[str, inflatable_object.InflatableObject] | None
    ) -> ArrayRecord:
        """As Flower does, with its checks.  Raises ValueError."""
        children = children or {}
        empty = {
            i: Array(a.dtype, a.shape, a.stype, b"") if isinstance(a, Array) else a
            for i, a in children.items()
        }
        record = super().inflate(object_content, empty)
        for name, i in json.loads(inflatable_object.get_object_body(object_content, cls)).items():
            array, own = children[i], record[name]
            # Equal arrays are one child, and each is decoded on its own.
            record[name] = ArrivedArray(own.dtype, own.shape, own.stype, b"")
            record[name].__dict__["pieces"] = deque(array.pieces)
        return record


ArrivedArray.__qualname__, ArrivedRecord.__qualname__ = "Array", "ArrayRecord"


def receive_in_pieces() -> None:
    """Have Flower make an `ArrivedArray` of every array that this process receives, and an error of
    a reply that it cannot decode."""
    from flwr.superlink.grid import http_grid

    known = inflatable_utils.inflatable_class_registry
    known["Array"], known["ArrayRecord"] = ArrivedArray, ArrivedRecord
    http_grid.inflate_object_from_contents = _inflated


def _inflated(message_id: str, contents: dict[str, bytes]) -> Message:
    """A message from its objects, as Flower makes it; of objects that make none, an error of their
    sender, in whose place Flower would raise and lose all that was pulled with it."""
    head = contents[message_id]  # they are taken away as they are read
    try:
        found = inflatable_utils.inflate_object_from_contents(message_id, contents)
        if not isinstance(found, Message):
            raise ValueError(f"{type(found).__name__} in place of a message")
        return found
    except Exception as error:  # the bytes are a stranger's
        told = f"its reply cannot be decoded: {type(error).__name__}: {error}"
    try:
        proto = ProtoMessage.FromString(inflatable_object.get_object_body(head, Message))
        metadata = metadata_from_proto(proto.metadata)
    except Exception:  # whose it is, nobody can say: a reply to nothing
        metadata = Metadata(0, message_id, 0, 0, "", "", 0.0, 0.0, SYSTEM_MESSAGE_TYPE)
    return make_message(metadata, error=Error(ErrorCode.UNKNOWN, told))


def share(messages: Iterable[Message]) -> None:
    """Make messages with the same tensors have the same arrays, which Flower serialises once."""
    known: dict[int, TensorArray] = {}
    for array, record, key in _arrays(messages):
        record[key] = known.setdefault(id(array.tensor), array)


def forget_serialised(messages: Iterable[Message]) -> None:
    """Drop the bytes that Flower keeps with every array that it has sent."""
    for array, _, _ in _arrays(messages):
        array.__dict__.pop("_chunks", None)


def _arrays(messages: Iterable[Message]) -> list[tuple[TensorArray, ArrayRecord, str]]:
    return [
        (array, record, key)
        for message in messages
        for record in array_records(message.content).values()
        for key, array in record.items()
        if isinstance(array, TensorArray)
    ]


def pack(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """An ArrayRecord of tensors, sharing their memory."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = TensorArray(tensor)
    return record


def unpack(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """The tensors of a record, read-only: they may be the sender's own."""
    return {
        name: array.tensor if isinstance(array, TensorArray) else torch.from_numpy(array.numpy())
        for name, array in record.items()
    }


def vectors(content: RecordDict) -> dict[str, torch.Tensor]:
    """All tensors of a message but those of a memory given back, read-only."""
    records = [record for name, record in array_records(content).items() if name != MEMORY]
    return {name: tensor for record in records for name, tensor in unpack(record).items()}


def array_records(content: RecordDict) -> dict[str, ArrayRecord]:
    """The records of a message that hold arrays, by name."""
    # Not content.array_records: that view and its content would keep each other, and the model in
    # them, alive until the next sweep of the garbage collector.
    return {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}


def payload_bytes(record: ArrayRecord) -> int:
    """numel x itemsize of all arrays: what the algorithm sends, without framing.  Of an array that
    claims a form that cannot be, or more than it holds: the bytes that it holds."""
    return sum(map(_payload_bytes, record.values()))


def _payload_bytes(array: Array) -> int:
    if isinstance(array, TensorArray):
        return array.tensor.nbytes
    there = array.nbytes if isinstance(array, ArrivedArray) else len(array.data)
    try:
        return min(abs(prod(array.shape)) * np.dtype(array.dtype).itemsize, there)
    except Exception:  # the dtype is a stranger's text: SyntaxError and ValueError too
        return there


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
