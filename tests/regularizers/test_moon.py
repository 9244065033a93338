"""MOON: its values, its references, and what a client remembers from round to round."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from fl_client.trainer import LocalData, batches
from fl_common import assembly
from fl_common.config import ConfigError, resolve
from fl_common.determinism import seed_device, seed_of
from fl_common.layout import Layout, concatenate, tensors_of
from fl_common.models.catalogue import build
from regularizers.moon import MOON, MOONParams, contrast
from tests.memories import in_state_dir, memories
from tests.nets import SHAPE, WORK, batch


def model(name: str = "resnet8", seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    head = "none" if name == "moon-cnn" else "moon"
    return build(name, classes=10, shape=SHAPE, head=head, **options).train()


def flat(net: nn.Module) -> dict[str, torch.Tensor]:
    return {kind: concatenate(tensors.values()) for kind, tensors in tensors_of(net).items()}


def begun(net: nn.Module, sent: nn.Module, previous: nn.Module | None, **params) -> MOON:
    method = MOON(MOONParams(**params), WORK)
    method.begin(net, flat(sent), flat(previous) if previous else method.blank(flat(sent)))
    return method


def by_hand(z, z_g, z_p, tau: float) -> torch.Tensor:
    """-log(e^a / (e^a + e^b)), a and b the cosines over tau."""
    a, b = ((normalize(z) * normalize(other)).sum(1) / tau for other in (z_g, z_p))
    return -(a.exp() / (a.exp() + b.exp())).log()


def test_range_of_the_term():
    """cos = 1 and -1: log(1 + e^-4) and log(1 + e^4) at tau = 0.5; equal references: log 2."""
    z, other = torch.eye(256)[:1], torch.eye(256)[1:2]
    assert contrast(z, z, -z, 0.5).item() == pytest.approx(0.01815, abs=1e-5)
    assert contrast(z, -z, z, 0.5).item() == pytest.approx(4.01815, abs=1e-5)
    assert contrast(z, z, -z, 0.5).item() == pytest.approx(math.log1p(math.exp(-4)), rel=1e-4)
    assert contrast(z, other, other, 0.5).item() == pytest.approx(0.69314718, abs=1e-7)
    random = torch.randn(3, 1000, 256, generator=torch.Generator().manual_seed(0))
    ours = contrast(*random, 0.5)
    assert torch.allclose(ours, by_hand(*random, 0.5), atol=1e-6)
    assert ours.min() >= 0.01815 and ours.max() <= 4.01815


def test_a_previous_model_like_the_global_one_gives_log_2_and_no_gradient():
    net, (x, y) = model(seed=1), batch()
    method = begun(net, sent=model(), previous=model())
    term = method.data_term(x, net(x), y)
    assert term.item() == pytest.approx(0.69314718, abs=1e-7)
    term.backward()
    assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["resnet8", "cnn", "moon-cnn", "mlp"])
def test_value_and_gradient_by_hand(name):
    """Against copies of the networks in evaluation mode, dropout and BatchNorm included."""
    net, sent, previous = (model(name, seed) for seed in (1, 0, 2))
    for reference in (sent, previous):  # statistics of their own
        reference(3 + batch()[0])
    (x, y), twin = batch(), deepcopy(net)
    method = begun(net, sent, previous, mu=5.0, tau=0.4)

    torch.manual_seed(3)
    term = method.data_term(x, net(x), y)
    term.backward()
    torch.manual_seed(3)
    z = twin.represent(x)
    with torch.no_grad():
        z_g, z_p = sent.eval().represent(x), previous.eval().represent(x)
    expected = 5.0 * by_hand(z, z_g, z_p, 0.4).mean()
    expected.backward()

    assert z.shape == (6, 256)
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)
    for (key, p), q in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        q = q[1].grad
        assert (p.grad is None) == (q is None), key  # the classifier has no part in z
        if q is not None:
            assert torch.allclose(p.grad, q, rtol=1e-3, atol=1e-4 * q.abs().max()), key


def test_a_first_round_has_no_term():
    net, (x, y) = model(), batch()
    method = begun(net, net, None)
    assert method.data_term(x, net(x), y) == 0.0
    assert method.hooks == () == method.references
    assert method.blank(flat(net)) == {}


def test_references_leave_network_and_random_stream_as_they_are():
    net, (x, y) = model("cnn"), batch()
    method = begun(net, model("cnn"), model("cnn", 2))
    output = net(x)
    before, stream = deepcopy(net.state_dict()), torch.get_rng_state()
    method.data_term(x, output, y)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    method.finish()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert method.references == ()


def test_references_are_those_of_the_rounds_start():
    """The network moves on, and what came down may be overwritten: they do not."""
    net, (x, _) = model(), batch()
    sent, previous = flat(model()), flat(model(seed=2))
    method = MOON(MOONParams(), WORK)
    method.begin(net, sent, previous)
    first = method._refer(x)
    with torch.no_grad():
        torch._foreach_add_(list(net.parameters()), 1.0)
    for vector in (*sent.values(), *previous.values()):
        vector.zero_()
    assert all(map(torch.equal, first, method._refer(x)))


def test_one_sample():
    for name in ("resnet8", "moon-cnn"):
        net, (x, y) = model(name), batch(1)
        method = begun(net, model(name, 1), model(name, 2))
        assert method.data_term(x, net(x), y).shape == ()


def test_bfloat16_autocast():
    net, (x, y) = model(), batch()
    method = begun(net, model(seed=1), model(seed=2))
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x)
        term = method.data_term(x, output, y)
    assert output.dtype == torch.bfloat16 and term.dtype == torch.float32
    term.backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert term.isfinite() and all(g.isfinite().all() for g in grads)
    assert {g.dtype for g in grads} == {torch.float32}


def test_the_head_stands_before_the_classifier_of_any_model():
    """Two linear layers of 256 on FedAlign's ResNet-56: 591,322 + 2 * (256 * 256 + 256)."""
    count = sum(p.numel() for p in model("resnet56-bottleneck").parameters())
    assert count == 722_906
    for name in ("resnet20", "mlp", "tiny-convnet"):
        norm = "group" if name == "tiny-convnet" else "batch"
        net = model(name, norm=norm)
        assert net.head.fc2.out_features == 256 == net.fc.in_features
        plain = build(name, classes=10, shape=SHAPE, norm=norm)
        assert [key for key in net.state_dict() if not key.startswith("head.")] == list(
            plain.state_dict()
        )
    # the same layers and draws as moon-cnn, which has it by itself
    twins = model("lenet").state_dict(), model("moon-cnn").state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(t.values() for t in twins), strict=True))


