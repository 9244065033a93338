"""What travels: nothing copied in one process, ordinary Flower arrays elsewhere."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fl_common import wire
from fl_common.layout import COUNTERS, PARAMS, STATS, Layout, concatenate, tensors_of
from fl_common.models.catalogue import build

DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2), (5,), (0,), ()])
def test_a_tensor_survives_every_way_it_may_travel(dtype, shape):
    travels((torch.rand(shape) * 100).to(dtype))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
        torch.arange(120.0).view(1, 5, 4, 6).to(memory_format=torch.channels_last),
        torch.arange(36.0).view(6, 6)[:, ::2],
        torch.arange(3.0).expand(2, 3),
    ],
    ids=["transposed", "permuted", "channels last", "every other column", "expanded"],
)
def test_its_elements_keep_their_places_whatever_its_strides(tensor: torch.Tensor):
    """One in Fortran's order too, of which a transposed parameter's momentum is."""
    travels(tensor)


def travels(tensor: torch.Tensor) -> None:
    record = wire.pack({"x": tensor})

    same = wire.unpack(record)["x"]
    assert same is tensor

    through_flower = record.to_torch_state_dict()["x"]
    # Ray's way between its own processes
    through_pickle = wire.unpack(pickle.loads(pickle.dumps(record)))["x"]
    contents = {
        key: item.deflate()
        for key, item in get_all_nested_objects(RecordDict({"r": record})).items()
    }
    root = RecordDict({"r": record}).object_id
    through_grpc = wire.unpack(inflate_object_from_contents(root, contents)["r"])["x"]
    for other in (through_flower, through_pickle, through_grpc):
        assert torch.equal(other, tensor)
        assert other.dtype == tensor.dtype
        assert other.shape == tensor.shape


def test_what_ray_pickles_is_flowers_plain_array():
    restored = pickle.loads(pickle.dumps(wire.TensorArray(torch.ones(3))))
    assert type(restored) is Array


def test_payload_is_elements_times_size_whatever_the_form():
    tensors = {"a": torch.zeros(10), "b": torch.zeros(3, dtype=torch.int64), "c": torch.zeros(())}
    plain = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})
    assert wire.payload_bytes(wire.pack(tensors)) == 10 * 4 + 3 * 8 + 4
    assert wire.payload_bytes(plain) == 10 * 4 + 3 * 8 + 4


@pytest.mark.parametrize("dtype", ["nonsense", "(2,", "i4,(", "2**99i4", "(99999,99999)f8"])
def test_payload_of_an_array_that_claims_no_dtype_is_what_it_holds(dtype: str):
    record = ArrayRecord({"a": Array(dtype, (2,), "numpy.ndarray", b"12345")})
    assert wire.payload_bytes(record) == 5


def test_model_sha256_sees_names_dtypes_shapes_and_bytes_but_not_order():
    one, two = torch.arange(6.0), torch.tensor(3)
    digest = wire.model_sha256({"a": one, "b": two})
    assert digest == wire.model_sha256({"b": two, "a": one.clone()})
    expected = hashlib.sha256(
        b"a:<f4:(6,);" + one.numpy().tobytes() + b"b:<i8:();" + two.numpy().tobytes()
    )
    assert digest == expected.hexdigest()
    different = [
        {"a": one, "c": two},
        {"a": one.double(), "b": two},
        {"a": one.view(2, 3), "b": two},
        {"a": one, "b": two.view(1)},
        {"a": one.flip(0), "b": two},
        {"a": one},
    ]
    assert len({digest, *map(wire.model_sha256, different)}) == len(different) + 1


def test_layout_round_trip():
    net = build("resnet8", classes=10, shape=(3, 32, 32))
    flat = {kind: concatenate(tensors.values()) for kind, tensors in tensors_of(net).items()}
    assert {kind: vector.dtype for kind, vector in flat.items()} == {
        PARAMS: torch.float32, STATS: torch.float32, COUNTERS: torch.int64,
    }  # fmt: skip
    assert flat[PARAMS].numel() == 1_235_274
    assert flat[STATS].numel() == 2_688
    named = Layout.of(net).named(flat)
    state = net.state_dict()
    assert set(named) == set(state)
    assert all(torch.equal(named[name], state[name]) for name in state)
    before = flat[PARAMS].clone()
    with torch.no_grad():
        next(net.parameters()).add_(1)
    assert torch.equal(flat[PARAMS], before), "a flat model is a copy"


def test_a_model_of_two_dtypes_has_no_layout():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="its parameters are not of one dtype"):
        tensors_of(net)


def test_equal_bytes_of_numpy_and_torch_are_one_model():
    array = np.arange(4, dtype=np.float32)
    record = ArrayRecord({"params": Array(array)})
    assert wire.model_sha256(wire.unpack(record)) == wire.model_sha256(
        {"params": torch.arange(4.0)}
    )
