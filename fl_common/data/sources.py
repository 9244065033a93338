"""Loading a data set: decoded once, memory-mapped afterwards.

A warm load imports no library but NumPy.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np

from fl_common.data import cache, layouts
from fl_common.data.catalogue import SOURCES
from fl_common.data.errors import DataError
from fl_common.user_code import told

_DECODER = 1  # part of every key: to be raised when the same files give other arrays


@dataclass(frozen=True, eq=False)
class Split:
    """x: (n, C, H, W) uint8, (n, F) float32, or token ids (n, L) uint8 or int64. y: (n,) int64."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, its arrays mapped from the cache.

    shape: a stored sample, (C, H, W) or (F,); `Transform.shape` tells what a model receives.  Of
        token ids (V, L) with V = 256 for uint8, else one more than the largest of both splits.
    fingerprint: hex sha256 over all samples, labels, shapes and class names.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    fingerprint: str


def load(
    source: str,
    path: str | Path = "",
    *,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    image_size: int = 0,
    every_class: bool = True,
) -> Dataset:
    """The data set `source`, decoded from `path` or, from the second time on, mapped.

    seed: draws the held-out fifth of a data set without a test split, and the synthetic samples;
        others do not depend on it.
    image_size: side that images are resized and cut to (folder, huggingface); 0: as they are.
    every_class: refuse a class folder without images, which is a mistake but for a node that has
        its own data.
    Raises DataError. A data set of the hub is downloaded once: to get a newer one, name a revision.
    """
    if ":" in source:
        return _load_own(source, str(path), seed)
    info = SOURCES.get(source)
    if info is None:
        raise DataError(f"data.source = {source} is unknown; known: {', '.join(SOURCES)}")
    layout = layouts.find(source, str(path), info.hub)
    if source == "imagenet-200":
        layout = sample_imagenet(layout)

    def make(writer: cache.Writer) -> dict[str, list[str]]:
        from fl_common.data import readers, text

        if source == "synthetic-text":
            raw = text.read()
        else:
            raw = readers.read(
                source,
                layout,
                info,
                writer.scratch,
                seed=seed,
                image_size=image_size,
                every_class=every_class,
            )
        for name, split in (("train", raw.train), ("test", raw.test)):
            writer.add(f"{name}_x", split.blocks, len(split.y))
            writer.add(f"{name}_y", [split.y], len(split.y))
        return {"classes": list(raw.classes)}

    drawn = source == "synthetic" or (info.resizable and not layout.test)
    key = [_DECODER, source, layouts.fingerprint(layout), seed if drawn else 0, image_size]
    name = f"{source}-{_digest(key)[:16]}"
    root = Path(cache_dir or cache.default_cache_dir())
    entry = cache.fetch(root / "datasets", name, make)
    splits = {s: Split(entry.arrays[f"{s}_x"], entry.arrays[f"{s}_y"]) for s in ("train", "test")}
    return _dataset(splits, tuple(entry.facts["classes"]), sorted(entry.sha256.items()))


def _load_own(source: str, path: str, seed: int) -> Dataset:
    """The data of "package.module:function", called with path= and seed=.

    It gives ((x, y), (x, y), classes): training and test samples as in `Split`, class names.
    """
    module, _, function = source.partition(":")
    try:
        given = getattr(import_module(module), function)(path=path, seed=seed)
    except Exception as error:  # of the user's own code
        raise DataError(f"data.source = {source}: {told(error)}") from error
    try:
        train, test, classes = given
        splits = {"train": Split(*map(_strided, train)), "test": Split(*map(_strided, test))}
        names = tuple(map(str, classes))
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes
    except (TypeError, ValueError) as error:
        raise DataError(
            f"data.source = {source}: it returned {type(given).__name__} ({error}); it must return "
            "((x, y), (x, y), classes): training samples, test samples, class names"
        ) from error
    for name, split in splits.items():
        _check_own(source, name, split, len(names))
    x, other = splits["train"].x, splits["test"].x
    if (x.dtype, x.shape[1:]) != (other.dtype, other.shape[1:]):
        raise DataError(
            f"data.source = {source}: train x is {x.dtype} {x.shape}, test x {other.dtype} "
            f"{other.shape}; give samples of one dtype and shape"
        )
    digests = [[name, _array_digest(s.x), _array_digest(s.y)] for name, s in splits.items()]
    return _dataset(splits, names, digests)


