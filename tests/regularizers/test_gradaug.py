"""GradAug: its draws, its value and gradient by hand, and on which networks it works."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from fl_client.optimizers import SGD
from fl_client.trainer import LocalData, local_round
from fl_common.config import ConfigError, Train, resolve
from fl_common.determinism import seed_of
from fl_common.local import Affine
from fl_common.models.resnet import _resnet
from regularizers import gradaug
from regularizers.gradaug import GradAug, GradAugParams
from regularizers.man import MAN, MANParams
from regularizers.sam import SAM, SAMParams
from tests.nets import SHAPE, WORK, batch, model


def begun(net: nn.Module, **params) -> GradAug:
    method = GradAug(GradAugParams(**params), WORK)
    method.begin(net, {}, {})
    return method


class Watched:
    """Stands in for the slim network and notes what it is asked for."""

    def __init__(self, method: GradAug) -> None:
        self.slim, self.seen = method.slim, []
        method.slim = self

    def __call__(self, x: torch.Tensor, omega: float) -> torch.Tensor:
        self.seen.append((omega, tuple(x.shape[2:])))
        return self.slim(x, omega)


def drawn(seed: int) -> float:
    """The only draw of a step with n = 1."""
    return random.Random(seed_of("gradaug", seed)).choice(gradaug.SIDES)


def test_value_and_gradient_by_hand():
    """n = 1 at omega_min = 0.5: a ResNet-8 of half the channels on the resized images."""
    net, (x, y) = model().double(), batch(dtype=torch.float64)
    method = begun(net, mu=1.75, omega_min=0.5, n=1)
    torch.manual_seed(next(seed for seed in range(99) if drawn(seed) == 3 / 4))
    output = net(x)
    term = method.data_term(x, output, y)
    term.backward()

    half = _resnet(SHAPE, 10, "batch", (32, 64, 128), (1, 1, 1), imagenet=True).double()
    for name, tensor in half.state_dict().items():
        if tensor.dim():
            tensor.copy_(net.state_dict()[name][tuple(slice(n) for n in tensor.shape)])
    said = half(interpolate(x, (24, 24), mode="bilinear", align_corners=True)).softmax(1)
    p = output.detach().softmax(1)
    by_hand = 1.75 * (p * (p / said).log()).sum() / len(x)  # batchmean
    by_hand.backward()
    assert term.item() == pytest.approx(by_hand.item(), rel=1e-10)
    for (name, p), q in zip(net.named_parameters(), half.parameters(), strict=True):
        part = tuple(slice(n) for n in q.shape)
        assert torch.allclose(p.grad[part], q.grad, rtol=1e-6, atol=1e-10), name
        p.grad[part] = 0
        assert not p.grad.any(), name  # the whole network's output is taken as a constant


def test_its_passes_are_not_the_steps_own():
    """MAN beside it looks at the whole network alone."""
    net, (x, y) = model(), batch()
    values = []
    for n in (0, 2):
        man, method = MAN(MANParams(), WORK), begun(net, n=n)
        man.begin(net, {}, {})
        output = net(x)
        method.data_term(x, output, y)
        values.append(man.data_term(x, output, y))
        man.finish()
    assert values[0] == values[1] > 0


def test_the_terms_of_several_sub_networks_add_up():
    net, (x, y) = model(), batch()
    method = begun(net, n=3)
    torch.manual_seed(5)
    output = net(x)
    watched = Watched(method)
    torch.manual_seed(5)
    term = method.data_term(x, output, y)
    teacher, total = output.detach().softmax(1), 0.0
    for omega, size in watched.seen:
        sub = watched.slim(interpolate(x, size, mode="bilinear", align_corners=True), omega)
        total += (teacher * (teacher.log() - sub.log_softmax(1))).sum(1).mean().item()
    assert term.item() == pytest.approx(1.75 * total, rel=1e-4)


def test_widths_and_sides():
    """{omega_min} and n - 1 draws from U[omega_min, 1], descending; four sides, each as often."""
    method = begun(model())
    method.params = GradAugParams(n=3, omega_min=0.25)
    method.slim = lambda x, omega: torch.zeros(len(x), 10)
    widths, sides = [], []
    for step in range(500):
        torch.manual_seed(step)
        watched = Watched(method)
        method.data_term(torch.zeros(1, *SHAPE), torch.zeros(1, 10), None)
        method.slim = watched.slim
        widths.append([omega for omega, _ in watched.seen])
        sides += [size for _, size in watched.seen]
    widths = torch.tensor(widths)
    assert (widths[:, 2] == 0.25).all() and (widths.diff(dim=1) <= 0).all()
    free = widths[:, :2].flatten()
    assert free.min() > 0.25 and free.max() < 1 and len(free.unique()) > 990
    # U[0.25, 1]: mean 0.625, standard deviation 0.75 / sqrt(12 * 1000) = 0.007
    assert free.mean().item() == pytest.approx(0.625, abs=0.03)
    assert set(sides) == {(32, 32), (28, 28), (24, 24), (20, 20)}
    # 1500 / 4 each, standard deviation sqrt(1500 * 3 / 16) = 17
    assert all(300 < sides.count(size) < 450 for size in set(sides))


@pytest.mark.parametrize("mu", [0.0, 1.75])
def test_cudnn_does_not_try_its_kernels_for_every_shape(monkeypatch, mu):
    """While there are sub-networks; a round that did not begin has nothing to put back."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    method = begun(model("resnet8"), mu=mu)
    assert cudnn.benchmark == (mu == 0)
    method.finish()
    assert cudnn.benchmark
    cudnn.benchmark = False
    method.finish()
    GradAug(GradAugParams(), WORK).finish()
    assert not cudnn.benchmark


