"""Where a data set's files are: layouts are recognised by names alone, nothing is opened.

Importing this module imports only the standard library.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fl_common.data.errors import DataError
from fl_common.files import absolute_path

IMAGE_SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
)  # fmt: skip
TEST_NAMES = ("test", "val", "valid", "validation")

Kind = Literal["embedded", "hub", "parquet", "saved", "files", "binary", "tree", "annotated"]


@dataclass(frozen=True)
class Layout:
    """The files of a data set.

    kind: embedded (nothing on disk), hub, parquet, saved (`Dataset.save_to_disk`), files (a
        folder that `datasets.load_dataset` reads), binary (CIFAR's records), tree (a folder of
        images per class), annotated (a tree whose test labels are Tiny-ImageNet's text file).
    root: the folder or file; for hub, the name.
    train, test: files, or for trees the class folders (or single images in them); test is empty
        where a part of train is to be held out.
    extra: other files that the content depends on.
    """

    kind: Kind
    root: str
    train: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    extra: tuple[Path, ...] = ()


def is_hub_name(path: str) -> bool:
    """Whether `path` reads owner/name or owner/name@revision and no such file or folder exists."""
    name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", path)
    return bool(name) and not path.endswith(".parquet") and not Path(path).exists()


def find(source: str, path: str, hub: str = "") -> Layout:
    """The layout of `source` at `path`; an empty path means `hub`, or an embedded data set.

    Raises DataError where nothing that the source knows is found.
    """
    if source not in _FINDERS:
        return Layout("embedded", source)
    if not path and not hub:
        raise DataError(f"{source} has no path; set data.path, or each node's --data-path")
    if not path:
        return Layout("hub", hub)
    if source == "huggingface" and is_hub_name(path):
        return Layout("hub", path)
    root = absolute_path(path).resolve()
    with _readable():
        root.stat()
        return _FINDERS[source](root)


def fingerprint(layout: Layout) -> str:
    """A hex sha256 over names, sizes and times of change of the files, none of which is opened."""
    digest = hashlib.sha256(f"{layout.kind}\n{layout.root}\n".encode())
    with _readable():
        for top in (*layout.train, *layout.test, *layout.extra):
            digest.update(f"{top}\n".encode())  # a class without images, too
            for file in _walk(top):
                stat = file.stat()
                line = f"{os.fspath(file)}\t{stat.st_size}\t{stat.st_mtime_ns}\n"
                digest.update(line.encode())
    return digest.hexdigest()


def images(top: Path) -> list[Path]:
    """The image files under a folder, sorted; a single file is itself."""
    with _readable():
        return [Path(file) for file in _walk(top) if file.name.lower().endswith(IMAGE_SUFFIXES)]


def images_of_class(top: Path) -> list[Path]:
    """`images` of a class that is trained on.  Raises DataError if there are none."""
    if found := images(top):
        return found
    raise DataError(
        f"{top} has no images; fill this class folder, or remove it (with data.partition=local a "
        "node may have none of a class)"
    )


def train_size(path: str) -> int:
    """Training samples of a folder of images by class, counted without opening one."""
    layout = find("folder", path)
    sizes = [len(images_of_class(folder)) for folder in layout.train]
    if layout.test:
        return sum(sizes)
    return sum(size - held_out_size(size) for size in sizes)


def held_out_size(samples: int) -> int:
    """How many samples of a class are held out where there is no test split: a fifth, rounded."""
    return int(samples / 5 + 0.5)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist; check its spelling") from None
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; check its permissions") from error


def _walk(top: Path | os.DirEntry[str]) -> Iterator[Path | os.DirEntry[str]]:
    """All files under a folder, folder by folder in the order of names; a file is itself."""
    if not top.is_dir():
        yield top
        return
    with os.scandir(top) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if not entry.name.startswith("."):
            yield from _walk(entry)


def _folders(root: Path) -> tuple[Path, ...]:
    """The folders in a folder, sorted; none if it is no folder."""
    if not root.is_dir():
        return ()
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    return tuple(root / name for name in names)


def _parquet(root: Path) -> Layout | None:
    """Parquet files at most two folders deep, told apart by the words in their names; hidden ones
    are not seen, as in a tree.

    Where no name says train, every file that does not say test or validation is train.
    """
    if root.is_file():
        return Layout("parquet", str(root), (root,)) if root.suffix == ".parquet" else None
    splits: dict[str, list[Path]] = {}
    for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet"):
        for file in sorted(root.glob(pattern)):
            place = file.relative_to(root)
            if any(part.startswith(".") for part in place.parts):
                continue
            words = re.findall("[a-z]+", place.as_posix().lower())
            name = next((word for word in words if word in ("train", *TEST_NAMES)), "")
            splits.setdefault(name, []).append(file)
    train = splits.get("train") or splits.get("")
    test = next((splits[name] for name in TEST_NAMES if name in splits), [])
    return Layout("parquet", str(root), tuple(train), tuple(test)) if train else None


def _cifar(folder: str, train: tuple[str, ...], test: str, names: str) -> Callable[[Path], Layout]:
    def find_cifar(root: Path) -> Layout:
        for base in (root, root / folder):
            if all((base / name).is_file() for name in (*train, test, names)):
                files = tuple(base / name for name in train)
                return Layout("binary", str(base), files, (base / test,), (base / names,))
        if (layout := _parquet(root)) and layout.test:
            return layout
        raise DataError(
            f"{root} holds neither parquet files (train-*.parquet and test-*.parquet) nor the "
            f"binary version ({folder}/: {', '.join((*train, test, names))}); the Python version "
            "is pickled and not read: take the binary one from the same page"
        )

    return find_cifar


def _tiny_imagenet(root: Path) -> Layout:
    for base in (root, root / "tiny-imagenet-200"):
        train, val = _folders(base / "train"), base / "val"
        if not train:
            continue
        annotated = (val / "val_annotations.txt").is_file()
        test = (val,) if annotated else _folders(val)
        if len(train) != 200 or not test:
            raise DataError(
                f"{base} has {len(train)} class folders in train/ and "
                f"{'a' if test else 'no'} labelled val/; Tiny-ImageNet has 200 and "
                "val/val_annotations.txt; unpack it again"
            )
        return Layout("annotated" if annotated else "tree", str(base), train, test)
    if (layout := _parquet(root)) and layout.test:
        return layout
    raise DataError(
        f"{root} holds neither train/<class>/ and val/ nor parquet files (train-*, valid-*); "
        "unpack tiny-imagenet-200.zip there"
    )


def _imagenet(root: Path) -> Layout:
    train, test = _folders(root / "train"), _folders(root / "val")
    if len(train) < 200 or len(test) < 200:
        raise DataError(
            f"{root} needs train/<class>/ and val/<class>/ with at least 200 classes each, it has "
            f"{len(train)} and {len(test)}; sort ImageNet's val images into class folders"
        )
    return Layout("tree", str(root), train, test)


def _folder(root: Path) -> Layout:
    train, test = _folders(root / "train"), ()
    if train:
        test = next(filter(None, (_folders(root / name) for name in TEST_NAMES)), ())
    else:
        train = _folders(root)
    if len(train) < 2:
        raise DataError(
            f"{root} needs a folder per class, at least two, under train/ and test/ (or val/) or "
            f"directly in it; it has {len(train)}"
        )
    return Layout("tree", str(root), train, test)


def _huggingface(root: Path) -> Layout:
    if layout := _parquet(root):
        return layout
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return Layout("saved", str(root), (root,))
    if any(next(root.glob(f"**/*.{suffix}"), None) for suffix in ("csv", "json", "jsonl")):
        return Layout("files", str(root), (root,))
    if root.is_file():
        raise DataError(f"{root} is no parquet file; for csv or json give the folder that holds it")
    raise DataError(
        f"{root} holds no parquet, csv or json files, nor a saved data set; for images in class "
        "folders use data.source=folder"
    )


_CIFAR10_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_FINDERS: dict[str, Callable[[Path], Layout]] = {
    "cifar10": _cifar("cifar-10-batches-bin", _CIFAR10_TRAIN, "test_batch.bin", "batches.meta.txt"),
    "cifar100": _cifar("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt"),
    "tiny-imagenet": _tiny_imagenet,
    "imagenet-200": _imagenet,
    "folder": _folder,
    "huggingface": _huggingface,
}
