"""FedAlign: its spectral norms, its value and gradient, where it acts, and on which networks."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from fl_client.optimizers import SGD
from fl_client.trainer import LocalData, local_round
from fl_common.config import ConfigError, Train, resolve
from fl_common.local import Affine
from fl_common.models.resnet import BasicBlock
from fl_common.passes import extra_pass
from regularizers import fedalign
from regularizers.fedalign import FedAlign, FedAlignParams, features, spectral_norm
from regularizers.sam import SAM, SAMParams
from tests.nets import WORK, batch, model


def begun(net: nn.Module, **params) -> FedAlign:
    method = FedAlign(FedAlignParams(**params), WORK)
    method.begin(net, {}, {})
    return method


def published(t: torch.Tensor, iterations: int = 10) -> torch.Tensor:
    """The published iteration, as it stands: u = T T^T v, v = u / ||u||, sqrt(||u||)."""
    a = t @ t.mT
    v = torch.ones(*t.shape[:2], 1, dtype=t.dtype)
    for _ in range(iterations):
        u = a @ v
        s = u.norm(dim=1, keepdim=True)
        v = u / s
    return s.sqrt().flatten()


# (c, c', n): v lives in the space of size c, of size n, and of size c'.
@pytest.mark.parametrize("sizes", [(5, 9, 12), (9, 7, 3), (12, 5, 9), (6, 6, 6), (4, 8, 1)])
def test_the_smallest_space_gives_the_published_numbers(sizes):
    c, d, n = sizes
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(4, c, n, generator=generator, dtype=torch.float64)
    q = torch.randn(4, d, n, generator=generator, dtype=torch.float64).requires_grad_()
    expected = published(p @ q.mT / n)
    ours = spectral_norm(p, q)
    assert torch.allclose(ours, expected, rtol=1e-12)
    of_ours, of_expected = (torch.autograd.grad(s.sum(), q)[0] for s in (ours, expected))
    assert torch.allclose(of_ours, of_expected, rtol=1e-9, atol=1e-12)


def test_there_are_ten_iterations():
    """T = diag(1, a): (T T^T)^k 1 = (1, a^2k), so ||u|| in iteration k is the ratio of the norms
    of (1, a^2k) and (1, a^(2k - 2))."""

    def after(k: int, a: float = 0.9) -> float:
        return ((1 + a ** (4 * k)) / (1 + a ** (4 * k - 4))) ** 0.25

    p = torch.diag(torch.tensor([1.0, 0.9], dtype=torch.float64))[None]
    q = 2 * torch.eye(2, dtype=torch.float64)[None]  # T = P Q^T / 2
    assert spectral_norm(p, q).item() == pytest.approx(after(10), abs=1e-14)
    assert fedalign.ITERATIONS == 10
    assert abs(after(10) - after(9)) > 1e-4 < abs(after(10) - after(11))


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet56-bottleneck", "lenet64"])
def test_against_the_largest_singular_value_on_features(name):
    """Features after a ReLU are not negative: the vector of ones is close to the answer."""
    net = model(name)
    method = begun(net)
    net(batch()[0])
    p, q = features(method.x, like=method.y), features(method.y)
    exact = torch.linalg.matrix_norm((p @ q.mT / q.shape[2]).double(), 2)
    assert torch.allclose(spectral_norm(p, q).double(), exact, rtol=2e-6)
    assert torch.allclose(spectral_norm(p.double(), q.double()), exact, rtol=3e-7)


def test_against_the_largest_singular_value_of_gaussian_matrices(monkeypatch):
    """Slow to converge, and always from below."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(8, 64, 128, generator=generator, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(t, 2)
    unit = 128 * torch.eye(128, dtype=torch.float64).expand(8, -1, -1)  # T = t unit / 128
    error = 1 - spectral_norm(t, unit) / exact
    assert error.min() >= 0
    assert 1e-3 < error.max() < 0.1
    monkeypatch.setattr(fedalign, "ITERATIONS", 2000)
    assert torch.allclose(spectral_norm(t, unit), exact, rtol=1e-9)


def test_gradient_of_a_converged_estimate_is_the_outer_product_of_singular_vectors():
    u, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())
    w, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double())
    sigma = torch.tensor([3.0, 0.03, 0.02, 0.01, 0.01, 0.0]).double()  # ratio^40 is 1e-80
    t = (u @ torch.diag(sigma) @ w[:6])[None].requires_grad_()
    (gradient,) = torch.autograd.grad(spectral_norm(t, 8 * torch.eye(8).double()[None]), t)
    assert torch.allclose(gradient[0], torch.outer(u[:, 0], w[0]), atol=1e-12)


def test_vectors_have_the_product_of_their_lengths():
    x, y = batch()[0].flatten(1)[:, :7].abs(), batch()[0].flatten(1)[:, 7:12].abs()
    ours = spectral_norm(features(x), features(y))
    assert torch.allclose(ours, x.norm(dim=1) * y.norm(dim=1), rtol=1e-6)