def test_published_sides_of_224_px_and_those_of_oblong_images():
    method, draws = begun(model()), random.Random(0)
    for shape, sizes in (
        ((224, 224), {(224, 224), (192, 192), (160, 160), (128, 128)}),
        ((8, 16), {(8, 16), (7, 14), (6, 12), (5, 10)}),
    ):
        x = torch.zeros(1, 3, *shape)
        assert {tuple(method._resized(x, draws).shape[2:]) for _ in range(60)} == sizes


def test_draws_are_those_of_the_step_and_leave_its_generator_alone():
    net, (x, y) = model(), batch()
    method, seen = begun(net, n=2), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        torch.rand(len(seen))  # whatever was drawn before
        output, before = net(x).detach(), torch.get_rng_state()
        watched = Watched(method)
        method.data_term(x, output, y)
        method.slim = watched.slim
        seen.append(watched.seen)
        assert torch.equal(torch.get_rng_state(), before)
    assert seen[0] == seen[1] != seen[2]


def test_both_passes_of_sam_see_the_same_sub_networks():
    net, (x, y) = model(), batch()
    method = begun(net)
    watched = Watched(method)
    local_round(
        net, LocalData(x, y, lambda x: x), [method, SAM(SAMParams(), WORK)], Affine(), SGD(),
        Train(batch_size=3), seed=0, server_round=1, partition=0,
    )  # fmt: skip
    first, second, other, another = (watched.seen[i : i + 2] for i in (0, 2, 4, 6))
    assert first == second != other == another
    assert len(watched.seen) == 8


def test_identical_logits_have_no_divergence(monkeypatch):
    """omega = 1 at full size: not exactly 0, for the passes differ in rounding."""
    monkeypatch.setattr(gradaug, "SIDES", (1.0,))
    for name in ("resnet8", "lenet64"):
        net, (x, y) = model(name), batch()
        term = begun(net, omega_min=1.0).data_term(x, net(x), y)
        assert abs(term.item()) < 1e-6


def test_running_statistics_follow_the_whole_network_alone():
    net, (x, y) = model(), batch()
    method = begun(net)
    output = net(x)
    before = deepcopy(net.state_dict())
    method.data_term(x, output, y)
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["lenet64", "cnn", "mlp", "moon-cnn"])
def test_networks_with_one_side_see_the_images_as_they_are(name):
    net, (x, y) = model(name), batch()
    method = begun(net, n=4)
    watched = Watched(method)
    term = method.data_term(x, net(x), y)
    term.backward()
    assert {size for _, size in watched.seen} == {(32, 32)}
    assert term.item() > 0
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_one_sample_whose_smaller_image_ends_in_one_pixel():
    """34 px leave 2 x 2 in ResNet-8, 21 px (5/8) 1 x 1, where torch's BatchNorm refuses."""
    net = model(shape=(3, 34, 34))
    x, y = batch(1, (3, 34, 34))
    method = begun(net, n=4)
    for seed in range(8):
        torch.manual_seed(seed)
        assert method.data_term(x, net(x), y).isfinite()


@pytest.mark.parametrize(
    ("name", "norm"), [("resnet8", "batch"), ("resnet8", "group"), ("cnn", "batch")]
)
def test_bfloat16_autocast(name, norm):
    net, (x, y) = model(name, norm=norm), batch()
    method = begun(net)
    with torch.autocast("cpu", torch.bfloat16):
        term = method.data_term(x, net(x), y)
    term.backward()
    assert term.dtype == torch.float32 and term.isfinite()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


SHORT = ("run.rounds=1", "clients.number=3", "train.device=cpu")


def test_without_sub_networks_it_is_the_plain_run_bit_for_bit(runner):
    plain = runner(*SHORT)
    none = runner(*SHORT, "regularizers=gradaug", "gradaug.n=0")
    weightless = runner(*SHORT, "regularizers=gradaug", "gradaug.mu=0")
    active = runner(*SHORT, "regularizers=gradaug")
    for neutral in (none, weightless):
        assert neutral.code == 0
        assert neutral.summary["model_sha256"] == plain.summary["model_sha256"]
        assert neutral.history_less_times == plain.history_less_times
    assert active.code == 0
    assert active.summary["model_sha256"] != plain.summary["model_sha256"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradaug.omega-min": 0.0}, "gradaug.omega-min = 0.0: must be greater than 0"),
        ({"gradaug.omega-min": 1.5}, "gradaug.omega-min = 1.5: must be at most 1"),
        ({"gradaug.n": -1}, "gradaug.n = -1: must be at least 0"),
        # full width and one side: nothing is different
        ({"gradaug.omega-min": 1.0}, "digits-cnn: it is no narrower at gradaug.omega-min = 1.0"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(settings, words):
    with pytest.raises(ConfigError) as refused:
        resolve({"regularizers": "gradaug", **settings})
    assert len(refused.value.errors) == 1
    assert words in str(refused.value)


def test_full_width_is_allowed_where_sides_differ():
    cifar_like = {"model.name": "resnet8", "data.source": "synthetic"}
    resolve({"regularizers": "gradaug", "gradaug.omega-min": 1.0, **cifar_like})


def test_a_network_that_cannot_be_narrowed_is_refused():
    with pytest.raises(ValueError, match="gradaug: LayerNorm cannot be run at reduced width; make"):
        GradAug.prepare(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), GradAugParams())
    with pytest.raises(ValueError, match="gradaug: it is not a Sequential that ends in a linear"):
        GradAug.prepare(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), GradAugParams())
