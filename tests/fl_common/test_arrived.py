"""Arrays that come over the wire in pieces are decoded without being joined."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fl_common import wire

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Flower's own again afterwards."""
    before = dict(inflatable_utils.inflatable_class_registry)
    wire.receive_in_pieces()
    yield
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
