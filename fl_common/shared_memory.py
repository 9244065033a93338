"""Records between processes of one machine (Linux): tensors in shared memory, all else serialised.

A parcel is a JSON header, Flower's serialisation of all records without arrays, and at most four
memory files: three that hold tensors, and one for text that is too long for the socket.  Files
have no name: a process that is killed leaves nothing behind.  The receiver maps them privately, so
that the sender does not see what it writes; the sender uses a file again only when it is told that
the receiver has let go of all tensors in it.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import weakref
from math import prod
from typing import TYPE_CHECKING, Any

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fl_common import wire
from fl_common.deferred import torch
from fl_common.sockets import read

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LENGTHS = struct.Struct("!QQ")
ALIGNMENT = 64
"""Of every tensor in its file [bytes]."""
FILES = 4
"""At most this many with a parcel."""
INLINE = 1 << 16
"""What may go through the socket itself [bytes]: its buffer takes two such parcels, so that two
sides that send at once do not wait for each other."""
KNOWN = -1
"""In place of a file's number: the tensor came from the receiver, which still has it."""


Maps = dict[tuple[int, int], "torch.UntypedStorage | None"]
"""Mapped files by device and inode, which no other file has as long as they are mapped."""
Lent = list[tuple[int, "weakref.ref[mmap.mmap]"]]
"""Slots of the other side, each with its memory here, which may be gone."""
Forms = dict[str, dict[str, list[Any] | None] | None]
"""What `_laid_out` says of each array, by record and key; None for a record of something else."""


class Segment:
    """Tensors copied into one memory file; they are kept alive, so that their `id`s stay theirs."""

    def __init__(self, tensors: Iterable[torch.Tensor], file: int | None = None) -> None:
        """file: an existing one to write them to, whose memory is allocated already."""
        self.tensors = list(tensors)
        self.offsets: dict[int, int] = {}
        """Where each lies, by its id [bytes]."""
        self.size = 0
        for tensor in self.tensors:
            self.offsets[id(tensor)] = self.size
            self.size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.file = os.memfd_create("flatfed") if file is None else file
        try:
            if os.fstat(self.file).st_size < self.size:
                os.ftruncate(self.file, self.size)
            for tensor in self.tensors:
                if tensor.nbytes:
                    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                    _write(self.file, memoryview(data), self.offsets[id(tensor)])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self.file)


