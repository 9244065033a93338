"""Records through shared memory arrive as they were, and neither side can change the other's."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import weakref
from array import array
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from living import open_files

from fl_common import shared_memory, wire

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def records(**tensors: torch.Tensor) -> RecordDict:
    return RecordDict(
        {
            "config": ConfigRecord({"name": "a", "rounds": [1, 2], "flag": True}),
            "arrays": wire.pack(tensors),
            "metrics": MetricRecord({"loss": 0.1, "steps": [3, 4]}),
        }
    )


TENSORS = {
    "params": torch.randn(1000),
    "double": torch.randn(3, 5, dtype=torch.float64),
    "counters": torch.tensor([2**60, -1]),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(9).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "strided": torch.randn(6, 6)[:, ::2],
    "transposed": torch.randn(2, 3).t(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


def test_a_parcel_arrives_as_it_was(ends: tuple[socket.socket, socket.socket]) -> None:
    sent = [records(**TENSORS), RecordDict(), records(params=TENSORS["params"])]
    shared_memory.send(ends[0], {"id": "x"}, sent)
    header, received, tensors = shared_memory.receive(ends[1])
    assert header == {"id": "x"} and len(received) == 3 and len(tensors) == len(TENSORS) + 1
    for before, after in zip(sent, received, strict=True):
        assert list(before) == list(after)
        for name, record in before.items():
            if not isinstance(record, ArrayRecord):
                assert after[name] == record
                continue
            assert list(after[name]) == list(record)
            for key, tensor in wire.unpack(record).items():
                arrived = wire.unpack(after[name])[key]
                assert arrived.dtype == tensor.dtype and arrived.shape == tensor.shape
                assert torch.equal(arrived, tensor)


def test_an_array_that_lies_arrives_as_it_is(ends: tuple[socket.socket, socket.socket]) -> None:
    """What a hostile client says of its bytes is for the guards to judge."""
    for sent in (Array("float32", (3,), "numpy.ndarray", b"no array"), Array("x", (), "y", b"")):
        shared_memory.send(ends[0], {}, [RecordDict({"arrays": ArrayRecord({"a": sent})})])
        _, (received,), _ = shared_memory.receive(ends[1])
        arrived = received["arrays"]["a"]
        assert (arrived.dtype, arrived.shape, arrived.stype) == (
            sent.dtype, sent.shape, sent.stype
        )  # fmt: skip
        assert arrived.data == sent.data and type(arrived) is Array


def test_what_is_received_is_the_receivers_own(ends: tuple[socket.socket, socket.socket]) -> None:
    w = torch.ones(5000)
    common = shared_memory.Segment([w])
    for _ in range(2):
        shared_memory.send(ends[0], {}, [records(w=w)], common)
    (first,), (second,) = (shared_memory.receive(ends[1])[2] for _ in range(2))
    first.fill_(7)
    assert torch.equal(second, torch.ones(5000)) and torch.equal(w, torch.ones(5000))


def test_a_common_tensor_is_laid_into_memory_once(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """The parcels bring one and the same file."""
    w = torch.randn(2000)
    common = shared_memory.Segment([w])
    inodes = set()
    for _ in range(3):
        shared_memory.send(ends[0], {}, [records(w=w)], common)
        _, files, _, _ = socket.recv_fds(ends[1], 16, 2)
        inodes |= {os.fstat(file).st_ino for file in files}
        assert len(files) == 1 and os.fstat(files[0]).st_size == 2000 * 4
        for file in files:
            os.close(file)
        while len(ends[1].recv(1 << 16)) == 1 << 16:
            pass
    assert len(inodes) == 1


def test_what_the_other_side_has_is_not_sent_again(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """Of a tensor that came with the question, the answer has a number in the place of bytes."""
    memory, model = torch.randn(3000), torch.randn(3000)
    sent = shared_memory.send(ends[0], {}, [records(model=model), records(memory=memory)])
    _, (_, state), tensors = shared_memory.receive(ends[1])
    new = torch.randn(10)
    kept = wire.unpack(state["arrays"])["memory"]
    shared_memory.send(ends[1], {}, [records(new=new), records(memory=kept)], known=tensors)
    _, ancillary, _, _ = ends[0].recvmsg(16, socket.CMSG_LEN(8), socket.MSG_PEEK)
    files = array("i", b"".join(data for _, _, data in ancillary))
    sizes = [os.fstat(file).st_size for file in files]
    for file in files:
        os.close(file)
    assert sizes == [64]  # 10 floats in one aligned place
    _, (answer, state), _ = shared_memory.receive(ends[0], sent)
    assert torch.equal(wire.unpack(answer["arrays"])["new"], new)
    assert wire.unpack(state["arrays"])["memory"] is memory


def test_the_death_of_the_other_side_is_an_end_of_file(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ends[0].close()
    with pytest.raises(EOFError):
        shared_memory.receive(ends[1])


def test_no_file_stays_open(ends: tuple[socket.socket, socket.socket]) -> None:
    before, kept = open_files(), []
    for _ in range(5):
        sent = shared_memory.send(ends[0], {}, [records(**TENSORS)])
        kept.append(shared_memory.receive(ends[1], sent))  # tensors stay, descriptors go
    assert not open_files() - before


def test_a_slot_is_used_again_when_nobody_has_what_lay_in_it(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """Not while a view of it, or a NumPy array, is alive; with all in use, files are new."""
    slots, lent = shared_memory.Slots(2), []

    def parcel(number: float) -> torch.Tensor:
        shared_memory.send(ends[0], {}, [records(params=torch.full((1000,), number))], slots=slots)
        _, _, (tensor,) = shared_memory.receive(ends[1], lent=lent)
        return tensor

    first, second, third = parcel(1), parcel(2), parcel(3)
    assert len(slots.files) == 2 and not slots.free
    kept = first[10:20].numpy()
    del first, third
    assert not shared_memory.given_back(lent)  # the third's file was its own
    del second
    released = shared_memory.given_back(lent)
    assert released == [0] or released == [1]
    assert not shared_memory.given_back(lent)
    slots.free += released
    again = parcel(4)
    assert (kept == 1).all() and (again == 4).all()
    del kept
    assert shared_memory.given_back(lent) == [1 - released[0]]
    del again
    assert shared_memory.given_back(lent) == released


def test_a_signal_that_comes_while_memory_goes_back_is_heard(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """Python drops what a signal's handler raises in a callback of memory that is freed."""
    slots, lent = shared_memory.Slots(1), []
    shared_memory.send(ends[0], {}, [records(params=torch.ones(1000))], slots=slots)
    [tensor] = shared_memory.receive(ends[1], lent=lent)[2]
    comes = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.py_object)(
        ("PyErr_SetInterruptEx", ctypes.pythonapi)
    )

    class Told(Exception):
        pass

    def told(*_: object) -> None:
        raise Told

    before = signal.signal(signal.SIGUSR1, told)
    try:
        last = type("Last", (), {})()
        # Freed from the last on; a callback in C, so that the handler does not run at once.
        freed, watch = [tensor, last], weakref.ref(last, partial(comes, signal.SIGUSR1))
        del tensor, last
        with pytest.raises(Told):
            freed.clear()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert watch() is None and shared_memory.given_back(lent) == [0]


