"""Every loader reads a small data set in its real layout, written here, to the last pixel."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fl_common.data import layouts
from fl_common.data.catalogue import SOURCES, check
from fl_common.data.errors import DataError
from fl_common.data.sources import Dataset, load, sample_imagenet
from fl_common.data.transforms import pipeline

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

CIFAR10 = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "cifar10"
RNG = np.random.default_rng(0)


def pixels(n: int, side: int, channels: int = 3) -> np.ndarray:
    """(n, channels, side, side) uint8."""
    return RNG.integers(256, size=(n, channels, side, side), dtype=np.uint8)


def picture(x: np.ndarray) -> Image.Image:
    """(C, H, W) as an image: L, RGB or RGBA by its channels."""
    return Image.fromarray(x.transpose(1, 2, 0).squeeze())


def png(x: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    picture(x).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, x: np.ndarray) -> np.ndarray:
    """Write an image; what a decoder must give: the same for PNG, its own reading for JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(x).save(path)
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def read_checked(source: str, path: Path, **options) -> Dataset:
    """Load what `check` found nothing wrong with, into a cache beside it."""
    assert check(source, str(path)) == []
    return load(source, path, cache_dir=path.parent / "cache", **options)


def assert_split(split, x: np.ndarray, y) -> None:
    assert split.x.dtype == np.uint8 and split.y.dtype == np.int64
    np.testing.assert_array_equal(split.x, x)
    np.testing.assert_array_equal(split.y, y)


def assert_batch(data: Dataset, source: str, at: list[int], x: np.ndarray) -> None:
    """A batch on its way to the model: (pixel / 255 - mean) / std of the source's `none`."""
    batch = pipeline(source, "none", torch.float64).eval(torch.from_numpy(data.train.x[at]))
    recipe = pipeline(source, "none").recipe
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (recipe.mean, recipe.std))
    np.testing.assert_allclose(batch, (x[at] / 255 - mean) / std, atol=1e-12)


# CIFAR