def test_features_of_zeros_give_zero_and_no_nan():
    p, q = torch.zeros(2, 6, 4), torch.zeros(2, 8, 4, requires_grad=True)
    zeros = torch.zeros
    for left, right in ((p, q), (zeros(2, 3, 4), q), (zeros(2, 9, 12), zeros(2, 8, 12))):
        assert spectral_norm(left, right).max() < 1e-5
    spectral_norm(torch.ones(2, 6, 4), q).sum().backward()
    assert q.grad.isfinite().all()


def test_an_activation_behind_its_pool_counts_as_one_before_it():
    """max(relu(a)) is relu(max(a)), so both networks compute the same, and so is their L_lip."""
    torch.manual_seed(0)
    stem, conv, fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 10, 3), nn.Linear(10 * 14 * 14, 10)
    values = []
    for ends in ((nn.ReLU(), nn.MaxPool2d(2)), (nn.MaxPool2d(2), nn.ReLU())):
        net = nn.Sequential(stem, nn.ReLU(), conv, *ends, nn.Flatten(), fc)
        method = begun(net, omega=0.5)
        net(batch()[0])
        values.append(method.lipschitz(method.x, method.y))
        method.finish()
    assert values[0] == values[1] > 0


def by_hand(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """CE, L_lip and the narrow stage of a ResNet-8 at omega = 0.8, from modules alone."""
    first = net.stages[-1][0]
    narrow = BasicBlock(104, 208, 2, "batch", "B").to(x.dtype).train()
    for name, tensor in narrow.state_dict().items():
        if tensor.dim():
            tensor.copy_(first.state_dict()[name][tuple(slice(n) for n in tensor.shape)])
    features_x = net.stages[:-1](net.stem(x))
    features_y = net.stages[-1](features_x)
    ce = cross_entropy(net.fc(features_y.mean((2, 3))), y)

    def t(p, q):
        p = adaptive_avg_pool2d(p, q.shape[2:])
        return p.flatten(2) @ q.flatten(2).mT / q[0, 0].numel()

    features_x, features_y = features_x.detach(), features_y.detach()
    full = t(features_x, features_y)
    slim = t(features_x[:, :104], narrow(features_x[:, :104]))
    assert full.shape[1:] == (128, 256) and slim.shape[1:] == (104, 208)
    return ce, (published(slim) - published(full)).square().mean(), narrow


def test_value_and_gradient_by_hand():
    x, y = batch(dtype=torch.float64)
    ours, theirs = model().double(), model().double()
    method = begun(ours, mu=0.45, omega=0.8)
    output = ours(x)
    term = method.data_term(x, output, y)
    (cross_entropy(output, y) + term).backward()

    ce, l_lip, narrow = by_hand(theirs, x, y)
    ratio = (ce / l_lip).item()
    (ce + 0.45 * ratio * l_lip).backward()
    for name, p in narrow.named_parameters():
        part = tuple(slice(n) for n in p.shape)
        theirs.stages[-1][0].get_parameter(name).grad[part] += p.grad

    assert l_lip.item() > 1e-3
    assert term.item() == pytest.approx(0.45 * ce.item(), rel=1e-12)  # mu CE: 1 + mu in all
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-7, atol=1e-10), name


def test_gradient_is_inside_the_last_stages_slice_alone():
    net, (x, y) = model(), batch()
    method = begun(net, omega=0.8)
    method.data_term(x, net(x), y).backward()
    touched = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert touched and all(name.startswith("stages.2.") for name in touched)
    conv1 = touched["stages.2.0.conv1.weight"].flatten(2).any(2)
    assert conv1[:208, :104].all()
    assert not conv1[208:].any() and not conv1[:, 104:].any()
    for name, grad in touched.items():
        assert grad[:208].any() and not grad[208:].any(), name


def test_at_full_width_the_term_is_exactly_zero():
    for name in ("resnet8", "lenet64", "resnet20", "mlp"):
        net, (x, y) = model(name), batch()
        method = begun(net, omega=1.0)
        output = net(x)
        assert method.lipschitz(method.x, method.y).item() == 0
        term = method.data_term(x, output, y)
        assert term.item() == 0
        term.backward()
        assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)


def test_dead_features_give_zero_and_no_nan():
    net, (x, y) = model("lenet64"), batch()
    net.conv2.bias.data.fill_(-1e6)  # its ReLU lets nothing through
    method = begun(net)
    term = method.data_term(x, net(x), y)
    term.backward()
    assert term.item() == 0
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