@pytest.mark.parametrize("most", [1, 0], ids=["a slot", "none free"])
def test_what_a_reply_leaves_behind_keeps_no_more_than_itself(
    ends: tuple[socket.socket, socket.socket], most: int
) -> None:
    """The new state outlives the reply by rounds: it holds neither the reply's memory nor a slot,
    though a vector may be in both."""
    slots, lent, states = shared_memory.Slots(most), [], []
    before = open_files()
    for number in (1.0, 2.0):
        model, c, both = (torch.full((1000 * k,), number + k) for k in (1, 2, 3))
        own = [records(model=model, both=both), records(c=c, both=both)]
        shared_memory.send(ends[0], {}, own, slots=slots)
        _, (reply, state), tensors = shared_memory.receive(ends[1], lent=lent)
        assert torch.equal(wire.unpack(reply["arrays"])["model"], model)
        assert torch.equal(wire.unpack(reply["arrays"])["both"], both)
        del reply, tensors
        released = shared_memory.given_back(lent)
        assert released == [0] * most
        slots.free += released
        states.append((wire.unpack(state["arrays"]), {"c": c, "both": both}))
    assert len(open_files() - before) == most
    for arrived, sent in states:
        assert all(torch.equal(arrived[name], tensor) for name, tensor in sent.items())
        (size,) = {t.untyped_storage().nbytes() for t in arrived.values()}
        assert 0 <= size - 5000 * 4 < 2 * shared_memory.ALIGNMENT


def test_the_shared_file_is_mapped_once_for_parcels_that_follow_each_other(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    maps: shared_memory.Maps = {}
    for number in (1.0, 2.0):
        model = torch.full((100,), number)
        common, places = shared_memory.Segment([model]), set()
        for own in (5.0, 6.0):
            sent = records(params=model, own=torch.full((3,), own))
            shared_memory.send(ends[0], {}, [sent], common)
            _, _, tensors = shared_memory.receive(ends[1], kept=maps)
            assert [t[0].item() for t in tensors] == [number, own]
            places.add(tensors[0].data_ptr())
        common.close()
        assert len(places) == len(maps) == 1