def cifar_parquet(path: Path, x: np.ndarray, **columns) -> None:
    """The hub's files: an image column `img` and ClassLabels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"img": datasets.Image()} | {
        name: datasets.ClassLabel(names=names) for name, (_, names) in columns.items()
    }
    table = {"img": [{"bytes": png(image), "path": None} for image in x]}
    table |= {name: list(y) for name, (y, _) in columns.items()}
    datasets.Dataset.from_dict(table, datasets.Features(features)).to_parquet(path)


CIFAR10_NAMES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]


@pytest.mark.parametrize("folder", ["", "plain_text"])
def test_cifar10_parquet(tmp_path, folder):
    root, x, xt = tmp_path / "cifar10", pixels(6, 32), pixels(3, 32)
    (root / folder).mkdir(parents=True)
    for i in range(2):
        part, y = x[3 * i : 3 * i + 3], [i, 5, 9]
        cifar_parquet(
            root / folder / f"train-0000{i}-of-00002.parquet", part, label=(y, CIFAR10_NAMES)
        )
    cifar_parquet(
        root / folder / "test-00000-of-00001.parquet", xt, label=([3, 2, 1], CIFAR10_NAMES)
    )
    data = read_checked("cifar10", root)
    assert_split(data.train, x, [0, 5, 9, 1, 5, 9])
    assert_split(data.test, xt, [3, 2, 1])
    assert_batch(data, "cifar10", [4, 0], x)
    assert data.classes == tuple(CIFAR10_NAMES)
    assert data.shape == (3, 32, 32)


def test_cifar100_parquet_takes_the_fine_labels(tmp_path):
    root, x, xt = tmp_path / "cifar100", pixels(3, 32), pixels(2, 32)
    fine, coarse = [f"f{i:02}" for i in range(100)], [f"c{i:02}" for i in range(20)]
    for name, part, y in (("train", x, [99, 0, 7]), ("test", xt, [1, 2])):
        cifar_parquet(
            root / "cifar100" / f"{name}-00000-of-00001.parquet",
            part,
            fine_label=(y, fine),
            coarse_label=([v // 5 for v in y], coarse),
        )
    data = read_checked("cifar100", root)
    assert_split(data.train, x, [99, 0, 7])
    assert_split(data.test, xt, [1, 2])
    assert_batch(data, "cifar100", [1], x)
    assert data.classes == tuple(fine)


def records(labels: np.ndarray, x: np.ndarray) -> bytes:
    """The binary version: label bytes (n, 1 or 2), then 3,072 pixel bytes, per sample."""
    return np.concatenate([labels.astype(np.uint8), x.reshape(len(x), -1)], axis=1).tobytes()


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_binary(tmp_path, inside):
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")
    x, y = pixels(10, 32), np.arange(10)[:, None]
    for i in range(5):
        part = slice(2 * i, 2 * i + 2)
        (folder / f"data_batch_{i + 1}.bin").write_bytes(records(y[part], x[part]))
    (folder / "test_batch.bin").write_bytes(records(y[:3], x[:3]))
    data = read_checked("cifar10", folder if inside else folder.parent)
    assert_split(data.train, x, range(10))
    assert_split(data.test, x[:3], range(3))
    assert_batch(data, "cifar10", [9, 2], x)
    assert data.classes == tuple(CIFAR10_NAMES)


def cifar100_binary(folder: Path, x: np.ndarray, fine: list[int]) -> None:
    folder.mkdir(parents=True)
    labels = np.array([[v // 5, v] for v in fine])
    (folder / "fine_label_names.txt").write_text("\n".join(f"f{i:02}" for i in range(100)) + "\n")
    (folder / "train.bin").write_bytes(records(labels, x))
    (folder / "test.bin").write_bytes(records(labels[:1], x[:1]))


def test_cifar100_binary(tmp_path):
    x = pixels(3, 32)
    cifar100_binary(tmp_path / "cifar-100-binary", x, [99, 0, 42])
    data = read_checked("cifar100", tmp_path / "cifar-100-binary")
    assert_split(data.train, x, [99, 0, 42])
    assert_split(data.test, x[:1], [99])
    assert_batch(data, "cifar100", [2], x)
    assert data.classes[42] == "f42"


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not on this machine")
def test_real_cifar10(tmp_path):
    data = load("cifar10", CIFAR10, cache_dir=tmp_path)
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert data.shape == SOURCES["cifar10"].shape
    assert len(data.train) == SOURCES["cifar10"].train_size
    assert data.classes == tuple(CIFAR10_NAMES)
    assert (np.bincount(data.train.y) == 5_000).all()
    assert (np.bincount(data.test.y) == 1_000).all()
    means = data.train.x.mean(axis=(0, 2, 3)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=1e-3)


# Tiny-ImageNet and ImageNet


def tiny_train(root: Path, sides: int = 64) -> tuple[list[str], np.ndarray]:
    wnids = [f"n{i:08}" for i in range(200)]
    (root / "wnids.txt").parent.mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(reversed(wnids)))
    x = []
    for wnid in wnids:
        (root / "train" / wnid).mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t1\t1\n")
        x.append(write(root / "train" / wnid / "images" / f"{wnid}_0.JPEG", pixels(1, sides)[0]))
    return wnids, np.stack(x)


def test_tiny_imagenet_as_published(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    wnids, x = tiny_train(root)
    files = {f"val_{i}.JPEG": pixels(1, 64)[0] for i in range(3)}
    xt = [write(root / "val" / "images" / name, image) for name, image in files.items()]
    lines = [f"val_{i}.JPEG\t{wnids[k]}\t0\t32\t44\t62\n" for i, k in enumerate([7, 0, 199])]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    write(root / "test" / "images" / "test_0.JPEG", pixels(1, 64)[0])  # published unlabelled
    data = read_checked("tiny-imagenet", root)
    assert_split(data.train, x, range(200))
    assert_split(data.test, np.stack(xt), [7, 0, 199])
    assert_batch(data, "tiny-imagenet", [5, 3], x)
    assert data.classes == tuple(wnids)


def test_tiny_imagenet_with_val_sorted_into_classes(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    wnids, _ = tiny_train(root)
    xt = [write(root / "val" / wnids[k] / "images" / "v.JPEG", pixels(1, 64)[0]) for k in (2, 9)]
    data = read_checked("tiny-imagenet", tmp_path)
    assert_split(data.test, np.stack(xt), [2, 9])


def test_tiny_imagenet_parquet(tmp_path):
    names, x, xt = [f"n{i:08}" for i in range(200)], pixels(3, 64), pixels(1, 64)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    (tmp_path / "tiny" / "data").mkdir(parents=True)
    for split, part, y in (("train", x, [0, 0, 199]), ("valid", xt, [5])):
        cells = [{"bytes": png(image), "path": None} for image in part]
        table = datasets.Dataset.from_dict({"image": cells, "label": y}, features)
        table.to_parquet(tmp_path / "tiny" / "data" / f"{split}-00000-of-00001-1359597a.parquet")
    data = read_checked("tiny-imagenet", tmp_path / "tiny")
    assert_split(data.train, x, [0, 0, 199])
    assert_split(data.test, xt, [5])
    assert_batch(data, "tiny-imagenet", [2], x)


def imagenet(root: Path, classes: int, train: int = 1) -> None:
    """One image file, linked into place; its size is 300 x 280 pixels."""
    write(root / "one.JPEG", RNG.integers(256, size=(3, 280, 300), dtype=np.uint8))
    for i in range(classes):
        for part, n in (("train", train), ("val", 1)):
            (root / part / f"n{i:08}").mkdir(parents=True)
            for k in range(n):
                os.link(root / "one.JPEG", root / part / f"n{i:08}" / f"{part}_{k}.JPEG")


def test_imagenet_200(tmp_path):
    root = tmp_path / "imagenet"
    imagenet(root, 210)
    other = RNG.integers(256, size=(3, 512, 1024), dtype=np.uint8)
    drawn = np.random.RandomState(1993).choice(210, 200, replace=False)
    chosen = root / "train" / f"n{drawn[0]:08}"
    (chosen / "train_0.JPEG").unlink()
    write(chosen / "other.png", other)
    data = read_checked("imagenet-200", root)
    assert data.classes == tuple(f"n{i:08}" for i in sorted(drawn))
    assert data.shape == (3, 256, 256)
    np.testing.assert_array_equal(data.train.y, range(200))
    np.testing.assert_array_equal(data.test.y, range(200))
    # 1024 x 512 becomes 512 x 256, of which columns 128 to 384 are the centre.
    half = picture(other).resize((512, 256), Image.Resampling.BILINEAR).crop((128, 0, 384, 256))
    at = data.classes.index(chosen.name)
    np.testing.assert_array_equal(data.train.x[at], np.asarray(half).transpose(2, 0, 1))
    # 300 x 280: 274 x 256 by whole-number division, nine columns off on the left.
    one = Image.open(root / "one.JPEG").resize((274, 256), Image.Resampling.BILINEAR)
    expected = np.asarray(one.crop((9, 0, 265, 256))).transpose(2, 0, 1)
    np.testing.assert_array_equal(data.test.x[0], expected)
    batch = pipeline("imagenet-200", "none").eval(torch.from_numpy(data.test.x[:1]))
    assert batch.shape == (1, *SOURCES["imagenet-200"].shape)
    red = (expected[0, 16, 16] / 255 - 0.485) / 0.229
    assert batch[0, 0, 0, 0] == pytest.approx(red, abs=1e-5)


def test_imagenet_classes_are_the_published_ones():
    """FedAlign's list begins n01729322, n01514668, n04550184, n03109150: ImageNet's classes
    number 54 (hognose snake), 7 (cock), 894 (wardrobe) and 512 (corkscrew)."""
    drawn = np.random.RandomState(1993).choice([f"{i}" for i in range(1000)], 200, replace=False)
    assert list(drawn[:4]) == ["54", "7", "894", "512"]


def test_imagenet_draws_500_images_of_a_larger_class(tmp_path):
    imagenet(tmp_path, 200)
    folder = tmp_path / "train" / "n00000003"
    for k in range(1, 600):
        os.link(tmp_path / "one.JPEG", folder / f"train_{k}.JPEG")
    layout = sample_imagenet(layouts.find("imagenet-200", str(tmp_path)))
    of_folder = [file for file in layout.train if file.parent == folder]
    assert len(of_folder) == len(set(of_folder)) == 500
    assert of_folder == sorted(of_folder)
    assert layout == sample_imagenet(layouts.find("imagenet-200", str(tmp_path)))


# Folders


def test_folder_with_train_and_test(tmp_path):
    root, x = tmp_path / "pets", pixels(4, 9)
    names = ["train/cat/b.png", "train/cat/deep/a.PNG", "train/v1.5/c.png", "val/v1.5/d.png"]
    for name, image in zip(names, x, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(image).save(root / name, "PNG")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / ".hidden.png").write_text("no image")
    data = read_checked("folder", root)
    assert data.classes == ("cat", "v1.5")
    assert_split(data.train, x[:3], [0, 0, 1])
    assert_split(data.test, x[3:], [1])
    assert_batch(data, "folder", [2, 1], x)


def test_classes_named_like_images(tmp_path):
    x = pixels(4, 4)
    names = ["train/logo.png/a.png", "train/photo.JPG/b.png", "test/photo.JPG/c.png"]
    for name, image in zip(names, x, strict=False):
        write(tmp_path / name, image)
    data = load("folder", tmp_path, cache_dir=tmp_path / "cache")
    assert data.classes == ("logo.png", "photo.JPG")
    assert_split(data.train, x[:2], [0, 1])
    assert_split(data.test, x[2:3], [1])


def test_flat_folder_holds_a_fifth_out(tmp_path):
    root = tmp_path / "flat"
    for name, n in (("a", 10), ("b", 6)):
        for i in range(n):
            shade = np.full((3, 4, 4), 20 * i + (name == "b"), np.uint8)
            write(root / name / f"{i}.png", shade)
    data = read_checked("folder", root, seed=1)
    # Ten give two, six give one (1.2 rounded).
    assert np.bincount(data.train.y).tolist() == [8, 5]
    assert np.bincount(data.test.y).tolist() == [2, 1]
    shades = np.concatenate([data.train.x, data.test.x])[:, 0, 0, 0]
    assert len(set(shades.tolist())) == 16
    again = load("folder", root, cache_dir=tmp_path / "other", seed=1)
    assert again.fingerprint == data.fingerprint
    fingerprints = {
        load("folder", root, cache_dir=tmp_path / "cache", seed=seed).fingerprint
        for seed in range(6)
    }
    assert len(fingerprints) > 1


def test_greyscale_folder_keeps_one_channel(tmp_path):
    x = pixels(3, 5, channels=1)
    for i, image in enumerate(x):
        path = tmp_path / "g" / ("test" if i == 2 else "train") / f"c{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True)
        picture(image).save(path)
    (tmp_path / "g" / "test" / "c1").mkdir()
    data = read_checked("folder", tmp_path / "g")
    assert data.shape == (1, 5, 5)
    assert_split(data.train, x[:2], [0, 1])
    assert_split(data.test, x[2:], [0])


def test_other_modes_become_rgb(tmp_path):
    root = tmp_path / "modes"
    colour, grey, alpha = pixels(1, 6)[0], pixels(1, 6, 1)[0], pixels(1, 6, 4)[0]
    palette = picture(pixels(1, 6)[0]).quantize(8)
    for name, image in (
        ("train/a/0.png", picture(colour)),
        ("train/a/1.png", picture(grey)),
        ("train/b/2.png", picture(alpha)),
        ("train/b/3.png", palette),
        ("test/a/4.png", picture(colour)),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    data = read_checked("folder", root)
    expected = [colour, np.repeat(grey, 3, 0), alpha[:3], np.asarray(palette.convert("RGB"))]
    expected[3] = expected[3].transpose(2, 0, 1)
    assert_split(data.train, np.stack(expected), [0, 0, 1, 1])


def test_images_are_brought_to_one_size(tmp_path):
    root = tmp_path / "sizes"
    wide = RNG.integers(256, size=(3, 8, 16), dtype=np.uint8)
    tall = RNG.integers(256, size=(3, 32, 16), dtype=np.uint8)
    write(root / "train" / "a" / "wide.png", wide)
    write(root / "train" / "b" / "tall.png", tall)
    write(root / "test" / "a" / "wide.png", wide)
    with pytest.raises(DataError, match=r"data\.image-size") as error:
        load("folder", root, cache_dir=tmp_path / "cache")
    assert "wide.png is 16 x 8 pixels" in str(error.value)
    assert "tall.png is 16 x 32 pixels" in str(error.value)
    data = read_checked("folder", root, image_size=8)
    # 16 x 8 keeps its height, columns 4 to 12; 16 x 32 becomes 8 x 16, rows 4 to 12.
    half = picture(tall).resize((8, 16), Image.Resampling.BILINEAR)
    shrunk = np.asarray(half)[4:12].transpose(2, 0, 1)
    assert_split(data.train, np.stack([wide[:, :, 4:12], shrunk]), [0, 1])


# Tables and whatever else `datasets` reads


def points(n: int) -> dict:
    return {
        "a": [0.5 * i for i in range(n)],
        "b": list(range(n)),
        "label": [i % 2 for i in range(n)],
    }


def test_one_parquet_file_of_numbers(tmp_path):
    file = tmp_path / "points.parquet"
    datasets.Dataset.from_dict(points(10)).to_parquet(file)
    data = read_checked("huggingface", file, seed=0)
    assert data.shape == (2,)
    assert data.classes == ("0", "1")
    assert data.train.x.dtype == np.float32
    assert (len(data.train), len(data.test)) == (8, 2)
    for split in (data.train, data.test):
        np.testing.assert_array_equal(split.x[:, 1], 2 * split.x[:, 0])
        np.testing.assert_array_equal(split.y, split.x[:, 1].astype(int) % 2)
    batch = pipeline("huggingface").train(torch.from_numpy(data.train.x[[0, 1]]))
    np.testing.assert_array_equal(batch, data.train.x[:2])


def test_parquet_images_without_the_librarys_metadata(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root, x = tmp_path / "plain", pixels(3, 7)
    root.mkdir()
    cells = [{"bytes": png(image), "path": "x.png"} for image in x]
    for name, part, y in (("train", slice(2), ["yes", "no"]), ("validation", slice(2, 3), ["no"])):
        table = {"picture": cells[part], "class": y, "note": ["unused"] * len(y)}
        pq.write_table(pa.table(table), root / f"{name}.parquet")
    data = read_checked("huggingface", root)
    assert data.classes == ("no", "yes")
    assert_split(data.train, x[:2], [1, 0])
    assert_split(data.test, x[2:], [0])
    assert_batch(data, "huggingface", [1], x)


@pytest.mark.parametrize("splits", [True, False])
def test_a_saved_data_set(tmp_path, splits):
    root, x = tmp_path / "saved", pixels(10, 4)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["n", "p"])}
    )
    cells = [{"bytes": png(image), "path": None} for image in x]
    whole = datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 5}, features)
    if splits:
        parts = {"train": whole.select(range(8)), "test": whole.select([9, 8])}
        datasets.DatasetDict(parts).save_to_disk(root)
    else:
        whole.save_to_disk(root)
    data = read_checked("huggingface", root)
    assert data.classes == ("n", "p")
    if splits:
        assert_split(data.train, x[:8], [0, 1] * 4)
        assert_split(data.test, x[[9, 8]], [1, 0])
    else:
        assert (len(data.train), len(data.test)) == (8, 2)
        for image, label in zip(data.test.x, data.test.y, strict=True):
            [at] = np.flatnonzero((x == image).all(axis=(1, 2, 3)))
            assert label == at % 2


def test_a_folder_of_csv_files(tmp_path):
    root = tmp_path / "csv"
    root.mkdir()
    (root / "train.csv").write_text("u,v,target\n1,2.5,spam\n3,4,ham\n")
    (root / "test.csv").write_text("u,v,target\n5,6,spam\n")
    data = read_checked("huggingface", root)
    assert data.classes == ("ham", "spam")
    np.testing.assert_array_equal(data.train.x, np.float32([[1, 2.5], [3, 4]]))
    np.testing.assert_array_equal(data.train.y, [1, 0])
    np.testing.assert_array_equal(data.test.x, np.float32([[5, 6]]))


# What is in the package


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    data, original = load("digits", cache_dir=tmp_path), load_digits()
    assert len(data.train) == SOURCES["digits"].train_size
    assert len(data.train) + len(data.test) == 1797
    assert data.shape == SOURCES["digits"].shape
    assert data.classes == tuple("0123456789")
    images = 15 * original.images.astype(np.uint8)
    label_of = {x.tobytes(): y for x, y in zip(images, original.target, strict=True)}
    for split in (data.train, data.test):
        assert all(label_of[x.tobytes()] == y for x, y in zip(split.x, split.y, strict=True))
    np.testing.assert_array_equal(
        np.bincount(data.test.y), np.round(np.bincount(original.target) / 5)
    )
    batch = pipeline("digits").eval(torch.from_numpy(np.concatenate([data.train.x, data.test.x])))
    assert float(batch.mean()) == pytest.approx(0, abs=1e-3)
    assert float(batch.std()) == pytest.approx(1, abs=1e-3)
    assert load("digits", cache_dir=tmp_path, seed=3).fingerprint == data.fingerprint


def test_breast_cancer(tmp_path):
    from sklearn.datasets import load_breast_cancer

    data, original = load("breast-cancer", cache_dir=tmp_path), load_breast_cancer()
    assert len(data.train) == SOURCES["breast-cancer"].train_size
    assert len(data.train) + len(data.test) == 569
    assert data.shape == SOURCES["breast-cancer"].shape
    assert data.classes == ("malignant", "benign")
    assert data.train.x.dtype == np.float32
    np.testing.assert_allclose(data.train.x.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(data.train.x.std(axis=0), 1, rtol=1e-5)
    # 212 malignant and 357 benign: a fifth is 42.4 and 71.4.
    assert np.bincount(data.test.y).tolist() == [42, 71]
    # Standardising is affine and increasing, so ranks within a feature stay.
    both = np.concatenate([data.train.x, data.test.x])[:, 0]
    assert np.unique(both).size == np.unique(original.data[:, 0]).size


def test_synthetic(tmp_path):
    data = load("synthetic", cache_dir=tmp_path, seed=1)
    assert data.train.x.shape == (50_000, *SOURCES["synthetic"].shape)
    assert len(data.train) == SOURCES["synthetic"].train_size
    assert len(data.test) == 10_000
    assert (np.abs(np.bincount(data.train.y) - 5_000) < 400).all()
    assert data.train.x[:100].mean() == pytest.approx(127.5, abs=1)
    assert not np.array_equal(data.train.x[:5], data.test.x[:5])


# Mistakes in files


def failure(source: str, path: Path, **options) -> str:
    with pytest.raises(DataError) as error:
        load(source, path, cache_dir=path.parent / "cache", **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_incomplete_binary(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    cifar100_binary(folder, pixels(3, 32), [1, 2, 3])
    with (folder / "train.bin").open("r+b") as file:
        file.truncate(3074 * 3 - 1)
    assert "train.bin has 9221 bytes, not a multiple of 3074" in failure("cifar100", folder)


def test_binary_with_an_impossible_label(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    cifar100_binary(folder, pixels(1, 32), [100])
    assert "label 100, of 100 classes" in failure("cifar100", folder)


def test_another_data_set_than_the_source_says(tmp_path):
    for name in ("train", "test"):
        cifar_parquet(tmp_path / "c" / f"{name}.parquet", pixels(1, 32), label=([0], ["a", "b"]))
    assert "2 classes, cifar10 has 10" in failure("cifar10", tmp_path / "c")


def test_another_image_size_than_the_source_says(tmp_path):
    for name in ("train", "test"):
        cifar_parquet(tmp_path / "c" / f"{name}.parquet", pixels(1, 28), label=([0], CIFAR10_NAMES))
    message = failure("cifar10", tmp_path / "c")
    assert "train row 0 is 28 x 28 pixels, expected 32 x 32" in message


def test_a_broken_image_is_named(tmp_path):
    for name in ("train/a/0.png", "train/b/1.png", "test/b/2.png"):
        write(tmp_path / "f" / name, pixels(1, 4)[0])
    (tmp_path / "f" / "test" / "b" / "2.png").write_bytes(b"not an image")
    assert f"{tmp_path}/f/test/b/2.png is not a readable image" in failure("folder", tmp_path / "f")


def test_sixteen_bit_images_are_refused(tmp_path):
    for name in ("train/a", "train/b", "test/a"):
        path = tmp_path / "f" / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(path)
    assert "convert it to 8 bits" in failure("folder", tmp_path / "f")


def test_folders_without_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "f" / name).mkdir(parents=True)
    assert "f/a has no images; fill this class folder" in failure("folder", tmp_path / "f")


@pytest.mark.parametrize("test", ["test", ""])
def test_a_node_may_have_no_images_of_a_class(tmp_path, test):
    """But one at least; and a class that is added, or gets its first image, is not missed."""
    root, places = tmp_path / "f", ("train", test) if test else ("",)
    for place in places:
        for name, n in (("a", 5), ("c", 5)):
            for i in range(n):
                write(root / place / name / f"{i}.png", pixels(1, 4)[0])
    read = lambda: load("folder", root, cache_dir=tmp_path / "cache", every_class=False)  # noqa: E731
    assert read().classes == ("a", "c")
    (root / places[0] / "b").mkdir()
    data = read()
    assert data.classes == ("a", "b", "c")
    assert np.bincount(data.train.y, minlength=3).tolist() == ([5, 0, 5] if test else [4, 0, 4])
    write(root / places[0] / "b" / "0.png", pixels(1, 4)[0])
    assert 1 in read().train.y
    for file in root.rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match="f has no images in its class folders; fill them"):
        read()


def test_a_class_that_only_test_has(tmp_path):
    for name in ("train/a", "train/b", "test/c"):
        write(tmp_path / "f" / name / "0.png", pixels(1, 4)[0])
    assert "the class c in test but not in train" in failure("folder", tmp_path / "f")


def test_annotations_without_a_class(tmp_path):
    tiny_train(tmp_path / "t")
    (tmp_path / "t" / "val").mkdir()
    (tmp_path / "t" / "val" / "val_annotations.txt").write_text("val_0.JPEG\n")
    assert "val_annotations.txt has a line without a class" in failure(
        "tiny-imagenet", tmp_path / "t"
    )


def test_a_drawn_class_without_val_images(tmp_path):
    imagenet(tmp_path / "i", 201)
    drawn = np.random.RandomState(1993).choice(201, 200, replace=False)
    gone = f"n{drawn.min():08}"
    (tmp_path / "i" / "val" / gone / "val_0.JPEG").unlink()
    (tmp_path / "i" / "val" / gone).rmdir()
    assert f"val has no class {gone}" in failure("imagenet-200", tmp_path / "i")


def test_too_few_to_hold_out(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "f" / name / "0.png", pixels(1, 4)[0])
    assert "2 samples are too few" in failure("folder", tmp_path / "f")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"a": [1.0, 2.0]}, "none of them a label"),
        ({"a": [1.0, 2.0], "label": [0.5, 1.5]}, "none of them a label"),
        ({"a": ["x", "y"], "label": [0, 1]}, "the column a of string"),
        ({"a": [1.0, None], "label": [0, 1]}, "missing or infinite values in a"),
        ({"a": [1.0, 2.0], "label": [0, None]}, "5 empty cells in label"),
        ({"label": [0, 1]}, "no column but its label"),
        ({"a": [1.0, 2.0], "label": [0, 1], "y": [1, 1]}, ""),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, table, words):
    table = {name: values * 5 for name, values in table.items()}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "t.parquet")
    if words:
        assert words in failure("huggingface", tmp_path / "t.parquet")
    else:  # of two candidates the one named label is it, the other a feature
        assert load("huggingface", tmp_path / "t.parquet", cache_dir=tmp_path / "c").shape == (2,)


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}])
def test_a_row_without_an_image_is_named(tmp_path, cell):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": png(image), "path": "x.png"} for image in pixels(29, 4)]
    table = {"image": [*cells[:9], cell, *cells[9:]], "label": [0, 1] * 15}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    assert "has no image; remove it" in failure("huggingface", tmp_path / "t.parquet")


def test_unlabelled_samples_are_refused(tmp_path):
    features = datasets.Features(
        {"a": datasets.Value("float32"), "label": datasets.ClassLabel(names=["n", "p"])}
    )
    table = datasets.Dataset.from_dict({"a": [0.0, 1.0], "label": [0, -1]}, features)
    table.to_parquet(tmp_path / "t.parquet")
    assert "the label -1 in column label, of 2 classes" in failure(
        "huggingface", tmp_path / "t.parquet"
    )


def test_splits_with_other_classes(tmp_path):
    parts = {}
    for split, names in (("train", ["n", "p"]), ("test", ["p", "n"])):
        features = datasets.Features(
            {"a": datasets.Value("float32"), "label": datasets.ClassLabel(names=names)}
        )
        parts[split] = datasets.Dataset.from_dict({"a": [0.0], "label": [0]}, features)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert "other columns, or classes, in test" in failure("huggingface", tmp_path / "saved")


def test_two_image_columns_without_a_usual_name(tmp_path):
    cell = {"bytes": png(pixels(1, 4)[0]), "path": None}
    table = {"left": [cell] * 10, "right": [cell] * 10, "label": [0, 1] * 5}
    features = datasets.Features(
        {"left": datasets.Image(), "right": datasets.Image(), "label": datasets.Value("int64")}
    )
    datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / "t.parquet")
    assert "image columns left, right; keep one" in failure("huggingface", tmp_path / "t.parquet")


def test_hidden_parquet_files_are_passed_over(tmp_path):
    for name in ("train", "test", ".trash/train", "._train", ".cache/data/train"):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(points(10)).to_parquet(path)
    data = load("huggingface", tmp_path, cache_dir=tmp_path / "c")
    assert (len(data.train), len(data.test)) == (10, 10)


def test_no_parquet_file_at_all(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"not parquet")
    assert "cannot load" in failure("huggingface", tmp_path / "t.parquet")


def test_an_unknown_source():
    with pytest.raises(DataError, match="mnist is unknown"):
        load("mnist")


def test_a_source_without_its_path():
    with pytest.raises(DataError, match=r"no path; set data\.path, or each node's --data-path"):
        load("folder")
