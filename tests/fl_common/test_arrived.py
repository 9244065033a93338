"""Arrays that come over the wire in pieces are decoded without being joined."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.superlink.grid import http_grid

from fl_common import wire

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Flower's own again afterwards."""
    before = dict(inflatable_utils.inflatable_class_registry)
    inflate = http_grid.inflate_object_from_contents
    wire.receive_in_pieces()
    yield
    http_grid.inflate_object_from_contents = inflate
    inflatable_utils.inflatable_class_registry.update(before)


def over_the_wire(content: RecordDict) -> RecordDict:
    objects = {i: o.deflate() for i, o in get_all_nested_objects(content).items()}
    return inflatable_utils.inflate_object_from_contents(content.object_id, objects)


def test_arrays_arrive_as_they_were() -> None:
    """More than one piece (of 5 MB), equal arrays under two names, an empty one."""
    large = torch.randn(2_000_000)
    sent = {"large": large, "a": torch.zeros(5), "b": torch.zeros(5), "none": torch.empty(0, 3)}
    content = RecordDict({"arrays": wire.pack(sent), "metrics": MetricRecord({"n": 3})})
    arrived = over_the_wire(content)
    assert arrived["metrics"] == content["metrics"]
    assert isinstance(arrived["arrays"], ArrayRecord)
    pieces = arrived["arrays"]["large"].pieces
    assert len(pieces) == 2 and type(arrived["arrays"]["a"]) is wire.ArrivedArray
    assert arrived["arrays"]["large"].nbytes == len(content["arrays"]["large"].data)
    for name, tensor in sent.items():
        found = torch.from_numpy(arrived["arrays"][name].numpy())
        assert torch.equal(found, tensor) and found.shape == tensor.shape
    assert not pieces  # let go of as they were decoded


def test_flowers_own_arrays_are_read_alike() -> None:
    array = np.arange(12, dtype=np.float64).reshape(3, 4)
    content = RecordDict({"arrays": ArrayRecord({"x": Array.from_numpy_ndarray(array)})})
    arrived = over_the_wire(content)["arrays"]["x"]
    assert arrived.data == content["arrays"]["x"].data
    assert np.array_equal(arrived.numpy(), array)


def test_a_pickle_is_not_read() -> None:
    content = RecordDict({"arrays": ArrayRecord({"x": Array("float32", (1,), "pickle", b"cos\n")})})
    with pytest.raises(ValueError, match="serialised as pickle"):
        over_the_wire(content)["arrays"]["x"].numpy()
    array = np.array([{}], dtype=object)
    data = BytesIO()
    np.lib.format.write_array(data, array, allow_pickle=True)
    told = Array("float32", (1,), "numpy.ndarray", data.getvalue())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        over_the_wire(RecordDict({"arrays": ArrayRecord({"x": told})}))["arrays"]["x"].numpy()


def test_what_is_no_array_is_refused() -> None:
    record = ArrayRecord({"x": Array.from_numpy_ndarray(np.zeros(2))})
    others = dict.fromkeys(record.children, MetricRecord())
    with pytest.raises(ValueError, match="Array"):
        wire.ArrivedRecord.inflate(record.deflate(), others)


class Wrong(Array):
    """Names a piece that it does not have."""

    def deflate(self) -> bytes:
        return super().deflate().replace(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [7]')


Wrong.__qualname__ = "Array"


def test_a_reply_that_cannot_be_decoded_is_its_senders_failure() -> None:
    """Raised, it would end the run, and what was pulled with it would be lost."""
    answer = Metadata(1, "", 7, 1, "m", "1", 1e9, 60.0, "train")  # to message m
    record = ArrayRecord()
    record["params"] = Wrong(np.zeros(3, dtype=np.float32))
    reply = make_message(answer, RecordDict({"arrays": record}))
    objects = {i: o.deflate() for i, o in get_all_nested_objects(reply).items()}
    arrived = http_grid.inflate_object_from_contents(reply.object_id, dict(objects))
    assert arrived.has_error() and arrived.metadata.reply_to_message_id == "m"
    assert arrived.error.reason == (
        "its reply cannot be decoded: IndexError: list index out of range"
    )
    whole = make_message(answer, RecordDict({"metrics": MetricRecord({"n": 3})}))
    objects = {i: o.deflate() for i, o in get_all_nested_objects(whole).items()}
    arrived = http_grid.inflate_object_from_contents(whole.object_id, dict(objects))
    assert arrived.content["metrics"]["n"] == 3

    for content in (b"", b"nothing", objects[whole.content.object_id]):  # no message at all
        arrived = http_grid.inflate_object_from_contents("x", {"x": content, **objects})
        assert arrived.has_error() and arrived.metadata.reply_to_message_id == ""
