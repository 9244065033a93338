"""Networks at reduced width, against networks that are that narrow."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fl_common.models.convnets import _lenet
from fl_common.models.resnet import BasicBlock, Bottleneck, _resnet
from fl_common.slim import Slim, flattened, kept
from fl_common.stage import last_stage
from tests.nets import SHAPE, model


def images(batch: int = 4, shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *shape, generator=generator, dtype=dtype)


def corner(narrow: nn.Module, full: nn.Module) -> nn.Module:
    """`narrow` with the first channels of every tensor of `full`, wherever both have it."""
    tensors = full.state_dict()
    for name, tensor in narrow.state_dict().items():
        if tensor.dim():
            tensor.copy_(tensors[name][tuple(slice(n) for n in tensor.shape)])
    return narrow.train()


def whole(net: nn.Module) -> Slim:
    modules = list(flattened(net.children()))
    return Slim(modules, whole=modules[-1])


@pytest.mark.parametrize(
    ("omega", "table"),
    [
        (0.8, {16: 16, 32: 24, 64: 48, 128: 104, 256: 208, 512: 408, 6: 6}),
        (0.25, {64: 16, 128: 32, 256: 64, 512: 128, 6: 6, 16: 8}),
        (1.0, {6: 6, 10: 10, 84: 84, 100: 100}),
    ],
)
def test_widths(omega, table):
    """m(0.8 * 512): floor((409.6 + 4) / 8) * 8 = 408 >= 0.9 * 409.6; m(0.8 * 6): 8, of 6."""
    assert {channels: kept(omega * channels, channels) for channels in table} == table


def test_a_width_is_never_less_than_nine_tenths_of_what_is_asked():
    # floor((12 - 0.1 + 4) / 8) * 8 = 8 < 0.9 * 11.9, so one step more
    assert kept(11.9, 100) == 16
    assert kept(8.8, 100) == 8
    assert kept(0.3, 100) == 1  # max(1, 0), and 1 >= 0.27


HALF = {
    "resnet8": lambda: _resnet(SHAPE, 10, "batch", (32, 64, 128), (1, 1, 1), imagenet=True),
    "resnet20": lambda: _resnet(SHAPE, 10, "batch", (8, 16, 32), (3, 3, 3), shortcut="A"),
    "resnet56-bottleneck": lambda: _resnet(
        SHAPE, 10, "batch", (8, 16, 32), (6, 6, 6), block=Bottleneck
    ),
    "lenet64": lambda: _lenet(SHAPE, 10, (32, 32), (192, 96)),
}


@pytest.mark.parametrize("name", HALF)
def test_half_width_is_a_network_of_half_the_channels(name):
    full = model(name).double()
    narrow = corner(HALF[name]().double(), full)
    x = images(dtype=torch.float64)
    slim, expected = whole(full)(x, 0.5), narrow(x)
    assert torch.allclose(slim, expected, rtol=1e-9, atol=1e-11)

    slim.square().mean().backward()
    expected.square().mean().backward()
    for (key, p), q in zip(full.named_parameters(), narrow.parameters(), strict=True):
        part = tuple(slice(n) for n in q.shape)
        assert torch.allclose(p.grad[part], q.grad, rtol=1e-6, atol=1e-10), key
        p.grad[part] = 0
        assert not p.grad.any(), key  # nothing outside


def test_last_stage_at_the_published_width():
    """104 of 128 channels in, 208 of 256 out; both for ResNet-8 and for FedAlign's ResNet-56."""
    x = images(shape=(128, 8, 8))[:, :104]
    stage = model("resnet8").stages[-1]
    narrow = corner(BasicBlock(104, 208, 2, "batch", "B"), stage[0])
    assert torch.equal(Slim([stage])(x, 0.8), narrow(x))
    y = last_stage(model("resnet56-bottleneck")).slim(x, 0.8)
    assert y.shape == (4, 208, 4, 4)


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet56-bottleneck", "lenet64", "mlp"])
def test_full_width_is_the_network_itself_bit_for_bit(name):
    net = model(name)
    assert torch.equal(whole(net)(images(), 1.0), net(images()))


def test_full_width_with_group_norm():
    net = model("resnet8", norm="group")
    assert torch.equal(whole(net)(images(), 1.0), net(images()))