RUN = (
    "train.dtype=float64",  # a rounding that meets a kink of a ReLU would grow
    "model.head=moon",
    "clients.number=3",
    "clients.per-round=2",
    "run.rounds=3",
    "train.epochs=2",
    "train.device=cpu",
    "data.partition=iid",
)


def loops(name: str, mu: float, cohorts: list[list[int]]) -> tuple[nn.Module, dict, int]:
    """FedAvg and MOON as plain loops: the global model, every client's last one, and how many
    local rounds had a previous model."""
    settings = dict(setting.split("=") for setting in RUN)
    numbers = {key: int(value) for key, value in settings.items() if value.isdecimal()}
    config = resolve({**settings, **numbers, "model.name": name})
    data = assembly.load_data(config)
    cpu = torch.device("cpu")
    split, train = assembly.split_data(config, data), assembly.transform(config, cpu).train
    shape = assembly.input_shape(config, data)
    w = assembly.new_model(config, len(data.classes), shape, cpu)
    last: dict[int, nn.Module] = {}
    with_history = 0
    for number, cohort in enumerate(cohorts, start=1):
        states, sizes = [], []
        for i in cohort:
            net, sent, previous = deepcopy(w).train(), deepcopy(w).eval(), last.get(i)
            indices = assembly.share_of(config, data, split, i).train
            arrays = data.train.x[indices], data.train.y[indices]
            local, key = LocalData(*map(torch.from_numpy, arrays), train), (0, number, i)
            for step, (x, y) in enumerate(batches(local, config.train, key)):
                seed_device("cpu", seed_of("step", *key, step))
                z = net.represent(x)
                loss = cross_entropy(net.fc(z), y)
                if previous:
                    with torch.no_grad():
                        z_g, z_p = sent.represent(x), previous.represent(x)
                    loss = loss + mu * by_hand(z, z_g, z_p, 0.5).mean()
                grads = torch.autograd.grad(loss, list(net.parameters()))
                for p, g in zip(net.parameters(), grads, strict=True):
                    p.data -= config.train.lr * g
            with_history += previous is not None
            last[i] = net.eval()
            states.append(net.state_dict())
            sizes.append(len(indices))
        mean = {
            key: sum(n * state[key].double() for n, state in zip(sizes, states, strict=True))
            / sum(sizes)
            for key in states[0]
        }
        w.load_state_dict(mean)
    return w, last, with_history


