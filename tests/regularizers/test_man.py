"""MAN: its value, its gradient, where it looks, when it is silent, and what it is for."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fl_client.optimizers import SGD
from fl_client.trainer import LocalData, local_round
from fl_common.config import ConfigError, Train, resolve
from fl_common.local import Affine, Work
from fl_common.models.catalogue import build
from fl_common.passes import extra_pass
from regularizers.man import MAN, MANParams
from regularizers.sam import SAM, SAMParams

WORK = Work(omega=1.0, steps=1, lr=0.1, nominal_steps=1, base_lr=0.1)
Y = torch.tensor([0, 1, 2, 1])


def begun(net: nn.Module, **params) -> MAN:
    man = MAN(MANParams(**params), WORK)
    man.begin(net, {}, {})
    return man


def term(net: nn.Module, x: torch.Tensor, **params) -> torch.Tensor:
    """(zeta / 2) R of one pass."""
    man = begun(net, **params)
    output = net(x)
    value = man.data_term(x, output, Y)
    man.finish()
    return value


def mlp(seed: int = 0, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    relus = nn.ReLU(inplace), nn.ReLU(inplace)
    return nn.Sequential(
        nn.Linear(5, 6), relus[0], nn.Linear(6, 4), relus[1], nn.Linear(4, 3)
    ).double()


def samples(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_value_and_gradient_of_one_relu_layer():
    """x = (1, 2), W = diag(1, -1): A = relu(1, -2) = (1, 0), R = 1/2 and (0.15 / 2) R = 0.0375;
    d/dW = (zeta / m) A x^T, with m = 2, where the ReLU is open."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    net[0].weight.data = torch.diag(torch.tensor([1.0, -1.0]))
    man = begun(net)
    x = torch.tensor([[1.0, 2.0]])
    output = net(x)
    value = man.data_term(x, output, Y)
    assert value.item() == pytest.approx(0.0375)
    assert not value.requires_grad
    (0 * output.sum() + value).backward()
    torch.testing.assert_close(net[0].weight.grad, torch.tensor([[0.075, 0.15], [0, 0]]))


def test_duplicated_samples_change_nothing_and_the_scale_counts_squared():
    net, x = mlp(), samples()
    value = term(net, x)
    torch.testing.assert_close(term(net, torch.cat([x, x])), value)
    for p in net[:2].parameters():  # A_1 scaled by 3, and A_2 by its layer without bias
        p.data *= 3
    net[2].bias.data.zero_()
    scaled = term(net, x)
    for p in net[:2].parameters():
        p.data /= 3
    torch.testing.assert_close(scaled, 9 * term(net, x))


@pytest.mark.parametrize("layer_reduce", ["sum", "mean"])
@pytest.mark.parametrize("reduce", ["mean", "per-sample-sum", "fro"])
@pytest.mark.parametrize("site", ["post-act", "layer-input", "pre-act"])
@pytest.mark.parametrize("include_logits", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_is_that_of_the_penalty_written_out(
    site, reduce, layer_reduce, include_logits, inplace
):
    net, x = mlp(), samples()
    h1 = net[0](x)
    a1 = h1.relu()
    h2 = net[2](a1)
    a2 = h2.relu()
    output = net[4](a2)
    acts = [h1, h2] if site == "pre-act" else [a1, a2]  # a1, a2 are the inputs of layers 2, 3 too
    acts += [output] if include_logits else []
    one = {
        "mean": lambda a: (a**2).mean(),
        "per-sample-sum": lambda a: (a**2).sum() / 4,
        "fro": lambda a: torch.sqrt((a**2).sum()),
    }[reduce]
    penalty = 0.7 / 2 * sum(map(one, acts)) / (len(acts) if layer_reduce == "mean" else 1)
    (cross_entropy(output, Y) + penalty).backward()
    expected = gradients(net)

    net = mlp(inplace=inplace)
    man = begun(
        net, zeta=0.7, site=site, reduce=reduce, layer_reduce=layer_reduce,
        include_logits=include_logits,
    )  # fmt: skip
    output = net(x)
    value = man.data_term(x, output, Y)
    (cross_entropy(output, Y) + value).backward()
    torch.testing.assert_close(value, penalty.detach())
    torch.testing.assert_close(gradients(net), expected)


@pytest.mark.parametrize("name", ["lenet64", "resnet8", "digits-cnn"])
def test_gradient_in_models_of_the_catalogue(name):
    torch.manual_seed(0)
    net = build(name, classes=3, shape=(3, 32, 32)).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    seen = []
    hooks = [
        module.register_forward_hook(lambda m, args, output: seen.append(output))
        for module in net.modules()
        if isinstance(module, nn.ReLU)
    ]
    output = net(x)
    penalty = 0.15 / 2 * sum((a**2).mean() for a in seen)
    expected = torch.autograd.grad(cross_entropy(output, Y) + penalty, list(net.parameters()))
    for hook in hooks:
        hook.remove()

    man = begun(net)
    output = net(x)
    value = man.data_term(x, output, Y)
    (cross_entropy(output, Y) + value).backward()
    torch.testing.assert_close(value, penalty.detach())
    torch.testing.assert_close(gradients(net), torch.cat([g.flatten() for g in expected]))


@pytest.mark.parametrize(
    ("name", "side", "site", "count"),
    [
        ("lenet64", 32, "post-act", 4),  # conv1, conv2, fc1, fc2
        ("lenet64", 32, "layer-input", 4),  # five layers but the first
        ("tiny-convnet", 64, "post-act", 5),  # conv1-3, fc1, fc2
        ("resnet8", 32, "post-act", 7),  # stem, and two in each of three blocks
        ("resnet8", 32, "layer-input", 9),  # two and the shortcut in blocks 2 and 3, fc
        ("resnet56-bottleneck", 32, "post-act", 55),  # stem, and three in each of 18 blocks
    ],
)
def test_number_of_sites(name, side, site, count):
    norm = "group" if name == "tiny-convnet" else "batch"
    with torch.device("meta"):
        net = build(name, classes=3, shape=(3, side, side), norm=norm)
        man = begun(net, site=site)
        net(torch.zeros(2, 3, side, side))
    assert len(man.seen) == count


def test_a_relu_that_is_used_twice_is_two_sites():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.relu = nn.Linear(5, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.relu(self.second(self.relu(self.first(x))))

    torch.manual_seed(0)
    net, x = Twice().double(), samples()
    a1 = net.first(x).relu()
    a2 = net.second(a1).relu()
    expected = 0.15 / 2 * ((a1**2).mean() + (a2**2).mean())
    torch.testing.assert_close(term(net, x), expected.detach())


def test_only_the_steps_own_pass_counts():
    """Teacher passes (no gradient), evaluation, extra passes, passes after the round."""
    net, x = mlp(), samples()
    expected = term(net, x)
    man = begun(net)
    output = net(x)
    with torch.no_grad():
        net(x)
    net.eval()
    net(x)
    net.train()
    with extra_pass():
        with extra_pass():
            net(x)
        net(2 * x).sum().backward()
    without = mlp()
    without(2 * x).sum().backward()
    assert torch.equal(gradients(net), gradients(without))
    assert torch.equal(man.data_term(x, output, Y), expected)
    man.finish()
    net(x)
    assert man.seen == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_no_activation_outlives_its_step():
    """No cycle of references, which would wait for the collector."""
    net, x = mlp(), samples(7)

    def alive() -> int:
        tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
        return sum(tensor.shape[:1] == (7,) for tensor in tensors)

    man = begun(net)
    before = alive()
    gc.disable()
    try:
        output = net(x)
        loss = output.sum() + man.data_term(x, output, Y)
        loss.backward()
        assert alive() > before
        del output, loss
        assert alive() == before
    finally:
        gc.enable()


def play(net, x, y, *methods, **train) -> float:
    for method in methods:
        method.begin(net, {}, {})
    data = LocalData(x, y, lambda batch: batch)
    result = local_round(
        net, data, methods, Affine(), SGD(), Train(batch_size=len(y), **train),
        seed=0, server_round=1, partition=0,
    )  # fmt: skip
    for method in methods:
        method.finish()
    return result.loss


def test_it_is_in_both_passes_of_sam_and_not_in_the_reported_loss():
    """theta - lr grad F(theta + rho grad F / ||grad F||), F = CE + (zeta / 2) R by autograd."""
    net, x = mlp(), samples()

    def objective():
        a1 = net[0](x).relu()
        a2 = net[2](a1).relu()
        return cross_entropy(net[4](a2), Y) + 0.15 / 2 * ((a1**2).mean() + (a2**2).mean())

    params = list(net.parameters())
    start = [p.detach().clone() for p in params]
    plain = cross_entropy(net(x), Y).item()
    first = torch.autograd.grad(objective(), params)
    norm = torch.cat([g.flatten() for g in first]).norm()
    for p, g in zip(params, first, strict=True):
        p.data += 0.3 * g / norm
    second = torch.autograd.grad(objective(), params)
    expected = [s - 0.1 * g for s, g in zip(start, second, strict=True)]

    ours = mlp()
    loss = play(
        ours, x, Y, SAM(SAMParams(rho=0.3), WORK), MAN(MANParams(), WORK),
        lr=0.1, dtype="float64",
    )  # fmt: skip
    torch.testing.assert_close(list(ours.parameters()), expected, check_dtype=True)
    assert loss == pytest.approx(plain)


def test_bfloat16_activations_are_summed_in_float32():
    torch.manual_seed(0)
    net = build("digits-cnn", classes=3, shape=(1, 32, 32))
    x = torch.randn(4, 1, 32, 32)
    man, acts = begun(net), []
    for relu in (net.relu1, net.relu2):
        relu.register_forward_hook(lambda m, args, output: acts.append(output.detach()))
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x)
        value = man.data_term(x, output, Y)
        loss = cross_entropy(output, Y) + value
    assert acts[0].dtype == torch.bfloat16
    assert value.dtype == torch.float32
    exact = 0.15 / 2 * sum((a.double() ** 2).mean() for a in acts)
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)  # bfloat16: 4e-3
    loss.backward()
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}


