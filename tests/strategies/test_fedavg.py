"""The averaging itself: what it does to equal replies, to order, to buffers."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_common import wire
from fl_common.layout import PARAMS
from fl_server.inprocess import InProcessGrid
from strategies.base import WeightedMean
from strategies.fedavg import FedAvg


def replies_to(messages: list[Message], models: list[dict], samples: list[int]) -> list[Message]:
    out = []
    for message, model, n in zip(messages, models, samples, strict=True):
        metrics = MetricRecord({"num-examples": n, "steps": 1, "loss": 1.0 * n})
        out.append(
            Message(RecordDict({"arrays": wire.pack(model), "metrics": metrics}), reply_to=message)
        )
    return out


def aggregate(models: list[dict], samples: list[int], w: dict | None = None):
    """One round of FedAvg over given replies; the new model as tensors, and the metrics."""
    grid = InProcessGrid(ClientApp(), len(models), {})
    strategy = FedAvg()
    messages = strategy.configure_train(1, wire.pack(w or models[0]), ConfigRecord(), grid)
    arrays, metrics = strategy.aggregate_train(1, replies_to(messages, models, samples))
    return wire.unpack(arrays), metrics


def random_model(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "params": torch.randn(1001, generator=generator, dtype=dtype),
        "stats": torch.rand(6, generator=generator, dtype=dtype),
        "counters": torch.tensor([5 + seed, 2**53 + 1 + seed]),
    }


@pytest.mark.parametrize("samples", [[1, 1, 1], [3, 7, 11], [10**6, 1, 333]])
def test_identical_replies_leave_the_model_unchanged(samples):
    model = random_model(0)
    new, metrics = aggregate([model] * 3, samples)
    for kind in model:
        assert torch.equal(new[kind], model[kind]), kind
        assert new[kind].dtype == model[kind].dtype
    assert metrics["num-examples"] == sum(samples)


def test_mean_is_weighted_by_samples():
    models = [random_model(i) for i in range(3)]
    new, metrics = aggregate(models, [3, 7, 11])
    expected = sum(n * m["params"].double() for n, m in zip([3, 7, 11], models, strict=True)) / 21
    assert torch.equal(new["params"], expected.float())
    assert metrics["loss"] == pytest.approx((9 + 49 + 121) / 21)


def test_integer_buffers_keep_dtype_and_value_of_the_first_client():
    models = [random_model(i) for i in range(3)]
    new, _ = aggregate(models, [3, 7, 11])
    assert new["counters"].dtype == torch.int64
    assert torch.equal(new["counters"], models[0]["counters"])


def test_a_mean_of_many_float32_vectors_is_summed_in_float64():
    vectors = [torch.full((3,), 0.1), *([torch.full((3,), 1e-9)] * 1000)]
    mean = WeightedMean()
    for vector in vectors:
        mean.add(vector, 1.0)
    exact = sum(vector.double() for vector in vectors) / len(vectors)
    assert torch.equal(mean.value(torch.float32), exact.float())


def test_permuted_replies_give_the_same_mean_to_rounding():
    models, samples = [random_model(i) for i in range(4)], [1, 2, 3, 4]
    first, _ = aggregate(models, samples)
    for order in itertools.permutations(range(4)):
        new, _ = aggregate([models[i] for i in order], [samples[i] for i in order])
        torch.testing.assert_close(new["params"], first["params"], rtol=0, atol=1e-7)


def test_no_replies_give_no_model():
    strategy = FedAvg()
    grid = InProcessGrid(ClientApp(), 1, {})
    strategy.configure_train(1, wire.pack(random_model(0)), ConfigRecord(), grid)
    assert strategy.aggregate_train(1, []) == (None, None)


def test_serves_flowers_own_loop():
    """`Strategy.start`, Flower's loop, runs it: the five methods are Flower's."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        model = {k: t + 1 for k, t in wire.unpack(message.content["arrays"]).items()}
        metrics = MetricRecord({"num-examples": 2, "steps": 1, "loss": 0.5})
        content = RecordDict({"arrays": wire.pack(model), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        metrics = MetricRecord({"num-examples": 2, "accuracy": 0.25})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    start = {"params": torch.zeros(3)}
    result = FedAvg().start(InProcessGrid(app, 2, {}), ArrayRecord(start), num_rounds=3)
    assert torch.equal(result.arrays.to_torch_state_dict()["params"], torch.full((3,), 3.0))
    assert result.evaluate_metrics_clientapp[3]["accuracy"] == 0.25


@pytest.mark.parametrize(
    ("step", "given"),
    [
        (lambda self: self.w[PARAMS].double(), r"float64 \[10026\]"),
        (lambda self: self.w[PARAMS][1:], r"float32 \[10025\]"),
    ],
)
def test_a_step_to_something_else_than_a_model_is_told(runner, monkeypatch, step, given: str):
    """The clients' next replies, like the first model, would all be refused."""
    monkeypatch.setattr(FedAvg, "step", step)
    done = runner("run.rounds=1", "clients.number=2")
    assert done.code == 3
    assert re.fullmatch(
        rf"fedavg.step\(\) gave {given}; the model is float32 \[10026\]", done.summary["error"]
    )
