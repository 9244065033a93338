import subprocess
import sys
from math import prod, sqrt

import pytest
import torch
from torch import nn

from fl_common.models.catalogue import MODELS, NORMS, build, check
from fl_common.models.layers import MaxPool2d, with_head
from fl_common.models.resnet import PaddedShortcut
from regularizers.gradaug import whole_net


def meta(name, classes=10, shape=(3, 32, 32), norm=None):
    """A model without memory: enough to count parameters and to follow shapes; as published."""
    norm = norm or ("group" if MODELS[name].norms == ("group",) else "batch")
    with torch.device("meta"):
        return build(name, classes=classes, shape=shape, norm=norm)


def calls(model, shape):
    """(leaf module, its output's shape) for each call of a forward pass, in that order."""
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, _, y: seen.append((m, tuple(y.shape))))
        for m in model.modules()
        if not list(m.children())
    ]
    model(torch.zeros(2, *shape, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return seen


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def usual(name, side=32, channels=3):
    """A sample's shape with which the model can be built; of documents `side` tokens."""
    return (256, side) if MODELS[name].input == "tokens" else (channels, side, side)


def float_buffers(module):
    return sum(b.numel() for b in module.buffers() if b.is_floating_point())


def group_sizes(model, shape):
    """Parameters of each leaf in forward order, a norm's added to the layer before it."""
    sizes = []
    for leaf, _ in calls(model, shape):
        if isinstance(leaf, nn.BatchNorm2d | nn.GroupNorm):
            sizes[-1] += parameters(leaf)
        elif parameters(leaf):
            sizes.append(parameters(leaf))
    return sizes


# Counts at 10, 100 and 200 classes as published or derived from the published structures.
@pytest.mark.parametrize(
    ("name", "side", "counts", "buffers"),
    [
        ("resnet8", 32, (1_235_274, 1_258_404, 1_284_104), 2_688),
        ("resnet18-imagenet", 32, (11_181_642, 11_227_812, 11_279_112), 9_600),
        ("resnet18", 32, (11_173_962, 11_220_132, 11_271_432), 9_600),
        ("resnet56-bottleneck", 32, (591_322, 614_452, 640_152), 8_992),
        ("resnet20", 32, (269_722, 275_572, None), 1_376),
        ("resnet20-b", 32, (272_474, 278_324, 284_824), 1_568),
        ("resnet56", 32, (853_018, 858_868, None), 4_064),
        ("resnet56-b", 32, (855_770, 861_620, 868_120), 4_256),
        ("lenet64", 32, (797_962, 815_332, 834_632), 0),
        ("lenet64", 64, (None, None, 4_373_576), 0),
        ("moon-cnn", 32, (92_626, 115_756, 141_456), 0),
        ("tiny-convnet", 64, (None, None, 2_447_688), 0),
        ("lenet", 32, (62_006, None, None), 0),
        ("cnn", 32, (1_626_442, None, None), 0),
    ],
)
def test_parameter_counts(name, side, counts, buffers):
    for classes, count in zip((10, 100, 200), counts, strict=True):
        if count is not None:
            model = meta(name, classes, (3, side, side))
            assert parameters(model) == count
            assert float_buffers(model) == buffers


def test_resnet18_imagenet_of_1000_classes_has_torchvisions_count():
    assert parameters(meta("resnet18-imagenet", 1000, (3, 224, 224))) == 11_689_512


def test_digits_and_features_counts():
    # conv 16*9+16, norm 32, conv 32*16*9+32, norm 64, fc 32*4*4*10+10
    assert parameters(meta("digits-cnn", shape=(1, 8, 8))) == 160 + 32 + 4640 + 64 + 5130
    # words 256*32, windows 32*32*w+32 for w of 3, 4, 5, fc 96*6+6
    assert parameters(meta("text-cnn", 6, (256, 32))) == 8192 + 3104 + 4128 + 5152 + 582
    # 30*64+64, 64*32+32, 32*2+2; an 8 x 8 image is 64 features
    assert parameters(meta("mlp", 2, (30,))) == 1984 + 2080 + 66
    assert parameters(meta("mlp", 10, (1, 8, 8))) == 4160 + 2080 + 330


def test_lenet64_by_layer():
    model = meta("lenet64")
    assert group_sizes(model, (3, 32, 32)) == [4_864, 102_464, 614_784, 73_920, 1_930]


def test_groups_of_resnet8():
    stages = [36_992, 36_992, 73_984, 147_712, 8_448, 295_424, 590_336, 33_280]
    assert group_sizes(meta("resnet8"), (3, 32, 32)) == [9_536, *stages, 2_570]


def test_groups_of_resnet18():
    expected = [9_536, *[36_992] * 4, 73_984, 147_712, 8_448, 147_712, 147_712]
    expected += [295_424, 590_336, 33_280, 590_336, 590_336]
    expected += [1_180_672, 2_360_320, 132_096, 2_360_320, 2_360_320, 512 * 100 + 100]
    assert group_sizes(meta("resnet18-imagenet", 100), (3, 32, 32)) == expected
    expected[0] = 64 * 3 * 9 + 128
    assert group_sizes(meta("resnet18", 100), (3, 32, 32)) == expected


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet8", 14.47),
        ("resnet56-bottleneck", 87.2),
        ("resnet20-b", 40.8),
        ("resnet18", 555.4),
        ("resnet18-imagenet", 37.0),
        ("lenet64", 14.7),
    ],
)
def test_multiplications_at_32_px(name, millions):
    """Convolutions and fc: each weight is used once per output position; fixes the strides."""
    macs = sum(
        leaf.weight.numel() * prod(out[2:])
        for leaf, out in calls(meta(name), (3, 32, 32))
        if isinstance(leaf, nn.Conv2d | nn.Linear)
    )
    assert macs / 1e6 == pytest.approx(millions, rel=5e-3)