def _strided(given: object) -> np.ndarray:
    """As an array that torch can take: a view that runs backwards, or of a column among others of
    another size, is copied."""
    array = np.asarray(given)
    fits = all(step >= 0 and step % array.itemsize == 0 for step in array.strides)
    return array if fits else array.copy()


def _dataset(splits: dict[str, Split], classes: tuple[str, ...], digests: object) -> Dataset:
    """digests: those of the splits' arrays, as JSON takes them."""
    shape = _sample_shape(**splits)
    fingerprint = _digest([digests, shape, classes])
    return Dataset(**splits, classes=classes, shape=shape, fingerprint=fingerprint)


def _check_own(source: str, name: str, split: Split, classes: int) -> None:
    x, y = split.x, split.y
    images, features = x.dtype == np.uint8 and x.ndim == 4, x.dtype == np.float32 and x.ndim == 2
    if not images and not features and not _are_tokens(x):
        raise DataError(
            f"data.source = {source}: {name} x is {x.dtype} {x.shape}; it must be uint8 images "
            "(n, C, H, W) or float32 features (n, F), or token ids (n, L), uint8 or int64"
        )
    if images and x.shape[3] in (1, 3, 4) and x.shape[1] > 4:
        raise DataError(
            f"data.source = {source}: {name} x is {x.dtype} {x.shape}, images with their channels "
            "last; give (n, C, H, W)"
        )
    if features and (wrong := x.size - np.count_nonzero(np.isfinite(x))):
        raise DataError(
            f"data.source = {source}: {wrong} of {x.size} values of {name} x are NaN or infinite; "
            "fill them, or leave their samples out"
        )
    if _are_tokens(x) and x.size and x.min() < 0:
        raise DataError(
            f"data.source = {source}: {name} has the token id {x.min()}; ids count from 0"
        )
    if y.dtype != np.int64 or y.shape != x.shape[:1]:
        raise DataError(
            f"data.source = {source}: {name} y is {y.dtype} {y.shape}; it must be int64 "
            f"({len(x)},), the number of each sample's class"
        )
    if not len(y):
        raise DataError(f"data.source = {source}: {name} has no samples")
    if y.min() < 0 or y.max() >= classes:
        raise DataError(
            f"data.source = {source}: {name} y has labels from {y.min()} to {y.max()}; of "
            f"{classes} classes they must lie in 0..{classes - 1}"
        )


def _are_tokens(x: np.ndarray) -> bool:
    return x.ndim == 2 and x.dtype in (np.uint8, np.int64)


def _sample_shape(train: Split, test: Split) -> tuple[int, ...]:
    """As in `Dataset`."""
    if not _are_tokens(train.x):
        return train.x.shape[1:]
    is_bytes = train.x.dtype == np.uint8
    tokens = 256 if is_bytes else 1 + max(int(split.x.max()) for split in (train, test))
    return tokens, train.x.shape[1]


def _array_digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def sample_imagenet(layout: layouts.Layout) -> layouts.Layout:
    """FedAlign's ImageNet-200: 200 classes and 500 train images of each, all val images.

    Both are drawn by one generator of seed 1993 as in its data_preprocessing/
    gen_imagenet_subset.py; there the images come in the order of the file system, here sorted.
    """
    rng = np.random.RandomState(1993)
    folders = {folder.name: folder for folder in layout.train}
    drawn = rng.choice(list(folders), 200, replace=False)
    train: dict[str, list[Path]] = {}
    for name in drawn:
        files = layouts.images(folders[name])
        if not files:
            raise DataError(f"{folders[name]} has no images; unpack ImageNet's train set again")
        numbers = rng.choice(len(files), min(500, len(files)), replace=False)
        train[name] = [files[i] for i in sorted(numbers)]
    test = tuple(folder for folder in layout.test if folder.name in train)
    if len(test) < len(train):
        missing = min(set(train) - {folder.name for folder in test})
        raise DataError(f"{layout.root}/val has no class {missing}; sort its images into classes")
    chosen = tuple(file for name in sorted(train) for file in train[name])
    return replace(layout, train=chosen, test=test)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
