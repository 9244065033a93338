"""Several clients at once: what they learn and reply is what they would one by one, but rounded.

In float64 the two ways differ by the order of sums alone, 1e-11 at most after a few steps; what is
not the same rule shows there.  In float32 the bound is the promised 1e-5, with small steps: where
rounding puts an activation on the other side of a ReLU's kink, one step of 0.05 has 1e-4.
"""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fl_client import cohort, stacked, together
from fl_client.client import Clients
from fl_client.stacked import Batches
from fl_client.trainer import LocalData, batches
from fl_common import assembly, wire
from fl_common.config import ConfigError, Train, resolve
from fl_common.data.sources import Dataset, Split
from fl_common.data.transforms import RECIPES, Recipe, crop, flip
from fl_common.determinism import release_memory
from fl_common.layout import PARAMS, concatenate, tensors_of
from fl_common.local import Affine
from fl_common.models.layers import MaxPool2d
from tests import toy

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZES = (13, 6, 22, 10)
"""Samples of the clients, batches of 8: last batches of 5, 6, 6 and 2, in 2, 1, 3 and 2 steps."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]  # fmt: skip


@pytest.fixture(autouse=True)
def _exact_convolutions():
    """A GPU rounds inputs of convolutions to 10 bits unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


class Federation:
    """Clients with random images of `shape`, and messages that send them a random model."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        sizes: Sequence[int] = SIZES,
        shape: tuple[int, ...] = (1, 8, 8),
        recipe: Recipe | None = None,
        **settings,
    ) -> None:
        values = {
            "data.source": "synthetic",
            "train.batch-size": 8,
            "train.epochs": 2,
            "train.dtype": "float64",
            "train.device": "cpu",
            "clients.number": len(sizes),
            "run.seed": 3,
        } | {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
        ends = np.cumsum(sizes)
        rng = np.random.default_rng(0)
        split = Split(
            rng.integers(256, size=(ends[-1], *shape), dtype=np.uint8),
            rng.integers(4, size=ends[-1]),
        )
        data = Dataset(split, split, tuple("abcd"), shape, fingerprint="random")
        parts = [np.arange(end - n, end) for n, end in zip(sizes, ends, strict=True)]
        patch.setattr(assembly, "load_data", lambda config: data)
        patch.setattr(assembly, "split_data", lambda config, data: parts)
        patch.setitem(RECIPES["synthetic"], "default", recipe or Recipe((0.5,), (0.5,)))
        self.clients = Clients(resolve(values))
        self.count, self.samples = len(sizes), int(ends[-1])
        net = assembly.new_model(self.clients.config, 4, shape, torch.device("cpu"))
        self.w = {kind: concatenate(t.values()) for kind, t in tensors_of(net).items()}

    def messages(self, server_round: int = 1, base: int = 0, **more) -> list[RecordDict]:
        """One to each client, with the server's `c` and `m`, which some strategies read."""
        generator = torch.Generator().manual_seed(server_round)
        extra = {
            name: 0.01
            * torch.randn(self.w[PARAMS].shape, generator=generator).to(self.w[PARAMS].dtype)
            for name in ("c", "m")
        }
        told = {
            "server-round": server_round,
            wire.SAMPLES: self.samples,
            wire.EXPERIMENT: "e",
            wire.MEMORY_ROUND: base,
            wire.CHECKPOINTS: [0],
            **more,
        }
        down = wire.pack(self.w | extra)
        return [
            RecordDict({wire.ARRAYS: down, wire.CONFIG: ConfigRecord(told)})
            for _ in range(self.count)
        ]

    def alone(self, messages, states) -> list[RecordDict]:
        train = self.clients.train
        return [train(i, m, s) for i, (m, s) in enumerate(zip(messages, states, strict=True))]

    def together(self, messages, states, at_once: int = 100) -> list[RecordDict]:
        jobs = [(i, m, s) for i, (m, s) in enumerate(zip(messages, states, strict=True))]
        return self.clients.train_together(jobs, at_once)

    def states(self) -> list[RecordDict]:
        return [RecordDict() for _ in range(self.count)]


def vectors(record: RecordDict) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, arrays in record.items()
        if isinstance(arrays, ArrayRecord)
        for key, tensor in wire.unpack(arrays).items()
    }