def test_frozen_layers_have_no_site():
    net, x = mlp(), samples()
    net[0].requires_grad_(False)
    a2 = net[2](net[0](x).relu()).relu()
    torch.testing.assert_close(term(net, x), 0.15 / 2 * (a2**2).mean().detach())
    net.requires_grad_(False)
    assert term(net, x) == 0


def test_curvature_of_a_layer_is_the_norm_of_its_input():
    """Why it works: with input a, H_W = (a a^T) x G with G = d2 loss / dz2, so that
    lambda_max(H_W) = ||a||^2 lambda_max(G), plus a 1 for the bias; ||a||^2 is MAN's term."""
    net, x = mlp(), samples(1)
    y = Y[:1]
    a = net[:4](x).detach()
    norm = term(nn.Sequential(net[2:4]), net[:2](x).detach(), zeta=2.0, reduce="per-sample-sum")
    torch.testing.assert_close(norm, (a**2).sum())

    def loss_of(z):
        return cross_entropy(z, y)

    last = net[4]
    hessian = torch.func.hessian(
        lambda w: loss_of(a @ w[:, :4].T + w[:, 4:].T)
    )(torch.cat([last.weight, last.bias[:, None]], 1).detach())  # fmt: skip
    g = torch.func.hessian(lambda z: loss_of(z[None]))(net(x)[0].detach())
    top = torch.linalg.eigvalsh(hessian.reshape(15, 15))[-1]
    torch.testing.assert_close(top, (norm + 1) * torch.linalg.eigvalsh(g)[-1])


