"""SAM and ASAM in a local round, and FedSAM, FedASAM and MoFedSAM on the quadratic toy."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fl_client.optimizers import SGD
from fl_client.trainer import LocalData, batches, frozen_statistics, local_round
from fl_common.config import Train
from fl_common.local import Affine, Work
from regularizers.sam import ASAM, SAM, ASAMParams, SAMParams
from tests import toy

K10 = "train.epochs=10"
WORK = Work(omega=1.0, steps=1, lr=1.0, nominal_steps=1, base_lr=1.0)


def play(net, data, settings, *methods, partition=0):
    for method in methods:
        method.begin(net, {}, {})
    return local_round(
        net, data, methods, Affine(), SGD(settings.momentum), settings,
        seed=0, server_round=1, partition=partition,
    )  # fmt: skip


def sam(rho: float) -> SAM:
    return SAM(SAMParams(rho=rho), WORK)


def asam(rho: float, eta: float = 0.2) -> ASAM:
    return ASAM(ASAMParams(rho=rho, eta=eta), WORK)


class Bowl(torch.nn.Module):
    """theta^T diag(2, 8) theta / 2, whatever the sample; the gradient is (2 theta_1, 8 theta_2)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        theta = torch.tensor([1.0, 0.5], dtype=torch.float64)
        self.register_parameter(name, torch.nn.Parameter(theta))

    @property
    def theta(self) -> torch.Tensor:
        return getattr(self, self.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.theta

    @staticmethod
    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (torch.tensor([2.0, 8.0], dtype=torch.float64) * output**2).sum() / 2


ONE = LocalData(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), lambda x: x)


@pytest.mark.parametrize(
    ("method", "name", "epsilon", "gradient"),
    [
        # g1 = (2, 4), ||g1|| = sqrt 20
        (sam(0.05), "weight", (0.02236068, 0.04472136), (2.04472136, 4.35777088)),
        # T = (1.2, 0.7), T g1 = (2.4, 2.8), T^2 g1 = (2.88, 1.96)
        (asam(0.5), "weight", (0.39047482, 0.26573981), (2.78094965, 6.12591849)),
        # a bias has T = 1: SAM's direction
        (asam(0.05), "bias", (0.02236068, 0.04472136), (2.04472136, 4.35777088)),
    ],
)
def test_published_numbers(method, name, epsilon, gradient):
    net = Bowl(name)
    method.begin(net, {}, {})
    perturbation = method.perturbation()
    theta = net.theta.detach()
    perturbation.apply([theta], [torch.tensor([2.0, 4.0], dtype=torch.float64)])
    assert (theta - torch.tensor([1.0, 0.5])).tolist() == pytest.approx(epsilon, abs=1e-8)
    perturbation.undo([theta])
    assert theta.tolist() == [1.0, 0.5]

    play(net, ONE, Train(lr=1.0, batch_size=1), method)
    assert (torch.tensor([1.0, 0.5]) - net.theta.detach()).tolist() == pytest.approx(
        gradient, abs=1e-8
    )


class Small(torch.nn.Module):
    """Weights and biases of both norms, BatchNorm and dropout; remembers its dropout masks."""

    def __init__(self, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(6, 16)
        self.norm = torch.nn.BatchNorm1d(16) if norm else torch.nn.Identity()
        with torch.no_grad():
            for p in self.parameters():
                p += 0.1  # no zeros: adding next to nothing to them would change them
        self.dropout = torch.nn.Dropout(dropout)
        self.last = torch.nn.Linear(16, 3)
        self.masks: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        dropped = self.dropout(x)
        self.masks.append((dropped == 0).detach())
        return self.last(torch.relu(dropped))


def data(transform=lambda x: x) -> LocalData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=generator)
    return LocalData(x, torch.randint(3, (24,), generator=generator), transform)