def test_fedaligns_moon_head_on_resnet56():
    # FedAlign's two Linear(256, 256) add 2 * (256*256 + 256) to 591,322 and 614,452.
    assert parameters(with_head(meta("resnet56-bottleneck"))) == 722_906
    assert parameters(with_head(meta("resnet56-bottleneck", 100))) == 746_036


@pytest.mark.parametrize(
    ("name", "norm"), [(n, norm) for n in MODELS for norm in NORMS if not check(n, norm=norm)]
)
def test_forward_and_backward_are_finite(name, norm):
    torch.manual_seed(0)
    shape = usual(name, max(8, MODELS[name].min_side), channels=1)
    model = build(name, classes=5, shape=shape, norm=norm)
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 5)
    nn.functional.cross_entropy(logits, torch.tensor([0, 3])).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [n for n, info in MODELS.items() if info.input != "tokens"])
def test_smallest_image_and_oblong_image(name):
    side = MODELS[name].min_side
    for shape in [(3, side, side), (1, side, side + 9)]:
        assert calls(meta(name, shape=shape), shape)[-1][1] == (2, 10)
        norm = MODELS[name].norms[-1] if MODELS[name].norms else "batch"
        assert side == 1 or len(check(name, (3, side, side - 1), norm)) == 1


@pytest.mark.parametrize("name", MODELS)
def test_leaves_run_once_in_the_order_of_their_registration(name):
    shape = usual(name)
    model = meta(name, shape=shape)
    assert [m for m, _ in calls(model, shape)] == [
        m for m in model.modules() if not list(m.children())
    ]


@pytest.mark.parametrize("name", ["moon-cnn", "resnet8", "mlp"])
def test_fc_reads_the_representation(name):
    model = build(name, classes=4, shape=(3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)
    z = model.represent(x)
    assert z.shape == (2, {"moon-cnn": 256, "resnet8": 256, "mlp": 32}[name])
    assert torch.equal(model.fc(z), model(x))


def test_last_stage_of_fedaligns_resnet56():
    model = meta("resnet56-bottleneck")
    shapes = []
    model.stages[-1].register_forward_hook(lambda m, x, y: shapes.extend([x[0].shape, y.shape]))
    model(torch.zeros(2, 3, 32, 32, device="meta"))
    assert shapes == [(2, 128, 16, 16), (2, 256, 8, 8)]


def test_relus_of_tiny_convnet_are_mans_five_terms():
    shape = (3, 64, 64)
    ran = calls(meta("tiny-convnet", 200, shape), shape)
    outputs = [out[1:] for m, out in ran if isinstance(m, nn.ReLU)]
    assert outputs == [(64, 64, 64), (64, 32, 32), (64, 8, 8), (512,), (384,)]


def test_shortcut_a_takes_every_second_pixel_and_adds_zero_channels():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    y = PaddedShortcut(1, 2, stride=2)(x)
    assert y.tolist() == [[[[0, 2], [6, 8]], [[0, 0], [0, 0]]]]


def test_norm_group_leaves_no_batch_norm_and_no_buffers():
    for name, info in MODELS.items():
        if info.norms:
            model = meta(name, norm="group")
            assert not list(model.buffers())
            norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
            assert {m.num_groups for m in norms} == {2 if name.startswith("resnet") else 4}
            if "batch" in info.norms:
                assert parameters(model) == parameters(meta(name))


def test_norms_say_what_the_models_have():
    for name, info in MODELS.items():
        assert bool(list(meta(name, shape=usual(name)).buffers())) == ("batch" in info.norms)
        assert (check(name, norm="group") == []) == ("group" in info.norms)
        assert (check(name, norm="batch") == []) == (info.norms != ("group",))


def test_resnet_convolutions_start_kaiming_normal_without_bias():
    torch.manual_seed(0)
    convs = [
        m
        for m in build("resnet8", classes=10, shape=(3, 32, 32)).modules()
        if isinstance(m, nn.Conv2d)
    ]
    assert all(m.bias is None for m in convs)
    last = max(convs, key=lambda m: m.weight.numel())  # 3x3, 256 outputs
    assert last.weight.std().item() == pytest.approx(sqrt(2 / (9 * 256)), rel=0.01)


def test_initial_weights_come_from_the_callers_seed():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build("digits-cnn", classes=10, shape=(1, 8, 8)).state_dict())
    first, same, other = states
    for name in ("conv1.weight", "fc.weight"):
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])


