"""Networks of at most 200 parameters, their data, and their exact Hessians."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from fl_flatness.products import Curvature, cut

Y = torch.randint(3, (13,), generator=torch.Generator().manual_seed(2))


def images(n: int = 13, side: int = 4) -> torch.Tensor:
    return torch.randn(n, 1, side, side, dtype=torch.float64, generator=generator())


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


def relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))


def group_norm() -> nn.Module:
    norm = nn.GroupNorm(2, 4)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3)
    )


def batch_norm() -> nn.Module:
    """With running statistics that are not the batch's, and a dropout that must be silent."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean.fill_(0.1)
    norm.running_var.fill_(1.5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(16, 3)
    )


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


class OnceCube(Cube):
    """torch takes its gradient for a constant."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Cube.backward))


class Activated(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(16, 5), nn.Linear(5, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x.flatten(1))))


def made(factory=mlp) -> nn.Module:
    torch.manual_seed(0)
    return factory().double()


def exact_hessian(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(d, d) of the mean cross-entropy over all samples at once, by torch.func."""
    training, _ = net.training, net.eval()
    named = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]

    def loss(theta: torch.Tensor) -> torch.Tensor:
        parts = zip(named.items(), theta.split(sizes), strict=True)
        values = {name: part.view(p.shape) for (name, p), part in parts}
        return cross_entropy(torch.func.functional_call(net, values, (x,)), y)

    with sdpa_kernel(SDPBackend.MATH):
        found = torch.func.hessian(loss)(torch.cat([p.flatten() for p in named.values()]))
    net.train(training)
    return found


class Attention(nn.Module):
    """Every row of an image looks at all four."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Linear(4, 12), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.fc(nn.functional.scaled_dot_product_attention(q, k, v).flatten(1))


NETS = [mlp, relu_mlp, group_norm, batch_norm, Attention]


class Quadratic(nn.Module):
    """Its loss is theta^T A theta / 2, whatever the data: the Hessian is A."""

    def __init__(self, *diagonal: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(len(diagonal), dtype=torch.float64))
        self.a = torch.tensor(diagonal, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a * self.theta**2).sum() / 2

    def loss(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return output


def quadratic(*diagonal: float) -> Curvature:
    return Curvature(Quadratic(*diagonal), [(torch.zeros(1), torch.zeros(1))])


def curvature_of(factory=mlp, batch_size: int = 7) -> tuple[Curvature, torch.Tensor]:
    """Of the mean loss of 13 samples, and the exact Hessian (d, d)."""
    net, x = made(factory), images()
    return Curvature(net, cut(x, Y, batch_size)), exact_hessian(net, x, Y)