def difference(one: RecordDict, other: RecordDict) -> float:
    """The largest, over all arrays."""
    a, b = vectors(one), vectors(other)
    assert a.keys() == b.keys()
    assert a
    assert all(a[key].dtype == b[key].dtype for key in a)
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def same(federation: Federation, bound: float, rounds: int = 1, **more) -> None:
    """Both ways, round after round: replies and memories.  Fails if anyone was trained alone."""
    one, other = federation.states(), federation.states()
    for t in range(1, rounds + 1):
        messages = federation.messages(t, base=t - 1, **more)
        singly, at_once = federation.alone(messages, one), federation.together(messages, other)
        assert not federation.clients.together.said
        for a, b in zip(singly, at_once, strict=True):
            assert difference(a, b) < bound
            expected, got = dict(a[wire.METRICS]), dict(b[wire.METRICS])
            assert expected.pop("cpu-s") > 0
            assert got.pop("cpu-s") > 0
            assert expected.keys() == got.keys()
            for key, value in expected.items():
                assert got[key] == pytest.approx(value, abs=100 * bound), key
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys()
            assert not vectors(a) or difference(a, b) < bound * 10


MODELS = {
    "mlp": {},
    "lenet": {"shape": (3, 16, 16)},
    "cnn": {"shape": (3, 10, 10)},  # dropout
    "digits-cnn group": {},
    "digits-cnn batch": {},
    "resnet8 group": {"shape": (3, 16, 16)},
    "resnet8 batch": {"shape": (3, 32, 32)},  # 1 x 1 maps at 16 px: 2 samples are all a norm sees
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_models(monkeypatch, model: str, device: str, dtype: str):
    name, _, norm = model.partition(" ")
    federation = Federation(
        monkeypatch, **MODELS[model], model__name=name, model__norm=norm or "batch",
        train__device=device, train__dtype=dtype, train__lr=0.05 if dtype == "float64" else 0.01,
        train__epochs=1 if name == "resnet8" else 2, eval__grad_norm=True,
    )  # fmt: skip
    same(federation, {"float64": 1e-11, "float32": 1e-5}[dtype])


OPTIMIZERS = {
    "momentum": {"train__momentum": 0.9, "train__weight_decay": 0.01},
    "nesterov, clipped": {"train__momentum": 0.9, "train__nesterov": True, "train__clip_norm": 0.3},
    "adam": {"train__optimizer": "adam", "train__lr": 0.01, "train__weight_decay": 0.01},
    "kept momentum": {"train__momentum": 0.9, "train__keep_optimizer": True},
    "kept adam": {"train__optimizer": "adam", "train__lr": 0.01, "train__keep_optimizer": True},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(monkeypatch, optimizer: str):
    """With kept states the second round starts from what the first left, Adam's step numbers,
    which differ between clients, among it."""
    federation = Federation(monkeypatch, model__name="mlp", **OPTIMIZERS[optimizer])
    kept = optimizer.startswith("kept")
    same(federation, 1e-11, rounds=2 if kept else 1)


@pytest.mark.parametrize("optimizer", ["kept momentum", "kept adam"])
def test_what_is_kept_with_channels_innermost(monkeypatch, optimizer: str):
    """As it is with most convolutional networks in float32 on a CPU."""
    network = {"model__name": "lenet", "train__channels_last": "on"}
    federation = Federation(monkeypatch, shape=(3, 16, 16), **network, **OPTIMIZERS[optimizer])
    same(federation, 1e-11, rounds=2)


def test_the_momentum_of_a_newcomer_is_zero(monkeypatch):
    """Two clients were in a round before, the largest of all not."""
    federation = Federation(monkeypatch, model__name="mlp", **OPTIMIZERS["kept momentum"])
    replies = []
    for train in (federation.alone, federation.together):
        states = federation.states()
        train(federation.messages()[:2], states[:2])
        messages = [*federation.messages(2, base=1)[:2], *federation.messages(2)[2:]]
        replies.append(train(messages, states))
    assert not federation.clients.together.said
    assert all(difference(a, b) < 1e-11 for a, b in zip(*replies, strict=True))


METHODS = {
    "fedprox": {"fedprox__mu": 0.1},
    "scaffold": {},
    "feddyn": {"feddyn__alpha": 0.1},
    "feddyn with adam": {
        "train__optimizer": "adam", "train__lr": 0.003, "model__norm": "group",
    },
    "feddyn clipped": {"feddyn__alpha": 0.1, "train__clip_norm": 0.3},
    "feddyn as published": {
        "feddyn__alpha": 0.1, "train__clip_norm": 0.3, "feddyn__clip_scope": "official",
    },
    "feddc": {"feddc__alpha": 0.1},
    "fedspeed": {"fedspeed__alpha": 0.7},
    "fednova": {},
    "fedsam": {},
    "fedasam": {},
    "mofedsam": {"train__clip_norm": 0.3},
}  # fmt: skip


def test_terms_that_differ_from_client_to_client():
    """grad + 2 theta, and grad / 2 + (1, -1); then the first of them alone."""
    terms = [Affine(slope=2.0), Affine(constant=torch.tensor([1.0, -1.0]), scale=0.5)]
    both = stacked.corrections(terms, lambda rows: [torch.stack(rows)], torch.zeros(()))
    params, grads = [torch.tensor([[3.0, 4.0], [5.0, 6.0]])], [torch.ones(2, 2)]
    assert both(params, grads) == 0
    assert grads[0].tolist() == [[7.0, 9.0], [1.5, -0.5]]
    grads = [torch.ones(1, 2)]
    assert both.first(1)([params[0][:1]], grads) == 0
    assert grads[0].tolist() == [[7.0, 9.0]]


@pytest.mark.parametrize("method", METHODS)
def test_strategies(monkeypatch, method: str):
    """Two rounds, so that drifts and control variates are not zero; alpha_i = alpha / omega_i
    differs from client to client."""
    name = method.partition(" ")[0]
    same(Federation(monkeypatch, strategy__name=name, **METHODS[method]), 1e-10, rounds=2)


REGULARIZERS = {
    "proximal": {"proximal__mu": 0.1},
    "sam": {},
    "asam": {},
    "mixup": {"mixup__gamma": 1.0},
    "man": {},
    "man per sample": {"man__reduce": "per-sample-sum", "man__include_logits": True},
    "man of norms": {"man__reduce": "fro", "man__layer_reduce": "mean"},
    "man of inputs": {"man__site": "layer-input"},
    "man,mixup,sam": {"mixup__gamma": 1.0, "train__clip_norm": 0.5},
}


@pytest.mark.parametrize("method", REGULARIZERS)
def test_regularizers(monkeypatch, method: str):
    names = method.partition(" ")[0]
    settings = {"model__norm": "group", **REGULARIZERS[method]}
    same(Federation(monkeypatch, regularizers=names, **settings), 1e-10)


def test_activations_that_are_overwritten(monkeypatch):
    """Before a ReLU that works in place, MAN sees what came in, not what it made of that."""
    torch.manual_seed(0)
    relu = torch.nn.ReLU(inplace=True)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 6), relu, torch.nn.Linear(6, 4)
    ).double()
    monkeypatch.setattr(assembly, "new_model", lambda *args: net)
    same(Federation(monkeypatch, regularizers="man", man__site="pre-act"), 1e-11)