def test_digits_cnn_learns_the_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    train, test = torch.randperm(len(x)).split([1437, 360])
    model = build("digits-cnn", classes=10, shape=(1, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        for batch in train[torch.randperm(len(train))].split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    assert accuracy > 0.97


@pytest.mark.parametrize(
    ("name", "shape", "norm", "words"),
    [
        ("resnet-8", None, "batch", ['model.name = "resnet-8": unknown', "resnet8"]),
        (
            "lenet",
            (30,),
            "batch",
            ['model.name = "lenet" needs images', "(30,)", "these models fit: mlp"],
        ),
        ("lenet", (1, 8, 8), "batch", ["at least 16 x 16 pixels", "(1, 8, 8)", "digits-cnn"]),
        ("lenet", (3, 32, 12), "batch", ["at least 16 x 16", "(3, 32, 12)"]),
        ("mlp", (8, 8), "batch", ["(C, H, W) or features (F,)", "(8, 8)", "fit: text-cnn"]),
        ("mlp", (2, 3, 8, 8), "batch", ["(C, H, W) or features (F,)", "check the data"]),
        ("text-cnn", (30,), "batch", ["needs token ids (V, L)", "(30,)", "fit: mlp"]),
        ("text-cnn", (256, 4), "batch", ["documents of at least 5 tokens", "check the data"]),
        ("lenet", None, "group", ['model.norm = "group"', "no norm layers", "use batch"]),
    ],
)
def test_wrong_settings_are_named_with_the_remedy(name, shape, norm, words):
    (line,) = check(name, shape, norm)
    assert "\n" not in line
    for word in words:
        assert word in line
    with pytest.raises(ValueError) as error:
        build(name, classes=10, shape=shape or (3, 32, 32), norm=norm)
    assert str(error.value) == line


def test_all_errors_are_reported_together():
    assert len(check("lenet", (30,), "group")) == 2
    assert len(check("nowhere.net:Net", None, "group", "moon")) == 1
    assert len(check("torch.nn:Linear", None, "group", "moon")) == 2


def test_checking_does_not_import_torch():
    code = (
        "import sys; from fl_common.models.catalogue import check; check('resnet8', (3, 9, 9));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


POOLED = {
    "2": ((9, 32, 16, 16), (2,)),
    "an odd side": ((7, 40, 17, 15), (2,)),
    "ImageNet's": ((5, 64, 15, 15), (3, 2, 1)),
}


def pooled(pool: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What it gives, and the gradient of x."""
    x = x.clone().requires_grad_()
    y = pool(x)
    y.backward(torch.arange(y.numel(), dtype=x.dtype).view_as(y))
    return y.detach(), x.grad


@pytest.mark.parametrize("values", ["distinct", "alike", "nan", "infinite"])
@pytest.mark.parametrize("case", POOLED)
def test_pooling_has_torchs_bits(case, values, monkeypatch):
    shape, size = POOLED[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if values == "alike":
        x = x.round()
    elif values != "distinct":
        x[:, :, ::3, 1:4] = {"nan": torch.nan, "infinite": -torch.inf}[values]
    assert x.numel() >= MaxPool2d.LARGE
    used, onednn = [], torch.mkldnn_max_pool2d
    monkeypatch.setattr(torch, "mkldnn_max_pool2d", lambda *a: used.append(a) or onednn(*a))
    ours, theirs = (pooled(pool(*size), x) for pool in (MaxPool2d, nn.MaxPool2d))
    assert bool(used) == (values in ("distinct", "alike"))
    for one, other in zip(ours, theirs, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_pooling_keeps_the_order_in_memory():
    x = torch.randn(9, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    assert MaxPool2d(2)(x).stride() == nn.MaxPool2d(2)(x).stride()


def test_a_pooled_network_has_second_derivatives():
    net = MaxPool2d(2).eval()
    x = torch.randn(9, 32, 16, 16, requires_grad=True)
    (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.count_nonzero() == x.numel() / 4


def test_pooling_under_vmap():
    x = torch.randn(3, 9, 32, 16, 16)
    torch.testing.assert_close(
        torch.vmap(MaxPool2d(2))(x), nn.MaxPool2d(2)(x.flatten(0, 1)).unflatten(0, (3, 9))
    )


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_bfloat16_gradients_of_the_smallest_maps_are_all_written(width):
    """The last stage of resnet8 has 1 x 1 maps of 8 x 8 digits, and a stride of 2."""
    net = build("resnet8", classes=10, shape=(1, 8, 8), norm="group", head="none")
    slim = whole_net(net)
    x, found = torch.randn(8, 1, 8, 8), []
    for filled in (torch.nan, 7.0, torch.nan):
        stale = [torch.full((n,), filled) for n in (1_000, 10_000, 100_000) for _ in range(9)]
        del stale  # what is not written next is this
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x) if width == 1 else slim(x, width)
        y.float().square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert all(grad.isfinite().all() for grad in found[0])
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )
