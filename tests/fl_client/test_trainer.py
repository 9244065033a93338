"""One local round: its order of operations, its randomness, its hooks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from fl_client import trainer
from fl_client.optimizers import SGD, Adam
from fl_client.trainer import LocalData, batches, local_round
from fl_common.config import NoParams, Train
from fl_common.data.transforms import pipeline
from fl_common.local import Affine, Perturbation, Work, correction_of
from regularizers.base import METHODS, Regularizer
from regularizers.proximal import Proximal, ProximalParams
from strategies.fedsam import MoFedSAMParams, MoFedSAMRule

N, FEATURES, CLASSES = 13, 6, 3
WORK = Work(omega=1.0, steps=1, lr=0.1, nominal_steps=1, base_lr=0.1)


@pytest.fixture(autouse=True)
def _registry_as_it_was():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def data(transform=lambda x: x, draws: int = 0) -> LocalData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, FEATURES, generator=generator)
    return LocalData(x, torch.randint(CLASSES, (N,), generator=generator), transform, draws)


def net(dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 8),
        torch.nn.ReLU(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(8, CLASSES),
    )


def play(model, settings, *, methods=(), correction=None, local=None, partition=2, server_round=3):
    return local_round(
        model,
        local or data(),
        methods,
        correction or Affine(),
        SGD(settings.momentum, nesterov=settings.nesterov, weight_decay=settings.weight_decay),
        settings,
        seed=5,
        server_round=server_round,
        partition=partition,
    )


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_is_torchs_own_loop():
    """Against backward, clip_grad_norm_ and torch.optim.SGD over the same batches."""
    settings = Train(
        lr=0.2, lr_decay=0.5, momentum=0.9, nesterov=True, weight_decay=0.01, clip_norm=0.3,
        epochs=3, batch_size=4,
    )  # fmt: skip
    ours, theirs = net(), net()
    result = play(ours, settings)

    optimizer = torch.optim.SGD(
        theirs.parameters(), lr=0.2 * 0.5**2, momentum=0.9, nesterov=True, weight_decay=0.01
    )
    losses = []
    for x, y in batches(data(), settings, (5, 3, 2)):
        optimizer.zero_grad()
        loss = cross_entropy(theirs(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        optimizer.step()
        losses.append(loss.item() * len(y))
    torch.testing.assert_close(weights(ours), weights(theirs))
    assert result.steps == 3 * 4
    assert result.loss == pytest.approx(sum(losses) / (3 * N))
    assert all(p.grad is None for p in ours.parameters())


def test_every_epoch_sees_every_sample_once_in_its_own_order():
    settings = Train(epochs=2, batch_size=4)
    local = LocalData(torch.arange(N), torch.arange(N), lambda x: x)
    seen = [x for x, _ in batches(local, settings, (0, 1, 2))]
    assert [len(x) for x in seen] == [4, 4, 4, 1] * 2
    first, second = torch.cat(seen[:4]).tolist(), torch.cat(seen[4:]).tolist()
    assert sorted(first) == sorted(second) == list(range(N))
    assert first != second
    for key in [(1, 1, 2), (0, 2, 2), (0, 1, 3)]:
        assert next(iter(batches(local, settings, key)))[0].tolist() != first[:4]


@pytest.mark.parametrize("name", ["crop-flip", "none"])
def test_batches_do_not_depend_on_how_many_are_made_at_once(monkeypatch, name: str):
    settings, recipe = Train(epochs=2, batch_size=4), pipeline("cifar10", name)
    x = torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8)
    local = LocalData(x, torch.arange(N), recipe.train, recipe.draws)
    found = {}
    for some in (1, 8 * 3 * 32 * 32, trainer.AT_ONCE):  # one, two, and all batches
        monkeypatch.setattr(trainer, "AT_ONCE", some)
        found[some] = list(batches(local, settings, (0, 1, 2)))
    one, *others = found.values()
    assert [len(y) for _, y in one] == [4, 4, 4, 1] * 2
    for other in others:
        for (x_a, y_a), (x_b, y_b) in zip(one, other, strict=True):
            assert torch.equal(x_a, x_b) and torch.equal(y_a, y_b)


def test_randomness_belongs_to_seed_round_partition_and_step():
    """Dropout and augmentation: the same whatever was drawn before, other for other clients."""

    def noisy(x, u):
        return x + u

    settings = Train(epochs=2, batch_size=4)
    results = []
    for partition, server_round in [(2, 3), (2, 3), (1, 3), (2, 4)]:
        torch.rand(len(results))  # who draws elsewhere changes nothing
        model = net(dropout=0.5)
        play(
            model,
            settings,
            local=data(noisy, draws=1),
            partition=partition,
            server_round=server_round,
        )
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


def test_hooks_in_order_and_only_those_that_are_overridden():
    calls: list[str] = []

    class Recording(Regularizer):
        name = "recording"
        Params = NoParams

        def transform(self, x, y):
            calls.append("transform")
            return 2 * x, y

        def data_term(self, x, output, y):
            calls.append("data_term")
            assert output.requires_grad
            assert len(x) == len(y) == N
            return 0.5 * (output**2).mean()

    class Idle(Regularizer):
        name = "idle"
        Params = NoParams

    settings = Train(batch_size=N)
    ours, theirs = net(), net()
    result = play(ours, settings, methods=[Recording(NoParams(), WORK), Idle(NoParams(), WORK)])
    assert calls == ["transform", "data_term"]

    (x, y), = batches(data(), settings, (5, 3, 2))  # fmt: skip
    output = theirs(2 * x)
    loss = cross_entropy(output, y)
    assert result.loss == pytest.approx(loss.item())  # without the term
    (loss + 0.5 * (output**2).mean()).backward()
    for p in theirs.parameters():
        p.data -= settings.lr * p.grad
    torch.testing.assert_close(weights(ours), weights(theirs))


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e9])
def test_closed_form_terms_are_clipped_and_decay_is_not(clip):
    """g <- clip(2 g + 0.1 theta + c) + (0.2 + wd) theta, whoever adds the terms."""
    settings = Train(batch_size=N, clip_norm=clip, weight_decay=0.3)
    ours, theirs = net(), net()
    constant = torch.linspace(-1, 1, len(weights(ours)))
    terms = Affine(constant=constant, slope=0.1, scale=2.0, decay=0.2)
    play(ours, settings, correction=terms)

    (x, y), = batches(data(), settings, (5, 3, 2))  # fmt: skip
    theta = weights(theirs)
    cross_entropy(theirs(x), y).backward()
    gradient = 2 * torch.cat([p.grad.flatten() for p in theirs.parameters()])
    gradient = gradient + 0.1 * theta + constant
    if clip:
        gradient *= min(1.0, clip / (gradient.norm() + 1e-6))
    expected = theta - settings.lr * (gradient + (0.2 + 0.3) * theta)
    torch.testing.assert_close(weights(ours), expected)


def test_what_has_no_gradient_is_not_moved_by_a_pull():
    """Adam would make a whole step of a rounding error of mu theta - mu w."""
    model, whole, settings = net(), data(), Train(optimizer="adam", batch_size=4, epochs=3)
    whole.x[:, 0] = 0.0  # a feature that this client does not have
    before = model[0].weight.detach().clone()
    local_round(
        model, whole, (), Affine.pull(0.1, weights(model)), Adam(), settings,
        seed=5, server_round=3, partition=2,
    )  # fmt: skip
    assert torch.equal(model[0].weight[:, 0], before[:, 0])
    assert not torch.equal(model[0].weight[:, 1:], before[:, 1:])


def test_a_gradient_that_two_parameters_share_is_each_ones_own():
    """As autograd gives it to views that are added up, be they put together of several."""
    one, other, part, rest = (
        torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (2, 3), (4,), (2,))
    )
    whole = one.view(6) + other.view(6) + torch.cat([part, rest])
    (whole * torch.arange(6.0)).sum().backward()
    assert one.grad.data_ptr() == other.grad.data_ptr() == part.grad.data_ptr()
    assert rest.grad.data_ptr() == part.grad.data_ptr() + part.nbytes
    grads = trainer.taken_gradients([rest, one, other, part])
    torch._foreach_mul_(grads, 2.0)
    assert grads.pop(0).tolist() == [8, 10]
    assert grads.pop().tolist() == [0, 2, 4, 6]
    assert all(grad.flatten().tolist() == [0, 2, 4, 6, 8, 10] for grad in grads)


def test_terms_add_up_in_their_order():
    first = Affine(constant=torch.tensor([1.0]), slope=2.0, scale=3.0, decay=4.0)
    second = Affine(constant=torch.tensor([10.0]), slope=20.0, scale=0.5, decay=40.0)
    both = first.then(second)
    assert (both.constant, both.slope, both.scale) == (torch.tensor([10.5]), 21.0, 1.5)
    assert both.decay == 44.0
    assert Affine.pull(0.0, torch.ones(3)) is None


def test_the_strategy_scales_what_regularizers_add():
    """MoFedSAM beside a proximal term: beta (grad + mu (theta - w)) + (1 - beta) m."""
    rule = MoFedSAMRule(MoFedSAMParams(beta=0.25), WORK)
    proximal = Proximal(ProximalParams(mu=2.0), WORK)
    sent = {"params": torch.tensor([3.0]), "m": torch.tensor([8.0])}
    both = correction_of([rule, proximal], sent, {})
    assert (both.scale, both.slope, both.constant) == (0.25, 0.5, torch.tensor([-1.5 + 6.0]))


def test_a_second_pass_repeats_the_draws_and_leaves_statistics_alone():
    """rho so small that both passes see the same parameters: their gradients are equal."""
    seen = []

    class Watching(Perturbation):
        def apply(self, params, grads):
            self.before = [g.clone() for g in grads]
            super().apply(params, grads)

        def mix(self, grads):
            seen.append(all(map(torch.equal, self.before, grads)))

    class Twice(Regularizer):
        name = "twice"
        Params = NoParams

        def perturbation(self):
            return Watching(rho=1e-30)

    def with_norm():
        model = net(dropout=0.5)
        return torch.nn.Sequential(torch.nn.BatchNorm1d(FEATURES), *model)

    settings = Train(batch_size=5, epochs=2)
    ours, theirs = with_norm(), with_norm()
    play(ours, settings, methods=[Twice(NoParams(), WORK)])
    play(theirs, settings)
    assert seen == [True] * 6
    for mine, plain in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, plain)
    assert ours[0].num_batches_tracked == 6


def test_bfloat16_keeps_float32_parameters():
    model = net()
    play(model, Train(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.isfinite(weights(model)).all()


def test_a_network_with_a_loss_is_trained_on_it():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(FEATURES))

        def forward(self, x):
            return x @ self.w

        def loss(self, output, y):
            return ((output - y) ** 2).mean()

    model = Own()
    local = data()
    play(model, Train(batch_size=N, lr=0.1))
    gradient = -2 * (local.y.float()[:, None] * local.x).mean(0)
    torch.testing.assert_close(model.w.detach(), -0.1 * gradient)


def test_a_norm_of_one_sample_says_what_helps():
    """13 samples in batches of 4 end with one; 13 in batches of 5 do not."""
    model = net()
    model.insert(1, torch.nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match=r"the last of 13 in batches of 4; set another train\.b"):
        play(model, Train(batch_size=4))
    assert play(model, Train(batch_size=5)).steps == 3


def test_another_error_at_one_sample_stays_as_it_is():
    class Refusing(torch.nn.Linear):
        def forward(self, x):
            if len(x) == 1:
                raise ValueError("one is too few")
            return super().forward(x)

    with pytest.raises(ValueError, match=r"^one is too few$"):
        play(Refusing(FEATURES, CLASSES), Train(batch_size=4))