@pytest.mark.parametrize("method", ["train__clip_norm", "strategy__name"])
def test_gradients_that_lie_at_one_place(monkeypatch, method: str):
    """Of single samples with maps of 1 x 1, vmap gives the norms at the end of a block's residual
    and of its shortcut one gradient for both biases; clipping it, or correcting it, is once for
    each."""
    values = {"train__clip_norm": 1.0, "strategy__name": "scaffold"}
    settings = {"model__name": "resnet8", "model__norm": "group", method: values[method]}
    same(Federation(monkeypatch, sizes=(1, 1), **settings), 1e-11)


@pytest.mark.parametrize("active", ["conv2", "fc"])
def test_partial_rounds(monkeypatch, active: str):
    """Behind `fc` no ReLU has a gradient, and MAN sees nothing; before `conv2` one of two."""
    settings = {"regularizers": "man", "man__layer_reduce": "mean"}
    federation = Federation(monkeypatch, strategy__name="fedpart", **settings)
    assert set(federation.clients.data.classes) == set("abcd")
    same(federation, 1e-11, **{wire.ACTIVE: [active]})


def test_norms_that_are_frozen_take_no_padding_for_samples(monkeypatch):
    federation = Federation(
        monkeypatch, strategy__name="fedpart", fedpart__bn_frozen="eval", model__norm="batch"
    )
    same(federation, 1e-11, **{wire.ACTIVE: ["fc"]})


def test_augmented_and_dropped_out(monkeypatch):
    """Every draw is the client's own, whoever is trained beside it."""
    recipe = Recipe((0.5,), (0.5,), train=(crop, flip))
    federation = Federation(
        monkeypatch, shape=(3, 10, 10), recipe=recipe, model__name="cnn", regularizers="sam"
    )
    same(federation, 1e-11)
    messages = federation.messages()
    whole = federation.together(messages, federation.states())
    pairs = federation.together(messages, federation.states(), at_once=2)
    assert all(difference(a, b) < 1e-11 for a, b in zip(whole, pairs, strict=True))


class Dropping(torch.nn.Module):
    """Drops without a module for it."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.nn.functional.dropout(x.flatten(1), 0.3, self.training))


def test_a_dropout_that_is_no_module(monkeypatch):
    same(Federation(monkeypatch, model__name=f"{__name__}:Dropping"), 1e-11)


class DroppingWeights(Dropping):
    """Drops weights, of which there are not as many as samples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.nn.functional.dropout(self.fc.weight, 0.3, self.training)
        return torch.nn.functional.linear(x.flatten(1), weight, self.fc.bias)


def test_dropped_weights_are_drawn_one_by_one(monkeypatch):
    """In a last batch of one sample, a mask of its size would drop the same inputs everywhere."""
    federation = Federation(monkeypatch, sizes=(9, 9), model__name=f"{__name__}:DroppingWeights")
    messages = federation.messages()
    at_once = federation.together(messages, federation.states())
    singly = federation.alone(messages, federation.states())
    assert [difference(a, b) for a, b in zip(singly, at_once, strict=True)] == [0, 0]


def test_bfloat16(monkeypatch):
    """Autocast, to its own precision: 8 bits of mantissa, so 1 % of an update of 0.1."""
    federation = Federation(
        monkeypatch, model__norm="group", train__dtype="bfloat16", train__lr=0.01
    )
    same(federation, 2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_rounding_is_not_taken_for_a_wrong_rule(monkeypatch, seed: int):
    """In bfloat16 a gradient of this network is rounded by 5 to 20 %.  Whether clients are trained
    at once must not hang on that: a resumed run, whose process looks at the network at another
    step, would go on otherwise than one that was never interrupted."""
    federation = Federation(
        monkeypatch, (9, 9), (1, 16, 16), model__name="tiny-convnet", model__norm="group",
        train__batch_size=4, train__dtype="bfloat16", train__lr=0.001, run__seed=seed,
    )  # fmt: skip
    same(federation, 2e-3)


def test_held_out_samples(monkeypatch):
    federation = Federation(monkeypatch, sizes=(20, 16), eval__on="both", eval__holdout=0.4)
    same(federation, 1e-11, evaluate=True)


def test_who_has_no_steps_left_stays_bit_for_bit(monkeypatch):
    """A client's reply is the same bits whether others go on for eight epochs' worth or not."""
    replies = []
    for sizes in [(16, 16), (16, 128)]:
        federation = Federation(monkeypatch, sizes, model__name="mlp", train__momentum=0.9)
        federation.clients.data.train.x[:16] = 7 * np.arange(16)[:, None, None, None]
        federation.clients.data.train.y[:16] = np.arange(16) % 4
        federation.w[PARAMS] = torch.linspace(-1, 1, len(federation.w[PARAMS])).double() / 9
        replies.append(federation.together(federation.messages(), federation.states())[0])
    assert difference(*replies) == 0


def test_a_batch_is_the_clients_own():
    """Side by side, in every step, what `batches` gives each client."""
    settings = Train(batch_size=4, epochs=2)
    members = []
    for i, n in [(5, 10), (2, 7), (9, 3)]:
        data = LocalData(torch.arange(n) + 100 * i, torch.arange(n) % 3, lambda x: x)
        members.append(cohort.Member(i, data, (), Affine(), {}))
    side_by_side = Batches(members, settings, (1, 2), torch.device("cpu"))
    assert side_by_side.steps == [6, 4, 2]
    for k, member in enumerate(members):
        for step, (x, y) in enumerate(batches(member.data, settings, (1, 2, member.partition))):
            xs, ys, sizes = side_by_side.at(step)
            assert xs[k, : sizes[k]].tolist() == x.tolist()
            assert ys[k, : sizes[k]].tolist() == y.tolist()
            assert set(ys[k, sizes[k] :].tolist()) <= {-100}
            assert side_by_side.padded == (len(set(sizes)) > 1)
    # Sizes of the batches: 4 4 2 4 4 2, 4 3 4 3 and 3 3.
    assert side_by_side.sizes == [[4, 4, 3], [4, 3, 3], [2, 4, 0], [4, 3, 0], [4, 0, 0], [2, 0, 0]]


ALONE = {
    "moon": {"regularizers": "moon", "model__head": "moon"},
    "fedalign": {"regularizers": "fedalign"},
    "gradaug": {"regularizers": "gradaug"},
    "stochastic-depth": {"regularizers": "stochastic-depth", "model__name": "resnet20"},
}


@pytest.mark.parametrize("method", ALONE)
def test_methods_that_are_trained_one_by_one(monkeypatch, caplog, method: str):
    settings = {"train__epochs": 1, **ALONE[method]}
    federation = Federation(monkeypatch, sizes=(9, 8), **settings)
    messages = federation.messages()
    with caplog.at_level(logging.WARNING):
        at_once = federation.together(messages, federation.states())
    singly = federation.alone(messages, federation.states())
    assert [difference(a, b) for a, b in zip(singly, at_once, strict=True)] == [0, 0]
    jobs = list(zip(range(2), messages, federation.states(), strict=True))
    chosen, why = federation.clients.choose_cohort(jobs, 1)
    assert (chosen, why[:24]) == (1, "engine.cohort = auto: 1;")
    (line,) = caplog.messages
    assert f"trained alone: {method}: " in line


def test_a_norm_of_one_sample_is_met_alone(monkeypatch, caplog):
    """The client of 17 has a last batch of one; the others are trained at once."""
    federation = Federation(monkeypatch, sizes=(17, 10, 12))
    messages = federation.messages()
    at_once = federation.together(messages, federation.states())
    singly = federation.alone(messages, federation.states())
    differences = [difference(a, b) for a, b in zip(singly, at_once, strict=True)]
    assert differences[0] == 0
    assert all(0 < d < 1e-11 for d in differences[1:])
    assert caplog.messages == [
        "some clients are trained alone: BatchNorm meets a batch of one sample"
    ]


class Picky(torch.nn.Module):
    """Fails on images that are too bright for it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(64, 4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.max() > 0.9:
            raise ValueError("too bright")
        return self.fc(x.flatten(1))


def test_a_failure_while_memory_is_measured_is_not_that_of_the_others(monkeypatch):
    """It is measured on the largest client, here the one that cannot be trained."""
    monkeypatch.setattr(assembly, "new_model", lambda *args: Picky())
    federation = Federation(monkeypatch)
    x = federation.clients.data.train.x
    x //= 2
    x[19:41] = 255  # of client 2, the largest
    messages = federation.messages()
    replies = federation.together(messages, federation.states())
    assert "ValueError: too bright" in str(replies.pop(2))
    for i, reply in zip((0, 1, 3), replies, strict=True):
        alone = federation.clients.train(i, messages[i], RecordDict())
        assert difference(alone, reply) < 1e-11


class OwnDraws(torch.nn.Module):
    """Noise that torch cannot draw for each client."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(64, 4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1) + torch.randn_like(x.flatten(1)))


def test_what_torch_cannot_stack_is_trained_one_by_one(monkeypatch, caplog):
    monkeypatch.setattr(assembly, "new_model", lambda *args: OwnDraws())
    federation = Federation(monkeypatch)
    messages = federation.messages()
    jobs = [(i, message, RecordDict()) for i, message in enumerate(messages)]
    chosen, why = federation.clients.choose_cohort(jobs, 1)
    assert chosen == 1
    assert why.startswith("engine.cohort = auto: 1; training several at once fails (vmap: ")
    at_once = federation.together(messages, federation.states())
    singly = federation.alone(messages, federation.states())
    assert all(difference(a, b) == 0 for a, b in zip(singly, at_once, strict=True))
    (line,) = caplog.messages
    assert line.startswith("clients are trained one by one: training several at once fails (vmap: ")


class Failing(OwnDraws):
    """A network that no way of training can train."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such layer")


def test_clients_that_fail_one_by_one_too_are_not_said_to_fail_at_once_only(monkeypatch, caplog):
    monkeypatch.setattr(assembly, "new_model", lambda *args: Failing())
    monkeypatch.setattr(together, "free_bytes", lambda device: sys.maxsize)  # no pass to measure
    federation = Federation(monkeypatch)
    jobs = [(i, message, RecordDict()) for i, message in enumerate(federation.messages())]
    assert federation.clients.choose_cohort(jobs, 1) == (
        1,
        "engine.cohort = auto: 1; training one client fails (no such layer)",
    )
    replies = federation.clients.train_together(jobs, 2)
    assert all("ValueError: no such layer" in str(reply) for reply in replies)
    assert caplog.messages == [
        "clients are trained one by one: training several at once fails (no such layer)"
    ]


class Words(torch.nn.Module):
    """The words of a text, of which the first is padding and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(256, 4, padding_idx=0, dtype=torch.float64)
        self.fc = torch.nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = ((x.flatten(1) + 1) * 8).long()  # 0 ... 16
        return self.fc(self.words(ids).sum(1))


@pytest.mark.parametrize("known", [True, False])
def test_what_torch_stacks_wrongly_is_noticed(monkeypatch, caplog, known: bool):
    """torch 2.13 forgets `padding_idx` of all clients but the first.  We know, and if we did not
    the first step would tell."""
    torch.manual_seed(0)
    net = Words()
    monkeypatch.setattr(assembly, "new_model", lambda *args: net)
    federation = Federation(monkeypatch)
    federation.clients.data.train.x[:, :, :6] = 0
    if not known:
        monkeypatch.setattr(stacked, "_embedding", torch.nn.functional.embedding)
    messages = federation.messages()
    if known:
        same(federation, 1e-11)
        return
    at_once = federation.together(messages, federation.states())
    singly = federation.alone(messages, federation.states())
    assert all(difference(a, b) == 0 for a, b in zip(singly, at_once, strict=True))
    (line,) = caplog.messages
    assert "it gives another gradient than for a client alone" in line


def test_padding_may_be_counted_from_the_end():
    weight = torch.ones(3, 2, requires_grad=True)
    stacked._embedding(torch.tensor([0, 2, 1]), weight, -1).sum().backward()
    assert weight.grad.tolist() == [[1, 1], [1, 1], [0, 0]]


class Shared(torch.nn.Module):
    """A layer that it has under two names, and a weight that two layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = torch.nn.Linear(64, 8), torch.nn.Linear(8, 4)
        self.middle, self.tied = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.tied.weight = self.middle.weight
        self.layers = torch.nn.Sequential(self.middle, self.norm, self.tied, self.middle, self.norm)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(self.first(x.flatten(1))))


def test_what_layers_share_stays_one(monkeypatch):
    monkeypatch.setattr(assembly, "new_model", lambda *args: Shared())
    federation = Federation(monkeypatch)
    same(federation, 1e-11, rounds=2)
    names = [*dict(federation.clients.net.named_parameters())]
    assert names == [*dict(Shared().named_parameters())]
    assert all(isinstance(p, torch.nn.Parameter) for p in federation.clients.net.parameters())


class Replacing(torch.nn.Module):
    """Puts a new buffer in the place of the old one in every step; another is a mask."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(64, classes)
        self.register_buffer("mask", torch.arange(64) % 3 > 0)
        self.register_buffer("last", torch.zeros(classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.fc(x.flatten(1) * self.mask)
        if self.training:
            self.last = (self.last + self.fc.weight.mean(1).detach()) / 2
        return z - self.last


def test_buffers_that_are_replaced_belong_to_their_client(monkeypatch):
    federation = Federation(monkeypatch, model__name=f"{__name__}:Replacing")
    same(federation, 1e-11)
    messages = federation.messages()
    of_both = federation.alone(messages, federation.states())
    first = Federation(monkeypatch, model__name=f"{__name__}:Replacing")
    for partition in (1, 0):  # the other way round
        reply = first.clients.train(partition, messages[partition], RecordDict())
        assert difference(reply, of_both[partition]) == 0
        assert vectors(reply)["arrays/stats"].any()


class Mixing(torch.nn.Module):
    """Takes samples together, in a way that torch stacks and padding spoils."""

    def __init__(self, instances: bool) -> None:
        super().__init__()
        self.norm = torch.nn.InstanceNorm2d(1, track_running_stats=True) if instances else None
        self.fc = torch.nn.Linear(64, 4)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc((self.norm(x) if self.norm else x).flatten(1))
        return y if self.norm else y - y.mean(0)


@pytest.mark.parametrize(("instances", "other"), [(0, "another gradient"), (1, "other buffers")])
def test_what_takes_padding_for_samples_is_noticed(monkeypatch, caplog, instances, other):
    """At the first step with padding, which is the second one here."""
    monkeypatch.setattr(assembly, "new_model", lambda *args: Mixing(instances))
    federation = Federation(monkeypatch, sizes=(16, 13))
    messages = federation.messages()
    at_once = federation.together(messages, federation.states())
    singly = federation.alone(messages, federation.states())
    assert all(difference(a, b) == 0 for a, b in zip(singly, at_once, strict=True))
    (line,) = caplog.messages
    assert f"it gives {other} than for a client alone" in line
    federation = Federation(monkeypatch, sizes=(16, 16))
    same(federation, 1e-11)  # nobody needs padding


def test_a_cohort_is_gone_after_its_round(monkeypatch):
    """Not when the garbage collector comes to it, which does not see a card's memory."""
    made, real = [], cohort._Cohort.__init__

    def noted(self, *args):
        made.append(weakref.ref(self))
        real(self, *args)

    monkeypatch.setattr(cohort._Cohort, "__init__", noted)
    federation = Federation(monkeypatch)
    gc.disable()
    try:
        federation.together(federation.messages(), federation.states())
    finally:
        gc.enable()
    assert len(made) == 1
    assert made[0]() is None


def test_a_loss_of_its_own(monkeypatch, caplog):
    toy.install(monkeypatch, (3, 1))
    pairs = [setting.split("=") for setting in toy.SETTINGS]
    values = {key: int(v) if v.isdecimal() else v for key, v in pairs} | {"train.lr": toy.LR}
    clients = Clients(resolve(values))
    down = wire.pack({PARAMS: torch.zeros(1, dtype=torch.float64)})
    told = ConfigRecord({"server-round": 1, wire.SAMPLES: 4})
    message = RecordDict({wire.ARRAYS: down, wire.CONFIG: told})
    replies = clients.train_together([(i, message, RecordDict()) for i in (0, 1)], 2)
    # theta - lr a (theta - b) from theta = 0: 0.1 a b.
    assert [wire.vectors(reply)[PARAMS].item() for reply in replies] == pytest.approx([0, 0.4])
    assert "a loss of its own" in caplog.text


def test_a_failure_stays_its_own(monkeypatch):
    """One client asks for the memory that it lost, one has no such partition; two train, once the
    one that may be trained beside them has what it lacks."""
    federation = Federation(monkeypatch, strategy__name="scaffold")
    messages = federation.messages()
    lost = federation.messages(base=1)[1]
    jobs = [(0, messages[0], RecordDict()), (1, lost, RecordDict()), (7, messages[0], RecordDict())]
    jobs.append((3, messages[3], RecordDict()))
    no_such = "DataError: partition-id 7, but clients.number = 4"
    first, asks, fails, last = federation.clients.train_together(jobs, 4)
    assert dict(asks[wire.METRICS]) == {"server-round": 1, wire.MEMORY_LOST: 1}
    assert str(fails) == no_such
    assert first is last is None
    del jobs[1]
    first, fails, last = federation.clients.train_together(jobs, 4)
    assert str(fails) == no_such
    for i, reply in ((0, first), (3, last)):
        assert difference(federation.clients.train(i, messages[i], RecordDict()), reply) < 1e-11


def test_the_largest_of_unequal_clients_is_measured(monkeypatch):
    """A small client in front does not let more in than memory holds, nor do those of a later
    round that are larger."""
    federation = Federation(monkeypatch, sizes=(2, 4, 8, 8), train__batch_size=8)
    measured, real = [], together.bytes_of

    def seen(net, data, settings):
        measured.append(len(data.y))
        return real(net, data, settings)

    monkeypatch.setattr(together, "bytes_of", seen)
    messages = federation.messages()
    jobs = [(i, message, RecordDict()) for i, message in enumerate(messages)]
    federation.clients.train_together(jobs[:2], 2)
    assert measured == [4]
    federation.clients.train_together(jobs, 4)
    assert measured == [4, 8]
    federation.clients.train_together(jobs[:2], 2)
    assert measured == [4, 8]


FEWER = "the card cannot hold {} clients at once; trying {}".format
LARGEST = "the card holds {} of these clients at once, not {}".format


@pytest.mark.parametrize(
    ("most", "trial", "rounds", "said"),
    [
        (1, "4 2", "4 2 1 1 1 1, 1 1 1 1, 1 1 1 1", [FEWER(4, 2), FEWER(2, 1)]),
        (2, "4 22 3 22", "4 2 2, 3 2 2, 2 2", [FEWER(4, 2), FEWER(3, 2), LARGEST(2, 3)]),
        (3, "4 22 33", "4 2 2, 3 1, 3 1", [FEWER(4, 2), LARGEST(3, 4)]),
    ],
)
def test_the_largest_number_that_a_card_holds(monkeypatch, caplog, most, trial, rounds, said):
    """It is searched by halves, in `auto`'s trial or from round to round; what clients that were
    too many had is let go of before others are tried."""
    federation = Federation(monkeypatch, sizes=(8, 8, 8, 8))
    clients = federation.clients
    tried, held, real, alone = [], [], together.cohort_round, clients.train_alone

    def small_card(net, members, *args, **settings):
        assert not [one for one in held if one() is not None]
        tried.append(len(members))
        if len(members) > most:
            activations = torch.zeros(len(members))
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(net, members, *args, **settings)

    forgotten = []
    monkeypatch.setattr(together.Together, "_forget", lambda self: forgotten.append(len(tried)))
    monkeypatch.setattr(together, "cohort_round", small_card)
    monkeypatch.setattr(clients, "train_alone", lambda job: tried.append(1) or alone(job))
    jobs = [(i, message, RecordDict()) for i, message in enumerate(federation.messages())]
    why = clients.choose_cohort(jobs, 1)[1]
    assert (f"as one of {most}" if most > 1 else "no two of these clients") in why
    assert tried == [int(size) for size in trial if size != " "]
    # What earlier ones recorded takes no room from those that are tried.
    assert all(i in forgotten for i in range(1, len(tried)) if tried[i] != tried[i - 1])
    forgotten.clear()
    if most > 1:  # what they recorded themselves is kept from round to round
        [active] = clients.together.held
        clients.together.held[active] = most - 1, 4
        for count in (most, most, most - 1):
            clients.train_together(jobs[:count], 4)
        assert len(forgotten) == 1
    assert caplog.messages == said
    clients.together.held.clear()
    tried.clear()
    for _ in range(3):
        messages = federation.messages()
        replies = federation.together(messages, federation.states())
    assert tried == [int(size) for size in rounds if size.isdecimal()]
    singly = federation.alone(messages, federation.states())
    assert all(difference(a, b) < 1e-11 for a, b in zip(singly, replies, strict=True))


def test_what_onednn_keeps_is_counted_too(monkeypatch):
    federation, found = Federation(monkeypatch, train__dtype="float32"), []
    clients = federation.clients
    clients.train(0, federation.messages()[0], RecordDict())
    for large in (1, 1 << 60):
        monkeypatch.setattr(MaxPool2d, "LARGE", large)
        found.append(cohort.bytes_of(clients.net, clients.local_data(0), clients.config.train))
    assert 0 < found[1] < found[0] < 1.5 * found[1]


def test_a_full_round_after_a_partial_one_is_measured_too(monkeypatch):
    """Its pass keeps more: what holds after both is what a full round alone would say."""
    monkeypatch.setattr(together, "free_bytes", lambda device: 1 << 30)
    found = []
    for rounds in (["fc"], []), ([],):
        federation = Federation(
            monkeypatch, sizes=(8, 8), strategy__name="fedpart", model__norm="group"
        )
        for active in rounds:
            more = {wire.ACTIVE: active} if active else {}
            federation.together(federation.messages(**more), federation.states())
            found.append(federation.clients.together.most)
    partial, after, full = found
    assert partial > after == full


def test_what_memory_holds(monkeypatch, caplog):
    """Half of what is free, by what one client's pass keeps."""
    federation = Federation(monkeypatch, model__name="mlp")
    clients = federation.clients
    clients.train(0, federation.messages()[0], RecordDict())
    each = cohort.bytes_of(clients.net, clients.local_data(0), clients.config.train)
    # An mlp of 64-64-32-4 keeps x, two activations and the output's like of 8 samples, and the
    # weights of all layers but the first; all parameters count six times, and 13 images of 64.
    parameters = sum(p.numel() for p in clients.net.parameters())
    assert 6 * 8 * parameters < each < 6 * 8 * parameters + 4 * 8 * (parameters + 8 * 200) + 13 * 64
    monkeypatch.setattr(together, "free_bytes", lambda device: 4 * each + each // 2)
    tried, real = [], together.cohort_round

    def counting(net, members, *args, **settings):
        tried.append(len(members))
        real(net, members, *args, **settings)

    monkeypatch.setattr(together, "cohort_round", counting)
    federation.together(federation.messages(), federation.states(), at_once=3)
    assert tried == [2, 2]
    assert caplog.messages == ["memory holds 2 of these clients at once, not 3"]


def test_auto_takes_what_was_faster(monkeypatch):
    """By a clock that makes one way slow; the measurement leaves no trace in any client."""
    federation = Federation(monkeypatch, model__name="mlp", train__momentum=0.9)
    messages = federation.messages()
    jobs = [(i, m, RecordDict()) for i, m in enumerate(messages)]
    before = federation.together(messages, federation.states())
    now = [0.0]
    monkeypatch.setattr(together.time, "perf_counter", lambda: now[0])
    # Four at once that take as long as two one by one are faster than one process, not than many.
    alone, at_once = "_one_by_one", "_at_once"
    real = {name: getattr(together.Together, name) for name in (alone, at_once)}
    for slow, workers, expected in (
        ([alone], 1, 4),
        ([at_once], 1, 1),
        ([alone, at_once], 1, 4),
        ([alone, at_once], 100, 1),
    ):
        with monkeypatch.context() as patch:
            for name in slow:

                def delayed(self, *args, real=real[name]):
                    now[0] += 60
                    return real(self, *args)

                patch.setattr(together.Together, name, delayed)
            chosen, why = federation.clients.choose_cohort(jobs, workers)
        assert chosen == expected
        assert why.startswith(f"engine.cohort = auto: {expected}; a step took ")
    assert all(not state for _, _, state in jobs)
    after = federation.together(messages, federation.states())
    assert all(difference(a, b) == 0 for a, b in zip(before, after, strict=True))


def memory(which: str) -> int:
    """This process's memory: VmRSS, what it has; RssAnon, less what is in files, which come and go;
    VmHWM, the most it had [KiB]."""
    return int(Path("/proc/self/status").read_text().partition(f"{which}:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_auto_gives_back_the_memory_of_its_trial(monkeypatch):
    """The process would else keep it for the rest of the run."""
    settings = {"model__name": "lenet64", "train__dtype": "float32", "train__batch_size": 64}
    federation = Federation(monkeypatch, [64] * 12, (3, 32, 32), **settings)
    jobs = [(i, m, RecordDict()) for i, m in enumerate(federation.messages())]
    federation.clients.train(*jobs[0])
    release_memory()
    before, own = memory("VmRSS"), memory("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS
    federation.clients.choose_cohort(jobs, 1)
    assert memory("VmHWM") > before + 100_000
    assert memory("RssAnon") < own + 50_000


def test_bad_settings():
    for values, text in (
        (
            {"engine.cohort": "0"},
            'engine.cohort = "0": must be auto, or a number, at least 1',
        ),
        ({"engine.cohort": "many"}, 'engine.cohort = "many": must be auto, or a number'),
        ({"engine.cohort": 5, "engine.name": "ray"}, "engine.cohort = 5: belongs to engine.name"),
        ({"engine.cohort": 5, "engine.workers": 2}, "engine.cohort = 5 with engine.workers = 2"),
    ):
        with pytest.raises(ConfigError) as wrong:
            resolve(values)
        assert text in str(wrong.value)
    assert resolve({"engine.cohort": 5}).engine.cohort == "5"
    assert resolve({"engine.cohort": "auto"}).engine.cohort == "auto"