@pytest.mark.parametrize("name", ["mlp", "digits-cnn"])
def test_rounds_with_partial_participation_by_hand(name, runner, tmp_path):
    state = tmp_path / "state"
    result = runner(
        *RUN, f"model.name={name}", "regularizers=moon", "moon.mu=2", f"client.state-dir={state}"
    )
    assert result.code == 0
    cohorts = [row["cohort"] for row in result.history]
    w, last, with_history = loops(name, 2.0, cohorts)
    assert len(set(map(tuple, cohorts))) > 1 and with_history >= 3

    def agree(ours: dict, net: nn.Module) -> bool:
        theirs = net.state_dict()
        floats = [key for key in theirs if theirs[key].is_floating_point()]
        return all(torch.allclose(ours[key], theirs[key], atol=1e-9) for key in floats)

    assert agree(result.model, w)
    assert not agree(result.model, loops(name, 0.0, cohorts)[0])
    for i, net in last.items():
        made = max(number for number, cohort in enumerate(cohorts, start=1) if i in cohort)
        (path,) = state.glob(f"*/{i:06d}/{made:06d}-*")
        remembered = {key.removeprefix("moon."): v for key, v in load_file(path).items()}
        assert agree(Layout.of(w).named(remembered), net), i


def test_client_and_server_remember_the_same(runner, tmp_path):
    state = tmp_path / "state"
    result = runner(*RUN, "regularizers=moon", f"client.state-dir={state}")
    assert result.code == 0
    assert in_state_dir(state) == memories(result.folder / "ledger")
    assert len(in_state_dir(state)) == 3
    path = next((result.folder / "ledger" / "000000").glob("*.safetensors"))
    assert set(load_file(path)) == {"moon.params", "moon.stats", "moon.counters"}


def test_without_weight_it_is_the_plain_run_with_the_same_head(runner):
    settings = (*RUN, "model.name=mlp")
    plain = runner(*settings)
    neutral = runner(*settings, "regularizers=moon", "moon.mu=0")
    active = runner(*settings, "regularizers=moon")
    assert plain.code == neutral.code == active.code == 0
    assert neutral.summary["model_sha256"] == plain.summary["model_sha256"]
    assert neutral.history_less_times == plain.history_less_times
    assert active.summary["model_sha256"] != plain.summary["model_sha256"]
    # nobody has a history in the first round: the runs part in the second
    assert active.history_less_times[0] == plain.history_less_times[0]
    # what goes over the wire is FedAvg's
    assert [row["bytes_down"] for row in active.history] == [
        row["bytes_down"] for row in plain.history
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "moon with model.name = digits-cnn: it has no projection head; set model.head=moon"),
        ({"model.head": "moon", "moon.tau": 0.0}, "moon.tau = 0.0: must be greater than 0"),
        ({"model.head": "moon", "moon.mu": -1.0}, "moon.mu = -1.0: must be at least 0"),
        (
            {"model.name": "moon-cnn", "model.head": "moon", "data.source": "synthetic"},
            'model.head = "moon": moon-cnn has it already; leave it at none',
        ),
        ({"model.head": "mon"}, 'model.head = "mon": unknown; did you mean moon?'),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(settings, words):
    with pytest.raises(ConfigError) as refused:
        resolve({"regularizers": "moon", **settings})
    assert words in str(refused.value)


def test_models_that_have_the_head():
    stream = torch.get_rng_state()
    resolve({"regularizers": "moon", "model.name": "moon-cnn", "data.source": "synthetic"})
    resolve({"regularizers": "moon", "model.head": "moon"})
    assert torch.equal(torch.get_rng_state(), stream)  # a check draws nothing


OWN = """
from torch import nn
from fl_common.models.layers import Chain, with_head
def plain(shape, classes):
    first, last = nn.Linear(shape[0], 16), nn.Linear(16, classes)
    return Chain([("fc1", first), ("relu", nn.ReLU()), ("fc", last)])
def headed(shape, classes):
    return with_head(plain(shape, classes))
"""


def test_models_of_ones_own(tmp_path, monkeypatch, runner, capsys):
    (tmp_path / "to_contrast.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ("data.source=breast-cancer", "clients.number=2", "run.rounds=2", "regularizers=moon")
    assert runner(*own, "model.name=to_contrast:plain").code == 2
    assert (
        "no projection head; let it be fl_common.models.layers.with_head" in capsys.readouterr().err
    )
    assert runner(*own, "model.name=to_contrast:headed", "model.head=moon").code == 2
    assert "has its own layers; let it return" in capsys.readouterr().err
    assert runner(*own, "model.name=to_contrast:headed").code == 0


def test_its_memory_stands_beside_the_mean_of_all_last_models(runner):
    """Both are a client's last model; the ledger keeps them as two."""
    result = runner(
        "clients.number=3", "clients.per-round=2", "run.rounds=3", "train.device=cpu",
        "regularizers=moon", "model.head=moon", "eval.models=all",
    )  # fmt: skip
    assert result.code == 0
    assert all("accuracy_all" in row for row in result.history)
