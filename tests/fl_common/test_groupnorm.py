"""GroupNorm's own kernels: its numbers, and where they run.

Without a GPU, Triton's interpreter runs them, if Triton is installed.
"""

from __future__ import annotations

import importlib.util
import logging
import os

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from fl_common.models.catalogue import build
from fl_common.models.layers import GroupNorm

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
CARD = torch.cuda.is_available()
if not CARD:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

from fl_common.models import groupnorm  # noqa: E402

DEVICE = "cuda" if CARD else "cpu"
GPU = pytest.mark.skipif(not CARD, reason="needs a GPU")
CASES = [(3, 16, 8, 2), (2, 12, 5, 3), (5, 8, 1, 1), (2, 6, 7, 6), (2, 512, 4, 2), (1, 2, 3, 2)]
"""Samples, channels, side, groups."""


def case(samples: int, channels: int, side: int, dtype: torch.dtype, mean: float = 0.0):
    """x with channels innermost, weight, bias and the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x = (mean + draw(samples, channels, side, side)).contiguous(memory_format=torch.channels_last)
    tensors = [x, 1 + draw(channels), draw(channels)]
    return [t.requires_grad_() for t in tensors], draw(samples, channels, side, side)


def found(norm, tensors, dy):
    y = norm(*tensors)
    return [y, *torch.autograd.grad(y, tensors, dy)]


@pytest.mark.parametrize("tile", [8192, 64])
@pytest.mark.parametrize("dtype, mean, bound", [
    (torch.float32, 0, 1e-5), (torch.float32, 100, 1e-3), (torch.bfloat16, 0, 0.02),
])  # fmt: skip
@pytest.mark.parametrize("samples, channels, side, groups", CASES)
def test_numbers_are_those_of_torch_in_float64(
    samples, channels, side, groups, dtype, mean, bound, tile, monkeypatch
):
    monkeypatch.setattr(groupnorm, "TILE", tile)
    tensors, dy = case(samples, channels, side, dtype, mean)
    ours = found(lambda x, w, b: groupnorm.group_norm(x, groups, w, b, 1e-5), tensors, dy)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    theirs = found(lambda x, w, b: functional.group_norm(x, groups, w, b, 1e-5), wide, dy.double())
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        assert (one - other).norm() <= bound * other.norm()
    assert ours[0].stride() == ours[1].stride() == tensors[0].stride()


def test_a_gradient_with_channels_outermost_is_the_same_gradient():
    tensors, dy = case(3, 8, 5, torch.float32)
    inner = dy.contiguous(memory_format=torch.channels_last)
    for one, other in zip(
        *(found(lambda x, w, b: groupnorm.group_norm(x, 2, w, b, 1e-5), tensors, g)
          for g in (dy, inner)),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one, other)


def test_where_nothing_can_be_compiled_the_log_says_so(monkeypatch, caplog):
    def fails(*args):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(groupnorm, "group_norm", fails)
    with caplog.at_level(logging.WARNING):
        assert not groupnorm.compiles.__wrapped__(torch.device(DEVICE))
    assert "torch's run: Failed to find C compiler." in caplog.text


def test_a_full_card_is_no_reason_to_go_without_them(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(groupnorm, "group_norm", fails)
    with pytest.raises(torch.OutOfMemoryError):
        groupnorm.compiles.__wrapped__(torch.device(DEVICE))


def ours(y: torch.Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_GroupNormBackward"


@GPU
def test_maps_with_channels_innermost_have_them_in_training(monkeypatch):
    (x, *_), _ = case(4, 8, 6, torch.bfloat16)
    norm = GroupNorm(2, 8).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert ours(norm(x))
        assert not ours(norm(x.contiguous()))
        monkeypatch.setattr(groupnorm, "compiles", lambda device: False)
        assert not ours(norm(x))
    monkeypatch.undo()
    assert ours(norm(x.float()))
    assert not ours(norm.double()(x.double()))
    norm = norm.float().eval()
    y = norm(x.float())
    assert not ours(y)
    first = torch.autograd.grad(y.square().sum(), norm.weight, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), norm.weight)[0].abs().sum() > 0


@GPU
def test_several_clients_at_once_have_torchs():
    nets = [GroupNorm(2, 8).to(DEVICE) for _ in range(3)]
    params, buffers = stack_module_state(nets)
    x = torch.randn(3, 4, 8, 6, 6, device=DEVICE)
    x = torch.stack([each.contiguous(memory_format=torch.channels_last) for each in x])
    y = vmap(lambda p, b, x: functional_call(nets[0], (p, b), (x,)))(params, buffers, x)
    alone = torch.stack([net(each) for net, each in zip(nets, x, strict=True)])
    assert torch.allclose(y, alone, atol=1e-5)


@GPU
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_networks_gradient(dtype, bound, monkeypatch):
    torch.manual_seed(0)
    net = build("resnet8", classes=10, shape=(3, 32, 32), norm="group").to(DEVICE).train()
    net = net.to(memory_format=torch.channels_last)
    x = torch.randn(16, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def gradient() -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = net(x).float().square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())])

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        kernels, again = gradient(), gradient()
        monkeypatch.setattr(groupnorm, "compiles", lambda device: False)
        torchs = gradient()
    assert torch.equal(kernels, again)
    assert 0 < (kernels - torchs).norm() <= bound * torchs.norm()