def test_group_norm_keeps_whole_groups_of_the_same_size():
    """m(0.8 * 32) = 24 is three of the four groups of 8; m(0.8 * 64) = 48 is one of two of 32,
    because a second one would be 64; at least one group stays."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32)
    nn.init.normal_(norm.weight)
    x = images()
    expected = functional.group_norm(
        functional.conv2d(x, conv.weight[:24], conv.bias[:24]), 3, norm.weight[:24], norm.bias[:24]
    )
    assert torch.equal(Slim([conv, nn.Sequential(norm)])(x, 0.8), expected)
    # the channels of a group see each other alone: what is left is as it was
    assert torch.allclose(expected, norm(conv(x))[:, :24], atol=1e-6)

    two = Slim([nn.Conv2d(3, 64, 3), nn.ReLU(), nn.GroupNorm(2, 64)])
    assert two(x, 0.8).shape[1] == 32 == two(x, 0.1).shape[1]
    net = model("resnet8", norm="group")
    assert whole(net)(x, 0.8).shape == (4, 10)


def test_running_statistics_and_modules_stay_as_they_are():
    net = model("resnet8")
    net(images())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    whole(net)(images(), 0.5)
    last_stage(net).slim(images(shape=(104, 4, 4)), 0.8)
    assert net.training
    assert list(before) == list(net.state_dict())
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_statistics_are_the_batchs_own():
    norm = nn.BatchNorm2d(4).eval()
    norm.running_mean.fill_(100)
    y = Slim([norm])(images(shape=(4, 5, 5)), 1.0)
    assert y.mean((0, 2, 3)).abs().max() < 1e-5
    assert (y.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


def test_one_value_per_channel_gives_the_bias():
    """(x - mean) is 0; torch's own layer refuses that."""
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.bias)
    y = Slim([norm])(images(1, shape=(4, 1, 1)), 1.0)
    assert torch.allclose(y.flatten(), norm.bias, atol=1e-3)


def test_a_block_without_its_residual_is_its_shortcut():
    for name, channels in (("resnet8", 104), ("resnet20", 24)):
        block = model(name).stages[-1][0]
        x = images(shape=(channels, 8, 8))
        whole_block = Slim([block])(x, 0.8)
        block.dropped = True
        y = Slim([block])(x, 0.8)
        assert y.shape == whole_block.shape
        assert not torch.equal(y, whole_block)
        if name == "resnet20":  # the shortcut adds zero channels
            assert torch.equal(y[:, :24], x[:, :, ::2, ::2].relu())
            assert not y[:, 24:].any()


def test_whether_anything_shrinks():
    net = model("lenet")
    assert whole(net).shrinks(0.8)  # 120 -> 96
    assert not Slim([net.conv1, net.conv2]).shrinks(0.8)  # 6 -> 6, 16 -> 16
    assert Slim([net.conv1, net.conv2]).shrinks(0.5)  # 16 -> 8
    assert last_stage(model("resnet8")).shrinks(0.8)
    assert not last_stage(model("resnet8")).shrinks(1.0)


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(4, 4, 3, groups=4), nn.LayerNorm(4), nn.Conv2d(4, 4, 3, padding_mode="circular")],
)
def test_layers_that_cannot_be_narrowed_are_refused(module):
    with pytest.raises(TypeError, match=f"{type(module).__name__} cannot be run at reduced width"):
        Slim([nn.ReLU(), nn.Sequential(module)])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_bfloat16_autocast(norm):
    net = model("resnet8", norm=norm)
    with torch.autocast("cpu", torch.bfloat16):
        y = whole(net)(images(), 0.5)
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


# Where X and Y are taken: channels and side of both, and m(0.8 C) of Y's.
@pytest.mark.parametrize(
    ("name", "side", "x", "y", "slim"),
    [
        ("resnet8", 32, (128, 4), (256, 2), 208),
        ("resnet18-imagenet", 64, (256, 4), (512, 2), 408),
        ("resnet56-bottleneck", 32, (128, 16), (256, 8), 208),
        ("resnet20", 32, (32, 16), (64, 8), 48),
        ("lenet64", 32, (64, 14), (64, 10), 48),
        ("cnn", 32, (32, 30), (64, 28), 48),
        ("tiny-convnet", 64, (64, 16), (64, 16), 48),
        ("digits-cnn", 8, (16, 4), (32, 4), 24),
    ],
)
def test_last_stages(name, side, x, y, slim):
    norm = "group" if name == "tiny-convnet" else "batch"
    net = model(name, (3, side, side), norm=norm)
    stage, seen = last_stage(net), {}
    stage.first.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    stage.last.register_forward_hook(lambda module, args, out: seen.update(y=out))
    net(images(2, (3, side, side)))
    for module in stage.after:
        seen["y"] = module(seen["y"])
    assert seen["x"].shape == (2, x[0], x[1], x[1])
    assert seen["y"].shape == (2, y[0], y[1], y[1])
    assert seen["y"].min() == 0  # after its activation
    assert stage.channels == x[0]
    assert stage.slim(seen["x"][:, : stage.inputs(0.8)], 0.8).shape == (2, slim, y[1], y[1])
    # at full width it is the stage itself
    assert torch.equal(stage.slim(seen["x"], 1.0), seen["y"])


def test_last_stage_without_convolutions():
    net = model("mlp")  # 3072-64-32-10
    stage = last_stage(net)
    assert (stage.first, stage.last, stage.channels) == (net.fc2, net.relu2, 64)


@pytest.mark.parametrize(
    "net",
    [
        nn.Linear(4, 2),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
        nn.ModuleList([nn.Linear(4, 2)]),
    ],
)
def test_networks_without_a_last_stage(net):
    with pytest.raises(TypeError, match="not a Sequential with a layer before the classifier"):
        last_stage(net)
