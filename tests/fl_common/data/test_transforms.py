import math
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fl_common.data import transforms
from fl_common.data.catalogue import SOURCES
from fl_common.data.sources import load
from fl_common.data.transforms import pipeline


def images(n: int, side: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, channels, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def drawn(op, n: int, seed: int = 0) -> torch.Tensor:
    """u (n, D) for an operation, or for a whole transform."""
    count = op.draws if isinstance(op, transforms.Transform) else transforms.drawn_by(op)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, count, generator=generator)


def trained(transform: transforms.Transform, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return transform.train(x, drawn(transform, len(x), seed))


# Normalisation: value of a pixel, mean and std as published

HUNDRED = [  # source, pipeline, value of a red, green and blue pixel of 100
    ("cifar10", "fedalign", [(100 / 255 - 0.49139968) / 0.24703233,
                             (100 / 255 - 0.48215827) / 0.24348505,
                             (100 / 255 - 0.44653124) / 0.26158768]),
    ("cifar10", "moon", [(100 - 125.3) / 63.0, (100 - 123.0) / 62.1, (100 - 113.9) / 66.7]),
    ("cifar10", "feddc", [(100 / 255 - 0.491) / 0.247, (100 / 255 - 0.482) / 0.243,
                          (100 / 255 - 0.447) / 0.262]),
    ("cifar10", "fling", [100 / 255] * 3),
    ("cifar100", "fedalign", [(100 / 255 - 0.5071) / 0.2673, (100 / 255 - 0.4865) / 0.2564,
                              (100 / 255 - 0.4409) / 0.2762]),
    ("cifar100", "feddc", [(100 / 255 - 0.5071) / 0.2675, (100 / 255 - 0.4867) / 0.2565,
                           (100 / 255 - 0.4408) / 0.2761]),
    ("cifar100", "fling", [(100 / 255 - 0.507) / 0.267, (100 / 255 - 0.487) / 0.256,
                           (100 / 255 - 0.441) / 0.276]),
    ("tiny-imagenet", "fling", [(100 / 255 - 0.507) / 0.267, (100 / 255 - 0.487) / 0.256,
                                (100 / 255 - 0.441) / 0.276]),
    ("imagenet-200", "fedalign", [(100 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224,
                                  (100 / 255 - 0.406) / 0.225]),
    ("folder", "default", [(100 / 255 - 0.5) / 0.5] * 3),
    ("huggingface", "none", [(100 / 255 - 0.5) / 0.5] * 3),
]  # fmt: skip


@pytest.mark.parametrize(("source", "name", "expected"), HUNDRED)
def test_normalisation(source, name, expected):
    x = torch.full((2, 3, 256, 256), 100, dtype=torch.uint8)
    batch = pipeline(source, name, torch.float64).eval(x)
    assert batch.dtype == torch.float64
    for channel, value in enumerate(expected):
        np.testing.assert_allclose(batch[:, channel], value, atol=1e-12)
    single = pipeline(source, name).eval(x)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, batch, atol=1e-6)


def test_digits_have_mean_0_and_deviation_1(tmp_path):
    data = load("digits", cache_dir=tmp_path)
    x = torch.from_numpy(np.concatenate([data.train.x, data.test.x]))
    batch = pipeline("digits").eval(x)
    assert abs(batch.mean()) < 1e-3 and abs(batch.std() - 1) < 1e-3


def test_the_input_is_left_as_it_is():
    x = images(4)
    for name in SOURCES["cifar10"].pipelines:
        trained(pipeline("cifar10", name), x)
    assert torch.equal(x, images(4))


def test_features_pass_through():
    x = torch.randn(5, 30)
    transform = pipeline("breast-cancer")
    assert torch.equal(transform.train(x), x)
    assert pipeline("huggingface", "none", torch.float64).eval(x).dtype == torch.float64
    assert transform.shape((30,)) == (30,)
    with pytest.raises(ValueError, match="features"):
        trained(pipeline("huggingface", "crop-flip"), x)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_has_exactly_the_pipelines_of_the_catalogue(source):
    for name in SOURCES[source].pipelines:
        pipeline(source, name)
    assert set(transforms.RECIPES[source]) == set(SOURCES[source].pipelines)
    with pytest.raises(ValueError, match=f"{source} has default, none"):
        pipeline(source, "unheard-of")


def test_an_unknown_source():
    with pytest.raises(ValueError, match="mnist is unknown"):
        pipeline("mnist")


@pytest.mark.parametrize(
    ("source", "stored"), [(s, i.shape) for s, i in SOURCES.items() if i.shape is not None]
)
def test_the_catalogue_has_the_shape_behind_the_transform(source, stored):
    stored = (3, 256, 256) if source == "imagenet-200" else stored
    assert pipeline(source).shape(stored) == SOURCES[source].shape


# Augmentation


def windows(padded: torch.Tensor, size: int) -> dict[bytes, tuple[int, int, bool]]:
    """Every window of one padded image (C, H, W) and its mirror image, by content."""
    steps = padded.shape[1] - size + 1
    found = {}
    for top in range(steps):
        for left in range(steps):
            window = padded[:, top : top + size, left : left + size]
            found[window.contiguous().numpy().tobytes()] = (top, left, False)
            found[window.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    return found


def seen(x, batch, pad, mode="constant"):
    """Where each sample of a batch was cut from: (B,) top, left, mirrored."""
    out = []
    for image, sample in zip(x, batch, strict=True):
        padded = F.pad(image[None], [pad] * 4, mode=mode)[0]
        out.append(windows(padded, image.shape[1])[sample.contiguous().numpy().tobytes()])
    return [np.array(column) for column in zip(*out, strict=True)]


def raw_ops(source, name, x):
    """What a pipeline does to pixels, before normalising."""
    transform = pipeline(source, name)
    ops, u = transform.recipe.train, drawn(transform, len(x))
    for op, own in zip(ops, u.split([transforms.drawn_by(op) for op in ops], 1), strict=True):
        x = op(x, own)
    return x


@pytest.mark.parametrize(
    ("source", "name", "side", "pad", "mode"),
    [
        ("cifar10", "default", 32, 4, "constant"),
        ("cifar10", "fedalign", 32, 4, "constant"),
        ("cifar100", "fedalign", 32, 4, "constant"),
        ("cifar10", "moon", 32, 4, "reflect"),
        ("cifar10", "crop-flip", 32, 4, "constant"),
        ("folder", "crop-flip", 64, 8, "constant"),
        ("huggingface", "crop-flip", 9, 1, "constant"),
    ],
)
def test_crops_are_windows_of_the_padded_image_with_independent_flips(
    source, name, side, pad, mode
):
    x = images(60, side, seed=1)
    top, left, mirrored = seen(x, raw_ops(source, name, x), pad, mode)
    for offset in (top, left):
        assert set(offset.tolist()) <= set(range(2 * pad + 1))
        assert len(set(offset.tolist())) > pad
    assert 15 < mirrored.sum() < 45
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.4
    assert abs(np.corrcoef(top, mirrored)[0, 1]) < 0.4


def test_offsets_are_uniform():
    ramp = torch.arange(32, dtype=torch.uint8) + 100
    x = ramp.expand(1, 1, 32, 32).expand(9000, 1, 32, 32)
    left = transforms.crop(x, drawn(transforms.crop, 9000), pad=4)[:, 0, 16, 16].int() - 116 + 4
    counts = np.bincount(left, minlength=9)
    # 1,000 expected of each, standard deviation 30.
    assert counts.min() > 880 and counts.max() < 1120


def test_feddc_pads_with_zeros_after_normalising_and_only_half_of_the_samples():
    x = images(200, seed=2)
    transform = pipeline("cifar10", "feddc")
    batch, plain = trained(transform, x), transform.eval(x)
    top, left, mirrored = seen(plain, batch, pad=4)
    whole = (top == 4) & (left == 4)
    # A half, and of the rest one in 81.
    assert 70 < whole.sum() < 130
    assert 70 < mirrored.sum() < 130
    assert (batch[torch.from_numpy(top == 0)][:, :, :4] == 0).all()


def test_a_crop_may_be_of_some_samples_only():
    x = images(500, seed=3)
    cropped = transforms.crop(x, drawn(transforms.crop, 500), pad=4, probability=0.1)
    # 50 are drawn, of which one in 81 stays in its place.
    assert 30 < (cropped != x).flatten(1).any(1).sum() < 70


def test_fedalign_pads_with_black_before_normalising():
    x = images(200, seed=2)
    batch = trained(pipeline("cifar10", "fedalign"), x)
    top, _, _ = seen(x, raw_ops("cifar10", "fedalign", x), pad=4)
    black = -0.49139968 / 0.24703233
    edge = batch[torch.from_numpy(top == 0)][:, 0, :4]
    assert len(edge) > 5
    np.testing.assert_allclose(edge, black, atol=1e-6)


def test_fling_on_cifar100_rotates_pixels_and_crops_normalised_values():
    x = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    batch = trained(pipeline("cifar100", "fling"), x)[:, 0]
    white, black = (1 - 0.507) / 0.267, -0.507 / 0.267
    values = {round(v, 4) for v in batch.unique().tolist()}
    assert values == {round(white, 4), round(black, 4), 0.0}
    assert (batch[:, 16, 16] == batch.max()).all()


@pytest.mark.parametrize("degrees", [-15.0, -7.3, 0.0, 4.2, 15.0])
@pytest.mark.parametrize("side", [32, 64])
def test_rotation_is_that_of_pil(degrees, side):
    x = images(1, side, seed=3)
    picture = Image.fromarray(x[0].permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.array(picture.rotate(degrees))).permute(2, 0, 1)
    actual = transforms.rotated(x, torch.tensor([math.radians(degrees)]))[0]
    same = (actual == expected).all(dim=0).float().mean()
    assert same > 0.98  # a nearest pixel may be another where two are equally near


def test_rotation_angles():
    # A single bright pixel at the right edge of the middle row moves up by radius sin(angle).
    x = torch.zeros(2000, 1, 65, 65, dtype=torch.uint8)
    x[:, :, 28:37, 60:] = 255
    moved = transforms.rotate(x, drawn(transforms.rotate, 2000), 15).squeeze(1)
    rows = torch.arange(65.0)[None, :, None]
    centre = (moved * rows).sum(dim=(1, 2)) / moved.sum(dim=(1, 2))
    angle = torch.rad2deg(torch.asin((32 - centre) / 30))
    assert -17 < angle.min() < -13 and 13 < angle.max() < 17
    assert abs(angle.mean()) < 1


@pytest.mark.parametrize("source", ["cifar100", "tiny-imagenet"])
def test_published_rotations_are_by_15_degrees_at_most(source, monkeypatch):
    found = []
    monkeypatch.setattr(transforms, "rotated", lambda x, angle: found.append(angle) or x)
    trained(pipeline(source, "fling"), images(2000))
    degrees = torch.rad2deg(torch.cat(found))
    assert -15 <= degrees.min() < -14.9 and 14.9 < degrees.max() <= 15


def test_imagenet_windows_are_resized_crops():
    x = images(4, 256, seed=4)
    start = torch.tensor([[0.0, 10, 100, 0], [0.0, 20, 3, 56]])
    extent = torch.tensor([[256.0, 100, 130, 200], [256.0, 77, 250, 200]])
    actual = transforms.resized_windows(x, start, extent, 224)
    for i in range(4):
        (top, left), (height, width) = start[:, i].int(), extent[:, i].int()
        window = x[i : i + 1, :, top : top + height, left : left + width].float()
        expected = F.interpolate(window, size=(224, 224), mode="bilinear", align_corners=False)
        np.testing.assert_allclose(actual[i], expected[0], atol=0.05)


def test_imagenet_windows_have_the_published_distribution(monkeypatch):
    found = {}
    monkeypatch.setattr(
        transforms,
        "resized_windows",
        lambda x, start, extent, size: found.update(start=start, extent=extent) or x,
    )
    u = drawn(transforms.resized_crop, 20_000)
    transforms.resized_crop(torch.empty(20_000, 1, 1, 256), u, 224)
    start, extent = found["start"], found["extent"]
    assert torch.equal(start, start.round()) and torch.equal(extent, extent.round())
    assert (start >= 0).all() and (start + extent <= 256).all()
    area, ratio = extent.prod(dim=0) / 256**2, extent[1] / extent[0]
    assert 0.075 < area.min() < 0.09 and 0.95 < area.max() <= 1.0
    assert 0.74 < ratio.min() < 0.77 and 1.30 < ratio.max() < 1.35
    assert abs(ratio.log().mean()) < 0.01
    # All ten tries fail with a negligible probability; rejection thins large areas a little.
    assert 0.40 < area.mean() < 0.54
    assert (start.amax(dim=1) > 150).all()


def test_jitter_by_hand():
    """A pixel pair (200, 100, 50) and (100, 100, 100): greys 124.18 and 99.99, mean 112.085.

    Sample 0, brightness 1.2 first: (240, 120, 60), (120, 120, 120), mean grey 134.502;
    contrast .5: (187.25, 127.25, 97.25), (127.25, ...); saturation 0: the grey image.
    Sample 1, saturation 2 first: 2 x - grey, so (275.8 cut to 255, 75.8, 0), (100.01, ...).
    """
    x = torch.tensor([[[200, 100]], [[100, 100]], [[50, 100]]], dtype=torch.uint8)
    x = x.expand(2, 3, 1, 2)
    factors = torch.tensor([[1.2, 0.5, 0.0], [1.0, 1.0, 2.0]])
    order = torch.tensor([[0, 1, 2], [2, 0, 1]])
    out = transforms.jittered(x, factors, order)
    grey = 0.2989 * 187.251 + 0.587 * 127.251 + 0.114 * 97.251
    np.testing.assert_allclose(out[0, :, 0, 0], [grey] * 3, atol=0.01)
    np.testing.assert_allclose(out[1, :, 0, 0], [255, 75.82, 0], atol=0.01)
    np.testing.assert_allclose(out[1, :, 0, 1], [100.01] * 3, atol=0.01)


def test_jitter_contrast_by_hand():
    """Greys 99.99 and 199.98 (their weights sum to .9999), mean 149.985, factor .5."""
    x = torch.tensor([[100.0, 200.0]]).expand(1, 3, 1, 2)
    out = transforms.jittered(x, torch.tensor([[1.0, 0.5, 1.0]]), torch.tensor([[1, 0, 2]]))
    np.testing.assert_allclose(out[0, 0, 0], [50 + 74.9925, 100 + 74.9925], atol=1e-3)


def test_jitter_factors_and_order_differ_by_sample():
    x = torch.full((300, 3, 2, 2), 100, dtype=torch.uint8)
    brightness = transforms.jitter(x, drawn(transforms.jitter, 300), 0.4)[:, 0, 0, 0] / 100
    assert 0.59 < brightness.min() < 0.63 and 1.37 < brightness.max() < 1.41


# What the caller relies on

ALL = [(source, name) for source, info in SOURCES.items() for name in info.pipelines]


def sample(source: str) -> torch.Tensor:
    if source == "breast-cancer":
        return torch.randn(4, 30)
    if source == "synthetic-text":
        return torch.arange(128, dtype=torch.uint8).view(4, 32)
    side = {"digits": 8, "tiny-imagenet": 64, "imagenet-200": 256}.get(source, 32)
    return images(4, side, channels=1 if source == "digits" else 3)


@pytest.mark.parametrize(("source", "name"), ALL)
def test_equal_numbers_give_equal_batches(source, name):
    transform, x, state = pipeline(source, name), sample(source), torch.get_rng_state()
    first = trained(transform, x, seed=7)
    assert torch.equal(trained(transform, x, seed=7), first)
    augmented = bool(transform.recipe.train or transform.recipe.after)
    augmented &= (source, name) != ("imagenet-200", "none")
    assert bool(transform.draws) == augmented
    assert torch.equal(trained(transform, x, seed=8), first) != augmented
    transform.eval(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("source", "name"), ALL)
def test_a_sample_is_augmented_the_same_in_any_batch(source, name):
    transform, x = pipeline(source, name), sample(source)
    u = drawn(transform, len(x))
    alone = [transform.train(x[i : i + 1], u[i : i + 1]) for i in range(len(x))]
    assert torch.equal(torch.cat(alone), transform.train(x, u))


@pytest.mark.parametrize(("source", "name"), ALL)
def test_nothing_waits_for_the_device(source, name):
    """Tensors of the meta device have no values, so that reading one on the host fails."""
    transform, x = pipeline(source, name), sample(source).to("meta")
    shape = SOURCES[source].shape
    if shape and len(shape) == 2:  # (V, L), of which ids (L,) come
        shape = shape[1:]
    u = torch.empty(len(x), transform.draws, device="meta")
    assert transform.train(x, u).shape[1:] == shape or SOURCES[source].resizable
    assert transform.eval(x).device.type == "meta"


@pytest.mark.parametrize("name", ["none", "default", "moon", "feddc"])
def test_channels_last_is_an_order_in_memory_alone(name):
    x = images(6)
    for kind in (trained, transforms.Transform.eval):
        orders = [pipeline("cifar10", name, channels_last=last) for last in (False, True)]
        found = [kind(transform, x) for transform in orders]
        assert torch.equal(*found)
        assert found[1].is_contiguous(memory_format=torch.channels_last)
        assert not found[0].is_contiguous(memory_format=torch.channels_last)


def test_it_is_cheap():
    """Generous bounds, for a busy machine: about 0.01 and 0.13 ms on a quiet one."""
    x = images(10)
    for name, bound in (("none", 1e-4), ("default", 1e-3)):
        transform = pipeline("cifar10", name)
        u, times = drawn(transform, 10), []
        for _ in range(200):
            begin = time.perf_counter()
            transform.train(x, u)
            times.append(time.perf_counter() - begin)
        assert sorted(times)[20] < bound
