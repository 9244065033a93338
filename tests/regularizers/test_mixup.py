"""Mixup: its draws, the mixed batch and loss, and its neutral setting."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from fl_client.optimizers import SGD
from fl_client.trainer import LocalData, batches, local_round
from fl_common.config import ConfigError, Train, resolve
from fl_common.determinism import seed_of
from fl_common.local import Affine, Work
from regularizers import mixup
from regularizers.mixup import Mixup, MixupParams, weight_of
from regularizers.sam import SAM, SAMParams

WORK = Work(omega=1.0, steps=1, lr=0.1, nominal_steps=1, base_lr=0.1)
N, CLASSES = 12, 3


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 2, 3, 3, generator=generator, dtype=dtype)
    return x, torch.randint(CLASSES, (N,), generator=generator)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, CLASSES)
    return nn.Sequential(*layers).double()


def begun(model: nn.Module, gamma: float) -> Mixup:
    method = Mixup(MixupParams(gamma=gamma), WORK)
    method.begin(model, {}, {})
    return method


@pytest.mark.parametrize("gamma", [1e-3, 0.05, 1.0, 20.0])
def test_lambda_is_beta_distributed(gamma):
    torch.manual_seed(0)
    like = torch.zeros((), dtype=torch.float64)
    draws = torch.stack([weight_of(gamma, like) for _ in range(4000)])
    assert draws.min() >= 0 and draws.max() <= 1
    for t in (1e-6, 0.01, 0.1, 0.3, 0.5, 0.6, 0.95):
        p = stats.beta(gamma, gamma).cdf(t)
        spread = 4 * (p * (1 - p) / 4000) ** 0.5  # four standard deviations
        assert float((draws <= t).double().mean()) == pytest.approx(p, abs=spread + 1e-9)


def test_with_the_published_gamma_most_batches_are_nearly_plain():
    """P(min(lambda, 1 - lambda) < 0.01) = 2 F(0.01) = 0.80 at gamma = 0.05."""
    torch.manual_seed(0)
    like = torch.zeros(())
    draws = torch.stack([weight_of(MixupParams().gamma, like) for _ in range(4000)])
    assert draws.dtype == torch.float32
    nearly = torch.minimum(draws, 1 - draws) < 0.01
    assert float(nearly.double().mean()) == pytest.approx(0.80, abs=0.025)


def test_samples_and_losses_are_mixed_with_one_weight_and_one_permutation():
    (x, y), model = batch(), net()
    method = begun(model, gamma=1.0)
    torch.manual_seed(5)
    mixed, labels = method.transform(x, y)
    assert torch.equal(labels, y)

    torch.manual_seed(5)
    weight, order = weight_of(1.0, x), torch.randperm(N)
    assert 0.1 < weight < 0.9 and not torch.equal(y[order], y)
    torch.testing.assert_close(mixed, weight * x + (1 - weight) * x[order])

    output = model(mixed)
    loss = cross_entropy(output, y) + method.data_term(mixed, output, y)
    pairs = weight * cross_entropy(output, y) + (1 - weight) * cross_entropy(output, y[order])
    torch.testing.assert_close(loss, pairs)
    soft = weight * one_hot(y, CLASSES) + (1 - weight) * one_hot(y[order], CLASSES)
    torch.testing.assert_close(loss, cross_entropy(output, soft))
    params = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, params, retain_graph=True), torch.autograd.grad(pairs, params)
    )


def test_with_lambda_1_the_step_is_the_plain_one_bit_for_bit(monkeypatch):
    monkeypatch.setattr(mixup, "weight_of", lambda gamma, like: torch.ones_like(like[0, 0, 0, 0]))
    (x, y), model = batch(torch.float32), net().float()
    method = begun(model, gamma=0.05)
    mixed, labels = method.transform(x, y)
    assert torch.equal(mixed, x)
    output = model(mixed)
    loss = cross_entropy(output, labels)
    assert torch.equal(loss + method.data_term(mixed, output, labels), loss)


def test_lambda_0_gives_the_partners_exactly(monkeypatch):
    monkeypatch.setattr(mixup, "weight_of", lambda gamma, like: torch.zeros_like(like[0, 0, 0, 0]))
    (x, y), method = batch(torch.float32), begun(net(), gamma=0.05)
    torch.manual_seed(2)
    mixed, _ = method.transform(x, y)
    torch.manual_seed(2)
    order = torch.randperm(N)
    assert torch.equal(mixed, x[order])


def test_a_networks_own_loss_is_mixed():
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(18, 1).double()

        def forward(self, x):
            return self.fc(x.flatten(1))[:, 0]

        def loss(self, output, y):
            return ((output - y) ** 2).mean()

    (x, y), model = batch(), Regression()
    method = begun(model, gamma=1.0)
    torch.manual_seed(5)
    mixed, _ = method.transform(x, y)
    torch.manual_seed(5)
    weight, order = weight_of(1.0, x), torch.randperm(N)
    output = model(mixed)
    loss = model.loss(output, y) + method.data_term(mixed, output, y)
    pairs = weight * model.loss(output, y) + (1 - weight) * model.loss(output, y[order])
    torch.testing.assert_close(loss, pairs)


def test_both_passes_of_sam_see_the_same_mixed_batch():
    """One local step, against autograd with the draws of its stream."""
    (x, y), model = batch(), net()
    methods = [SAM(SAMParams(rho=0.3), WORK), begun(model, gamma=1.0)]
    data, settings = LocalData(x, y, lambda b: b), Train(batch_size=N, dtype="float64")
    result = local_round(
        model, data, methods, Affine(), SGD(), settings, seed=3, server_round=1, partition=0
    )

    ((x, y),) = batches(data, settings, (3, 1, 0))
    torch.manual_seed(seed_of("step", 3, 1, 0, 0))
    weight, order = weight_of(1.0, x), torch.randperm(N)
    mixed = weight * x + (1 - weight) * x[order]
    theirs = net()
    params = list(theirs.parameters())

    def mixed_loss():
        output = theirs(mixed)
        parts = cross_entropy(output, y), cross_entropy(output, y[order])
        return weight * parts[0] + (1 - weight) * parts[1]

    def gradient():
        return torch.autograd.grad(mixed_loss(), params)

    assert result.loss == pytest.approx(mixed_loss().item())
    start, first = [p.detach().clone() for p in params], gradient()
    norm = torch.cat([g.flatten() for g in first]).norm()
    for p, g in zip(params, first, strict=True):
        p.data += 0.3 * g / norm
    expected = [s - 0.1 * g for s, g in zip(start, gradient(), strict=True)]
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)


def test_bfloat16_autocast_mixes_in_float32():
    (x, y), model = batch(torch.float32), net().float()
    method = begun(model, gamma=1.0)
    torch.manual_seed(5)
    mixed, _ = method.transform(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(mixed)
        loss = cross_entropy(output, y) + method.data_term(mixed, output, y)
    assert mixed.dtype == loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gamma_0_is_the_plain_run_bit_for_bit(runner):
    plain = runner("run.rounds=1")
    neutral = runner("run.rounds=1", "regularizers=mixup", "mixup.gamma=0")
    active = runner("run.rounds=1", "regularizers=mixup")
    assert neutral.history_less_times == plain.history_less_times
    sha = "model_sha256"
    assert neutral.summary[sha] == plain.summary[sha] != active.summary[sha]
    assert active.code == 0


@pytest.mark.parametrize(
    ("value", "remedy"), [(-0.1, "at least 0"), (float("inf"), "finite"), ("much", "a number")]
)
def test_wrong_parameters_are_refused(value, remedy):
    with pytest.raises(ConfigError, match=rf"^mixup\.gamma = .*{remedy}"):
        resolve({"regularizers": "mixup", "mixup.gamma": value})
