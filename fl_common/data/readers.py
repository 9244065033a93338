"""Every data set, from its own layout to labels and blocks of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fl_common.data.errors import DataError
from fl_common.data.layouts import Layout, images, images_of_class
from fl_common.data.splits import Raw, RawSplit, held_out

if TYPE_CHECKING:
    from fl_common.data.catalogue import SourceInfo
    from fl_common.data.images import Encoded

# ImageNet is stored as the centre of each image at this shorter side, which is what its evaluation
# sees. The published training crops come from the whole image; ours come from this centre.
_IMAGENET_SIDE = 256


def read(
    source: str,
    layout: Layout,
    info: SourceInfo,
    scratch: Path,
    *,
    seed: int,
    image_size: int,
    every_class: bool = True,
) -> Raw:
    """Labels at once, samples as they are asked for; `scratch` must stay until then.

    every_class: whether a class folder without images is a mistake; else others hold that class.
    Raises DataError for files that are not what the layout promises.
    """
    if layout.kind == "embedded":
        raw = _EMBEDDED[source](seed)
    elif layout.kind == "binary":
        raw = _cifar_binary(layout, coarse_first=source == "cifar100")
    elif layout.kind in ("tree", "annotated"):
        raw = _tree(source, layout, info, seed, image_size, every_class)
    else:
        from fl_common.data import tables

        raw = tables.read(layout, scratch, shape=info.shape, image_size=image_size, seed=seed)
    if info.classes not in (None, len(raw.classes)):
        raise DataError(
            f"{layout.root} has {len(raw.classes)} classes, {source} has {info.classes}; check "
            "that data.source and data.path belong together"
        )
    return raw


def _digits(_: int) -> Raw:
    """1,797 images (1, 8, 8); scikit-learn's 0..16 times 15, which loses nothing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = (data.images[:, None] * 15).astype(np.uint8)
    train, test = _held_out_arrays(x, data.target.astype(np.int64))
    return Raw(tuple(map(str, data.target_names)), train, test)


def _breast_cancer(_: int) -> Raw:
    """569 samples (30,), every feature with mean 0 and variance 1 over train."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    y = data.target.astype(np.int64)
    train = data.data[held_out(y, seed=0)[0]]
    x = ((data.data - train.mean(axis=0)) / train.std(axis=0)).astype(np.float32)
    return Raw(tuple(map(str, data.target_names)), *_held_out_arrays(x, y))


def _held_out_arrays(x: np.ndarray, y: np.ndarray) -> tuple[RawSplit, RawSplit]:
    """The embedded data sets' test split is the same for every seed."""
    train, test = held_out(y, seed=0)
    return RawSplit(y[train], [x[train]]), RawSplit(y[test], [x[test]])


def _synthetic(seed: int) -> Raw:
    def split(n: int, stream: int) -> RawSplit:
        rng = np.random.default_rng([seed, stream])
        y = rng.integers(10, size=n)
        sizes = [5_000] * (n // 5_000)
        return RawSplit(y, (rng.integers(256, size=(k, 3, 32, 32), dtype=np.uint8) for k in sizes))

    return Raw(tuple("0123456789"), split(50_000, 0), split(10_000, 1))


_EMBEDDED = {"digits": _digits, "breast-cancer": _breast_cancer, "synthetic": _synthetic}


def _cifar_binary(layout: Layout, coarse_first: bool) -> Raw:
    """Records of a label byte (CIFAR-100: a coarse one before it) and 3,072 pixels in CHW order.

    https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """
    classes = tuple(layout.extra[0].read_text().split())
    labels = 2 if coarse_first else 1

    def split(files: Sequence[Path]) -> RawSplit:
        records = [_records(file, labels + 3072) for file in files]
        y = np.concatenate([block[:, labels - 1] for block in records]).astype(np.int64)
        if y.max(initial=0) >= len(classes):
            raise DataError(f"{layout.root} has the label {y.max()}, of {len(classes)} classes")
        return RawSplit(y, (block[:, labels:].reshape(-1, 3, 32, 32) for block in records))

    return Raw(classes, split(layout.train), split(layout.test))


def _records(file: Path, length: int) -> np.ndarray:
    size = file.stat().st_size
    if not size or size % length:
        raise DataError(
            f"{file} has {size} bytes, not a multiple of {length}; it is incomplete, unpack it "
            "again"
        )
    return np.memmap(file, np.uint8, mode="r").reshape(-1, length)


def _tree(
    source: str, layout: Layout, info: SourceInfo, seed: int, image_size: int, every_class: bool
) -> Raw:
    from fl_common.data.images import Frame, decode, survey

    classes = tuple(dict.fromkeys(map(_class_of, layout.train)))
    found = images_of_class if every_class else images
    train = [(file, _class_of(top)) for top in layout.train for file in found(top)]
    if not train:
        raise DataError(f"{layout.root} has no images in its class folders; fill them")
    if layout.kind == "annotated":
        test = _annotated(layout.test[0])
    else:
        test = [(file, _class_of(top)) for top in layout.test for file in images(top)]
    if layout.test and not test:
        raise DataError(f"{layout.root} has no images in the class folders of test; fill them")
    unknown = {name for _, name in test} - set(classes)
    if unknown:
        raise DataError(
            f"{layout.root} has the class {min(unknown)} in test but not in train; rename it"
        )
    index = {name: label for label, name in enumerate(classes)}
    y_train, y_test = (np.array([index[c] for _, c in part], np.int64) for part in (train, test))
    x_train, x_test = ([file for file, _ in part] for part in (train, test))
    if not layout.test:
        kept, out = held_out(y_train, seed)
        x_train, x_test = ([x_train[i] for i in part] for part in (kept, out))
        y_train, y_test = y_train[kept], y_train[out]
    if source == "imagenet-200":
        frame = Frame("RGB", _IMAGENET_SIDE, _IMAGENET_SIDE, resize=True)
    elif info.shape is not None:
        frame = Frame("RGB", *info.shape[1:])
    else:
        frame = survey(_encoded(x_train + x_test), image_size)
    return Raw(
        classes,
        RawSplit(y_train, decode(_encoded(x_train), frame)),
        RawSplit(y_test, decode(_encoded(x_test), frame)),
    )


def _class_of(top: Path) -> str:
    """A tree's parts are class folders or images in them."""
    return top.name if top.is_dir() else top.parent.name


def _encoded(files: list[Path]) -> Iterator[Encoded]:
    return ((str(file), file) for file in files)


def _annotated(val: Path) -> list[tuple[Path, str]]:
    """Tiny-ImageNet's val/: lines of file name, class and a bounding box, between tabs."""
    file = val / "val_annotations.txt"
    rows = [line.split("\t") for line in file.read_text().splitlines() if line]
    if any(len(row) < 2 for row in rows):
        raise DataError(f"{file} has a line without a class; unpack it again")
    return [(val / "images" / row[0], row[1]) for row in rows]