class Slots:
    """A sender's memory files, each used again when its receiver has let go of all tensors in it:
    fresh memory takes longer than the copy.  A parcel that finds all in use gets a file of its own.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.files: list[int] = []
        self.free: list[int] = []

    def take(self) -> int | None:
        """The number of a free slot; None if all are in use."""
        if not self.free and len(self.files) < self.most:
            self.free.append(len(self.files))
            self.files.append(os.memfd_create("flatfed"))
        return self.free.pop() if self.free else None


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def tensors_in(records: Sequence[RecordDict]) -> list[torch.Tensor]:
    """All tensors of these records; one that is there twice is listed twice."""
    return [
        array.tensor
        for record_dict in records
        for record in wire.array_records(record_dict).values()
        for array in record.values()
        if isinstance(array, wire.TensorArray)
    ]


def _laid_out(array: Array) -> tuple[torch.Tensor, list[Any] | None]:
    """The tensor of an array; of one that is serialised, its bytes, and the form that it claims,
    which is for the guards to judge."""
    if isinstance(array, wire.TensorArray):
        return array.tensor, None
    data = torch.frombuffer(bytearray(array.data or b"\0"), dtype=torch.uint8)[: len(array.data)]
    return data, [array.dtype, list(array.shape), array.stype]


def _array(tensor: torch.Tensor, form: list[Any] | None) -> Array:
    if form is None:
        return wire.TensorArray(tensor)
    dtype, shape, stype = form
    return Array(dtype, tuple(shape), stype, tensor.numpy().tobytes())


def send(
    connection: socket.socket,
    header: dict[str, Any],
    records: Sequence[RecordDict],
    shared: Segment | None = None,
    known: Sequence[torch.Tensor] = (),
    slots: Slots | None = None,
) -> list[torch.Tensor]:
    """Send a parcel; returns its tensors, in the order in which the receiver gets them.

    shared: tensors that several parcels have in common, written once.  known: those of the last
    parcel from the other side, of which only the number is sent.  slots: files for new tensors; but
    those of all records after the first, which the receiver keeps, get a file that holds no others.
    """
    shapes, rest, tensors = _taken_apart(records)
    numbers = {id(tensor): i for i, tensor in enumerate(known)}
    placed = shared.offsets if shared else {}
    new = {id(t): t for t in tensors if id(t) not in numbers and id(t) not in placed}
    kept = {id(t) for t in tensors_in(records[1:])} if slots else set()
    brief, lasting = (
        [t for i, t in new.items() if (i in kept) is stays] for stays in (False, True)
    )
    slot = slots.take() if slots and any(t.nbytes for t in brief) else None
    own = [Segment(brief, None if slot is None else slots.files[slot])] if brief else []
    own += [Segment(lasting)] if lasting else []
    segments = [shared, *own] if shared else own
    try:
        parts = {
            "header": header,
            "records": shapes,
            "tensors": [_place(tensor, numbers, segments) for tensor in tensors],
            "rest": [*map(len, rest)],
            "slot": slot,
            "shared": shared is not None,
        }
        text = json.dumps(parts).encode()
        _put(connection, text, b"".join(rest), [segment.file for segment in segments])
    finally:
        for segment in own if slot is None else own[1:]:
            segment.close()
    return tensors


def _taken_apart(
    records: Sequence[RecordDict],
) -> tuple[list[Forms], list[bytes], list[torch.Tensor]]:
    """The arrays' forms, all else serialised, and the arrays' tensors in order."""
    shapes, rest, tensors = [], [], []
    for record_dict in records:
        arrays, others = {}, RecordDict()
        for name, record in record_dict.items():
            if isinstance(record, ArrayRecord):
                laid_out = {key: _laid_out(array) for key, array in record.items()}
                arrays[name] = {key: form for key, (_, form) in laid_out.items()}
                tensors += [tensor for tensor, _ in laid_out.values()]
            else:
                arrays[name] = None
                others[name] = record
        shapes.append(arrays)
        rest.append(recorddict_to_proto(others).SerializeToString())
    return shapes, rest, tensors


def _place(tensor: torch.Tensor, numbers: dict[int, int], segments: Sequence[Segment]) -> list[Any]:
    """Where the receiver finds a tensor: its number among those that it knows, or the segment and
    the offset in it [bytes]; then dtype and shape."""
    what = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
    if (number := numbers.get(id(tensor))) is not None:
        return [KNOWN, number, *what]
    i, segment = next((i, s) for i, s in enumerate(segments) if id(tensor) in s.offsets)
    return [i, segment.offsets[id(tensor)], *what]


def _put(connection: socket.socket, text: bytes, rest: bytes, files: list[int]) -> None:
    """Send the words of a parcel with its files; many words travel in a file too."""
    words, lengths = text + rest, LENGTHS.pack(len(text), len(rest))
    if len(words) <= INLINE:
        socket.send_fds(connection, [lengths], files)
        connection.sendall(words)
    else:
        with os.fdopen(os.memfd_create("flatfed"), "wb") as file:
            file.write(words)
            file.flush()
            socket.send_fds(connection, [lengths], [*files, file.fileno()])


def receive(
    connection: socket.socket,
    known: Sequence[torch.Tensor] = (),
    lent: Lent | None = None,
    kept: Maps | None = None,
) -> tuple[dict[str, Any], list[RecordDict], list[torch.Tensor]]:
    """The next parcel: header, records, and its tensors, read-only.

    known: the tensors of the parcel that this one answers.  lent: gets the parcel's slot, for
    `given_back`.  kept: the map of the last parcel's shared file, used again if the file comes
    again.  Raises EOFError, OSError if the other side is gone.
    """
    data, files, _, _ = socket.recv_fds(connection, LENGTHS.size, FILES)
    try:
        if not data:
            raise EOFError
        data += read(connection, LENGTHS.size - len(data))
        head, tail = LENGTHS.unpack(data)
        words = _read(connection, files, head + tail)
        parts, body = json.loads(words[:head]), words[head:]
        maps = [_shared(files[0], kept)] if parts["shared"] else []
        own = files[len(maps) :]
        if parts["slot"] is not None:
            maps.append(_lent(own.pop(0), parts["slot"], lent))
        maps += map(_map, own)
    finally:
        for file in files:
            os.close(file)
    tensors = []
    for place, at, dtype, shape in parts["tensors"]:
        tensors.append(known[at] if place == KNOWN else _view(maps[place], at, dtype, shape))
    left, start, records = iter(tensors), 0, []
    for arrays, length in zip(parts["records"], parts["rest"], strict=True):
        proto = ProtoRecordDict.FromString(bytes(body[start : start + length]))
        start += length
        others = recorddict_from_proto(proto)
        made = RecordDict()
        for name, forms in arrays.items():
            if forms is None:
                made[name] = others[name]
                continue
            made[name] = record = ArrayRecord()
            for key, form in forms.items():
                record[key] = _array(next(left), form)
        records.append(made)
    return parts["header"], records, tensors


def _read(connection: socket.socket, files: list[int], length: int) -> bytes | bytearray:
    """The text of a parcel; the file that it may come in is taken out of `files`."""
    if length <= INLINE:
        return read(connection, length)
    with os.fdopen(files.pop(), "rb") as file:
        file.seek(0)
        return file.read(length)


def _map(file: int) -> torch.UntypedStorage | None:
    """The file's memory, mapped copy-on-write.  Python's own map would keep a file descriptor as
    long as it lives, and a process has few."""
    size = os.fstat(file).st_size
    return torch.UntypedStorage.from_file(f"/proc/self/fd/{file}", False, size) if size else None


def _shared(file: int, kept: Maps | None) -> torch.UntypedStorage | None:
    """The map of the file that several parcels have in common."""
    stat, known = os.fstat(file), {} if kept is None else kept
    name = (stat.st_dev, stat.st_ino)
    if name not in known:
        known.clear()
        known[name] = _map(file)
    return known[name]


def _lent(file: int, slot: int, lent: Lent | None) -> torch.UntypedStorage:
    """As `_map`, and `lent` gets the slot with its memory."""
    memory = mmap.mmap(file, os.fstat(file).st_size, flags=mmap.MAP_PRIVATE)
    if lent is not None:
        lent.append((slot, weakref.ref(memory)))
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def given_back(lent: Lent) -> list[int]:
    """Take out the slots in which nobody has a tensor any more.

    They are asked for: a callback at the end of their memory may be where a signal arrives, and
    Python drops the exception that the signal's handler raises there."""
    gone = [(slot, memory) for slot, memory in lent if memory() is None]
    lent[:] = [each for each in lent if each not in gone]
    return [slot for slot, _ in gone]


def _view(
    memory: torch.UntypedStorage | None, at: int, dtype: str, shape: list[int]
) -> torch.Tensor:
    empty = torch.empty(0, dtype=getattr(torch, dtype))
    if not prod(shape):
        return empty.reshape(shape)
    return empty.set_(memory, at // empty.itemsize, shape)