def test_a_round_is_the_algorithm_written_out():
    """Against autograd, by hand: one norm over all parameters, T only for weights, the running
    statistics of the first pass."""
    settings = Train(lr=0.2, epochs=2, batch_size=8, momentum=0.9, clip_norm=1.0)
    for method, eta in ((sam(0.1), None), (asam(0.5), 0.2)):
        net, hand = Small(), Small()
        play(net, data(), settings, method)
        params = dict(hand.named_parameters())
        velocity = {name: torch.zeros_like(p) for name, p in params.items()}
        for x, y in batches(data(), settings, (0, 1, 0)):
            g = dict(zip(params, torch.autograd.grad(cross_entropy(hand(x), y), params.values()),
                         strict=True))  # fmt: skip
            statistics = {name: b.clone() for name, b in hand.named_buffers()}
            t = {
                name: p.detach().abs() + eta if eta and "weight" in name else torch.ones_like(p)
                for name, p in params.items()
            }
            norm = torch.sqrt(sum(((t[k] * g[k]) ** 2).sum() for k in g))
            rho = 0.5 if eta else 0.1
            start = {name: p.detach().clone() for name, p in params.items()}
            with torch.no_grad():
                for name, p in params.items():
                    p += rho * t[name] ** 2 * g[name] / norm
            second = torch.autograd.grad(cross_entropy(hand(x), y), params.values())
            total = torch.sqrt(sum((s**2).sum() for s in second))
            with torch.no_grad():
                for (name, p), s in zip(params.items(), second, strict=True):
                    velocity[name] = 0.9 * velocity[name] + s * min(1.0, 1.0 / (total + 1e-6))
                    p.copy_(start[name] - 0.2 * velocity[name])
                for name, b in hand.named_buffers():
                    b.copy_(statistics[name])
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(tensor, hand.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [sam(0.0), asam(0.0)])
def test_without_length_it_is_sgd_bit_for_bit(method):
    settings = Train(lr=0.2, epochs=2, batch_size=8, momentum=0.9)
    ours, plain = Small(dropout=0.5), Small(dropout=0.5)
    play(ours, data(), settings, method)
    play(plain, data(), settings)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


@pytest.mark.parametrize("method", [sam(0.05), asam(0.5)])
def test_parameters_come_back_exactly_and_statistics_follow_the_first_pass(method):
    """With a learning rate that moves nothing: what is left is what a second pass would spoil."""
    settings = Train(lr=1e-30, epochs=2, batch_size=8)
    start, ours, plain = Small(), Small(), Small()
    play(ours, data(), settings, method)
    play(plain, data(), settings)
    for name, p in ours.named_parameters():
        assert torch.equal(p, dict(start.named_parameters())[name]), name
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, dict(plain.named_buffers())[name]), name
    assert int(ours.norm.num_batches_tracked) == 6
    assert ours.norm.track_running_stats
    assert not torch.equal(ours.norm.running_mean, start.norm.running_mean)


def test_instance_norms_statistics_follow_the_first_pass():
    """Bit for bit; 7 samples, since torch averages statistics over copies, one for each."""

    def made() -> torch.nn.Sequential:
        torch.manual_seed(1)
        norm = torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
        torch.nn.init.normal_(norm.running_mean)
        return torch.nn.Sequential(norm, torch.nn.Flatten(), torch.nn.Linear(48, 3))

    net, plain = made(), made()
    x = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    data = LocalData(x, torch.arange(7) % 3, lambda x: x)
    settings = Train(lr=0.1, batch_size=7)
    play(net, data, settings, sam(0.5))
    plain(next(batches(data, settings, (0, 1, 0)))[0])
    assert dict(net.named_buffers()).keys() == dict(plain.named_buffers()).keys()
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, dict(plain.named_buffers())[name]), name
    assert net[0].track_running_stats


@pytest.mark.parametrize("training", [True, False])
def test_frozen_statistics_change_no_output_of_instance_norm(training):
    norm = torch.nn.InstanceNorm2d(3, track_running_stats=True).train(training)
    x = torch.randn(4, 3, 5, 5)
    with frozen_statistics(norm):
        inside = norm(x)
    assert torch.equal(norm(x), inside)


def test_dropout_and_augmentation_are_the_same_in_both_passes():
    seen: list[torch.Tensor] = []

    def noisy(x):
        seen.append(x + torch.randn(x.shape))
        return seen[-1]

    net = Small(dropout=0.5, norm=False)
    play(net, data(noisy), Train(lr=0.2, epochs=2, batch_size=8), sam(0.5))
    assert sum(map(len, seen)) == 2 * 24  # not once more for the second pass
    assert len(net.masks) == 12
    for first, second in zip(net.masks[::2], net.masks[1::2], strict=True):
        assert torch.equal(first, second)
    for this, after in zip(net.masks[::2], net.masks[2::2], strict=False):
        assert not torch.equal(this, after)


def test_the_steps_of_sam_draw_as_those_of_sgd_do():
    """The second pass takes no random numbers away from later steps."""
    nets = Small(dropout=0.5, norm=False), Small(dropout=0.5, norm=False)
    settings = Train(lr=1e-30, epochs=2, batch_size=8)
    play(nets[0], data(), settings, sam(0.5))
    play(nets[1], data(), settings)
    for ours, plain in zip(nets[0].masks[::2], nets[1].masks, strict=True):
        assert torch.equal(ours, plain)


def test_a_vanishing_gradient_perturbs_nothing():
    net = Bowl("weight")
    with torch.no_grad():
        net.theta.zero_()
    play(net, ONE, Train(lr=1.0, batch_size=1), sam(0.05))
    assert net.theta.tolist() == [0.0, 0.0]