class NoNumbers(TorchDispatchMode):
    """Where no operation may read a number from its device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_buffers_and_parameters_stay_and_nothing_waits_for_a_number():
    net, (x, y) = model(), batch()
    method = begun(net)
    output = net(x)
    before = deepcopy(net.state_dict())
    with NoNumbers():
        method.data_term(x, output, y)
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    method.finish()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_other_passes_are_not_its_features():
    net, (x, y) = model(), batch()
    method = begun(net)
    output = net(x)
    seen = method.x, method.y
    with extra_pass():
        net(2 * x)
    with torch.no_grad():
        net(2 * x)
    assert (method.x, method.y) == seen
    assert method.data_term(x, output, y).item() > 0


def test_the_ratio_is_that_of_each_pass_of_sam():
    """mu CE in both passes, with the CE of each."""
    net, (x, y) = model("lenet64"), batch()
    terms, losses = [], []
    method = begun(net, mu=0.5)
    term_of = FedAlign.data_term

    class Watched(FedAlign):
        def data_term(self, x, output, y):
            losses.append(cross_entropy(output, y).item())
            terms.append(term_of(self, x, output, y))
            return terms[-1]

    method.__class__ = Watched
    methods = [method, SAM(SAMParams(rho=0.5), WORK)]
    settings = Train(batch_size=6, lr=0.01)
    local_round(
        net, LocalData(x, y, lambda x: x), methods, Affine(), SGD(), settings,
        seed=0, server_round=1, partition=0,
    )  # fmt: skip
    assert len(losses) == 2 and losses[0] != losses[1]
    assert [term.item() for term in terms] == pytest.approx([0.5 * loss for loss in losses])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_bfloat16_autocast(monkeypatch, norm):
    """Features of 1e4 have a T T^T of 1e16 and more: nothing for half precision."""
    found = []

    def noted(p, q):
        found.append((p.detach(), q.detach(), spectral_norm(p, q)))
        return found[-1][-1]

    monkeypatch.setattr(fedalign, "spectral_norm", noted)
    net, (x, y) = model(norm=norm), batch()
    method = begun(net)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(1e4 * x)
        term = method.data_term(x, output, y)
    (cross_entropy(output.float(), y) + term).backward()
    assert term.dtype == torch.float32
    assert term.item() == pytest.approx(0.05 * cross_entropy(output.float(), y).item(), rel=1e-2)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())
    assert len(found) == 2
    assert all(torch.equal(sigma, spectral_norm(p, q)) for p, q, sigma in found)


def test_soft_labels():
    net, (x, y) = model("lenet64"), batch()
    soft = 0.7 * nn.functional.one_hot(y, 10) + 0.03
    method = begun(net)
    output = net(x)
    term = method.data_term(x, output, soft)
    assert term.item() == pytest.approx(0.05 * cross_entropy(output, soft).item())


SHORT = ("run.rounds=1", "clients.number=3", "train.device=cpu")


def test_without_weight_it_is_the_plain_run_bit_for_bit(runner):
    plain = runner(*SHORT)
    neutral = runner(*SHORT, "regularizers=fedalign", "fedalign.mu=0")
    active = runner(*SHORT, "regularizers=fedalign")
    assert plain.code == neutral.code == active.code == 0
    assert neutral.summary["model_sha256"] == plain.summary["model_sha256"]
    assert neutral.history_less_times == plain.history_less_times
    assert active.summary["model_sha256"] != plain.summary["model_sha256"]
    # the same state dict
    assert list(active.model) == list(plain.model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # 32 channels: m(v) = 24 up to v = 24 / 0.9, which is 0.83 * 32
        ({"fedalign.omega": 1.0}, "at fedalign.omega = 1.0; set fedalign.omega to 0.83 or less"),
        # 6 and 16 channels: m(4.8) = 6 and m(12.8) = 16; m(v) = 8 up to v = 8 / 0.9 = 0.55 * 16
        ({"model.name": "lenet", "data.source": "synthetic"}, "set fedalign.omega to 0.55 or less"),
        ({"fedalign.omega": 0.0}, "fedalign.omega = 0.0: must be greater than 0"),
        ({"fedalign.mu": -1.0}, "fedalign.mu = -1.0: must be at least 0"),
        # Beta(0.05, 0.05): in every second batch lambda < 1/2, and nearly all of it the partners
        ({"regularizers": "mixup,fedalign"}, "fedalign with mixup: FedAlign weighs its term by"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(settings, words):
    with pytest.raises(ConfigError) as refused:
        resolve({"regularizers": "fedalign", **settings})
    assert len(refused.value.errors) == 1
    assert words in str(refused.value)


OWN = """
from torch import nn
class Plain(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.fc = nn.Linear(shape[0], classes)
    def forward(self, x):
        return self.fc(x)
def sequential(shape, classes):
    return nn.Sequential(nn.Linear(shape[0], 64), nn.ReLU(), nn.Linear(64, classes))
def load(path, seed):
    import numpy as np
    x = np.random.default_rng(seed).standard_normal((300, 40)).astype(np.float32)
    y = (x.sum(1) > 0).astype(np.int64)
    return (x[:200], y[:200]), (x[200:], y[200:]), ("negative", "positive")
"""


def test_models_of_ones_own(tmp_path, monkeypatch, runner, capsys):
    (tmp_path / "to_align.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    why = "it is not a Sequential with a layer before the classifier; make it"
    plain = "model.name=to_align:Plain"
    assert runner(*SHORT, "regularizers=fedalign", plain, "data.source=breast-cancer").code == 2
    assert why in capsys.readouterr().err
    own = ("data.source=to_align:load", "data.partition=iid")  # a shape that only reading tells
    unknown = runner(*SHORT, "regularizers=fedalign", plain, *own)
    assert unknown.code == 3 and why in unknown.summary["error"]
    good = runner(*SHORT, "regularizers=fedalign", "model.name=to_align:sequential", *own)
    assert good.code == 0