def test_lowers_the_top_eigenvalue_of_the_hessian_at_equal_training_loss():
    """The same net, data and loss of 0.3 with and without MAN, five seeds: lower in all of them,
    which chance gives once in 2^5 = 32 times."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data[:200] / 16)
    x, y = x - x.mean(0), torch.tensor(digits.target[:200])

    def trained(seed: int, zeta: float) -> nn.Module:
        torch.manual_seed(seed)
        widths = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
        net = nn.Sequential(*widths).double()
        params, man = list(net.parameters()), begun(net, zeta=zeta)
        for _ in range(1000):
            output = net(x)
            loss = cross_entropy(output, y)
            if loss < 0.3:
                man.finish()
                return net
            gradient = torch.autograd.grad(loss + man.data_term(x, output, y), params)
            with torch.no_grad():
                torch._foreach_add_(params, gradient, alpha=-0.2)
        raise AssertionError("not trained")

    def top_eigenvalue(net: nn.Module) -> float:
        params = list(net.parameters())
        gradient = torch.autograd.grad(cross_entropy(net(x), y), params, create_graph=True)
        v = [torch.randn_like(p) for p in params]
        for _ in range(50):
            norm = torch.cat([part.flatten() for part in v]).norm()
            v = [part / norm for part in v]
            hv = torch.autograd.grad(gradient, params, v, retain_graph=True)
            value = sum((a * b).sum() for a, b in zip(v, hv, strict=True))
            v = hv
        return float(value)

    for seed in range(5):
        plain, flat = top_eigenvalue(trained(seed, 0.0)), top_eigenvalue(trained(seed, 0.15))
        assert flat < 0.9 * plain  # measured: 0.55 to 0.70


def test_without_weight_it_is_the_plain_run_bit_for_bit(runner):
    plain = runner("run.rounds=1")
    neutral = runner("run.rounds=1", "regularizers=man", "man.zeta=0", "man.include-logits=true")
    active = runner("run.rounds=1", "regularizers=man")
    assert neutral.history_less_times == plain.history_less_times
    sha = "model_sha256"
    assert neutral.summary[sha] == plain.summary[sha] != active.summary[sha]
    assert active.code == 0


def test_nothing_is_touched_without_weight():
    """0 times an infinite activation would be NaN."""
    net = mlp()
    man = begun(net, zeta=0.0)
    output = net(samples() * torch.inf)
    assert man.data_term(samples(), output, Y) == 0.0
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("man.zeta", -0.1, "at least 0"),
        ("man.zeta", float("nan"), "finite"),
        ("man.site", "post", "did you mean post-act"),
        ("man.reduce", "per-sample", "per-sample-sum"),
        ("man.layer-reduce", "max", "sum, mean"),
    ],
)
def test_wrong_parameters_are_refused(key, value, remedy):
    with pytest.raises(ConfigError, match=f"^{key} = .*{remedy}"):
        resolve({"regularizers": "man", key: value})


def test_a_network_without_sites_is_refused(tmp_path, monkeypatch, runner):
    (tmp_path / "smooth.py").write_text(
        "from torch import nn\n"
        "def Net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, classes))"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"model.name": "smooth:Net", "regularizers": "man"}
    with pytest.raises(ConfigError, match=r"^regularizers = .*set man\.site=layer-input"):
        resolve(own)
    assert resolve(own | {"man.site": "layer-input"})
    # Seen when it is built, if it cannot be before.
    monkeypatch.setattr("regularizers.man.skeleton", lambda config: None)
    refused = runner("run.rounds=1", *(f"{key}={value}" for key, value in own.items()))
    assert refused.code == 3
    assert "set man.site=layer-input" in refused.summary["error"]


@pytest.mark.parametrize(
    ("regularizers", "logits", "told"),
    [("man, moon", True, 1), ("man, moon", False, 0), ("man", True, 0)],
)
def test_two_pulls_at_the_output_are_told(regularizers, logits, told):
    settings = {"regularizers": regularizers, "model.head": "moon", "man.include-logits": logits}
    assert len(MAN.warnings(resolve(settings))) == told