def test_the_loss_that_is_told_is_that_of_the_model_itself():
    net = Bowl("weight")
    result = play(net, ONE, Train(lr=1.0, batch_size=1), sam(0.3))
    assert result.loss == pytest.approx((2 * 1.0**2 + 8 * 0.5**2) / 2)


def test_fedsam_on_the_toy(on_toy):
    trace = on_toy(20, K10, "strategy.name=fedsam", "sam.rho=0.1")
    assert trace.settled(0.5814929408, within=1e-9) <= 15


@pytest.mark.parametrize(("strategy", "regularizer"), [("fedsam", "sam"), ("fedasam", "asam")])
def test_named_combinations_are_fedavg_with_the_regularizer(traced, strategy, regularizer):
    small = ["data.source=breast-cancer", "model.name=mlp", "run.rounds=2", "train.device=cpu"]
    named, pair, off, fedavg = (
        traced(3, *small, *settings).result
        for settings in (
            [f"strategy.name={strategy}", f"{regularizer}.rho=0.3"],
            [f"regularizers={regularizer}", f"{regularizer}.rho=0.3"],
            [f"strategy.name={strategy}", f"{regularizer}.rho=0"],
            [],
        )
    )
    assert named.summary["model_sha256"] == pair.summary["model_sha256"]
    assert named.history_less_times == pair.history_less_times
    assert off.summary["model_sha256"] == fedavg.summary["model_sha256"]
    assert named.summary["model_sha256"] != fedavg.summary["model_sha256"]


def mofedsam(
    cohorts: list[list[int]],
    *,
    beta: float,
    rho: float,
    n: tuple[int, int] = (1, 1),
    epochs: int = 10,
    batch: int = 100,
    decay: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """w and m (T + 1,): theta <- theta - eta (beta g(theta + eps) + (1 - beta) m), then w is the
    mean of the models and m minus the mean of Delta_i / (K_i eta)."""
    steps = [epochs * math.ceil(m / batch) for m in n]
    w, m = 0.0, 0.0
    history = [(w, m)]
    for t, cohort in enumerate(cohorts):
        lr, deltas = toy.LR * decay**t, {}
        for i in cohort:
            theta = w
            for _ in range(steps[i]):
                first = toy.A[i] * (theta - toy.B[i])
                up = theta + rho * first / (abs(first) + 1e-12)
                theta -= lr * (beta * toy.A[i] * (up - toy.B[i]) + (1 - beta) * m)
            deltas[i] = theta - w
        w += np.mean(list(deltas.values()))
        m = -np.mean([delta / (steps[i] * lr) for i, delta in deltas.items()])
        history.append((w, m))
    return tuple(np.array(part) for part in zip(*history, strict=True))


@pytest.mark.parametrize(
    ("settings", "n", "case"),
    [
        ([K10], (1, 1), {"beta": 0.1, "rho": 0.05}),
        ([K10, "mofedsam.beta=0.3", "sam.rho=0.2"], (3, 1), {"beta": 0.3, "rho": 0.2}),
        ([K10, "clients.per-round=1"], (1, 1), {"beta": 0.1, "rho": 0.05}),
        (
            ["train.epochs=4", "train.batch-size=1", "train.lr-decay=0.8"],
            (3, 1),
            {"beta": 0.1, "rho": 0.05, "epochs": 4, "batch": 1, "decay": 0.8},
        ),
    ],
    ids=["published", "other", "partial", "unequal steps"],
)
def test_mofedsam_is_the_algorithm_written_out(on_toy, settings, n, case):
    trace = on_toy(12, "strategy.name=mofedsam", *settings, n=n)
    w, m = mofedsam(trace.cohorts, n=n, **case)
    np.testing.assert_allclose(trace.w, w, rtol=0, atol=1e-12)
    np.testing.assert_allclose(trace.kept("m"), m, rtol=0, atol=1e-12)


def test_mofedsam_with_all_weight_on_the_gradient_is_fedsam(on_toy):
    ours = on_toy(5, K10, "strategy.name=mofedsam", "mofedsam.beta=1", "sam.rho=0.1")
    fedsam = on_toy(5, K10, "strategy.name=fedsam", "sam.rho=0.1")
    np.testing.assert_allclose(ours.w, fedsam.w, rtol=0, atol=1e-14)


def test_perturbations_of_one_round_share_no_memory():
    """A client's kept parameters are its own: the second client restores its own start."""
    settings = Train(lr=0.2, batch_size=8)
    alone = Small()
    play(alone, data(), settings, sam(0.1), partition=1)
    net, start = Small(), copy.deepcopy(Small().state_dict())
    play(net, data(), settings, sam(0.1), partition=0)
    net.load_state_dict(start)
    play(net, data(), settings, sam(0.1), partition=1)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name
