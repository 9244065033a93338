"""Data sets that the `datasets` library reads: parquet, csv, json, saved folders, the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_common.data import images
from fl_common.data.errors import DataError
from fl_common.data.layouts import TEST_NAMES, Layout
from fl_common.data.splits import Raw, RawSplit, held_out
from fl_common.failures import first_line

if TYPE_CHECKING:
    import datasets

_LABELS = ("label", "labels", "fine_label", "target", "class", "y")
_IMAGES = ("image", "img")


def read(
    layout: Layout,
    scratch: Path,
    *,
    shape: tuple[int, ...] | None,
    image_size: int = 0,
    seed: int = 0,
) -> Raw:
    """Read images or numeric columns with their labels.

    The label is the ClassLabel column, else a column of integers, strings or booleans with one of
    the names in _LABELS, whose distinct values are then the classes. With an image column other
    columns are not used; without, every other column must be a number and is a feature.

    scratch: a folder for the library's own copies; it must stay until the blocks are consumed.
    shape: (3, H, W) if every image must have that size; None to find the size out.
    """
    train, test = _splits(_load(layout, scratch), layout.root)
    image, label = _columns(train.features, layout.root)
    classes, y_train, y_test = _labels(train, test, label, layout.root)
    if test is None:
        kept, out = held_out(y_train, seed)
        train, test = train.select(kept), train.select(out)
        y_train, y_test = y_train[kept], y_train[out]
    if image is None:
        if shape is not None:
            raise DataError(f"{layout.root} has no image column, only {_list(train.features)}")
        features = [name for name in train.column_names if name != label]
        blocks = [_features(split, features, layout.root) for split in (train, test)]
    else:
        encoded = [
            _Images(split, image, f"{layout.root} {name}")
            for name, split in (("train", train), ("test", test))
        ]
        if shape is None:
            frame = images.survey((item for split in encoded for item in split), image_size)
        else:
            frame = images.Frame("RGB", *shape[1:])
        blocks = [images.decode(split, frame) for split in encoded]
    return Raw(classes, RawSplit(y_train, blocks[0]), RawSplit(y_test, blocks[1]))


def _load(layout: Layout, scratch: Path) -> dict[str, datasets.Dataset]:
    import datasets

    datasets.disable_progress_bars()
    options = {"cache_dir": str(scratch)}
    try:
        if layout.kind == "saved":
            loaded = datasets.load_from_disk(layout.root)
        elif layout.kind == "parquet":
            files = {"train": [*map(str, layout.train)]}
            if layout.test:
                files["test"] = [*map(str, layout.test)]
            loaded = datasets.load_dataset("parquet", data_files=files, **options)
        elif layout.kind == "hub":
            name, _, revision = layout.root.partition("@")
            loaded = datasets.load_dataset(name, revision=revision or None, **options)
        else:
            loaded = datasets.load_dataset(layout.root, **options)
    except Exception as error:  # the library raises its own, pyarrow's, fsspec's and the hub's
        where = "from the Hugging Face hub" if layout.kind == "hub" else "with `datasets`"
        raise DataError(
            f"cannot load {layout.root} {where}: {first_line(error)}; check data.path (a "
            "folder or file on this machine needs no network)"
        ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _splits(
    loaded: dict[str, datasets.Dataset], root: str
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    if "train" not in loaded and len(loaded) > 1:
        raise DataError(f"{root} has the splits {_list(loaded)}; name one of them train")
    train = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    test = next((loaded[name] for name in TEST_NAMES if name in loaded), None)
    for name, split in (("train", train), ("test", test)):
        if split is not None and not len(split):
            raise DataError(f"{root} has no samples in {name}; check the files")
    if test is not None and test.features != train.features:
        raise DataError(f"{root} has other columns, or classes, in test than in train; match them")
    return train, test


def _columns(features: datasets.Features, root: str) -> tuple[str | None, str]:
    """The names of the image column, if there is one, and of the label column."""
    import datasets

    def choose(found: list[str], preferred: tuple[str, ...], what: str) -> str | None:
        if len(found) < 2:
            return found[0] if found else None
        named = [name for name in preferred if name in found]
        if not named:
            raise DataError(f"{root} has the {what} columns {_list(found)}; keep one of them")
        return named[0]

    # Files written without the library's metadata have a plain struct of bytes and path.
    of_images = [
        name
        for name, kind in features.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)
    ]
    of_classes = [n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [n for n, kind in features.items() if n in _LABELS and _is_discrete(kind)]
    image = choose(of_images, _IMAGES, "image")
    label = choose(of_classes, _LABELS, "label") or choose(plain, _LABELS, "label")
    if label is None:
        raise DataError(
            f"{root} has the columns {_list(features)}, none of them a label; name the column of "
            "classes `label`"
        )
    return image, label


def _is_discrete(kind: Any) -> bool:
    return getattr(kind, "dtype", "").startswith(("int", "uint", "string", "large_string", "bool"))


def _labels(
    train: datasets.Dataset, test: datasets.Dataset | None, column: str, root: str
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Class names, and the labels of train and test (empty without a test split), int64."""
    given = [_column(split, column, root) for split in (train, test) if split is not None]
    names = getattr(train.features[column], "names", None)
    if names is None:
        values = sorted({value for split in given for value in split.tolist()})
        names = [str(value) for value in values]
        given = [np.searchsorted(values, split) for split in given]
    for split in given:
        wrong = split[(split < 0) | (split >= len(names))]
        if wrong.size:
            raise DataError(
                f"{root} has the label {wrong[0]} in column {column}, of {len(names)} classes; "
                "remove unlabelled samples or splits"
            )
    y = [split.astype(np.int64) for split in given]
    return tuple(names), y[0], y[1] if test is not None else y[0][:0]


def _column(split: datasets.Dataset, column: str, root: str) -> np.ndarray:
    values = split.select_columns(column).with_format("arrow")[:].column(column)
    if values.null_count:
        raise DataError(f"{root} has {values.null_count} empty cells in {column}; fill them")
    return values.to_numpy()


class _Images:
    """The encoded images of a split, as often as they are asked for."""

    def __init__(self, split: datasets.Dataset, column: str, where: str) -> None:
        import datasets

        raw = split.select_columns(column).cast_column(column, datasets.Image(decode=False))
        self._raw, self._column, self._where = raw.with_format("arrow"), column, where

    def __iter__(self) -> Iterator[images.Encoded]:
        row = 0
        for batch in self._raw.iter(1000):
            for cell in batch.column(self._column).to_pylist():
                name = f"{self._where} row {row}"
                if cell is None or cell["bytes"] is cell["path"] is None:
                    raise DataError(f"{name} has no image; remove it")
                yield name, cell["bytes"] if cell["bytes"] is not None else Path(cell["path"])
                row += 1


def _features(split: datasets.Dataset, columns: list[str], root: str) -> Iterator[np.ndarray]:
    """Blocks (k, F) float32."""
    for name in columns:
        kind = getattr(split.features[name], "dtype", "")
        if not kind.startswith(("int", "uint", "float", "double", "bool")):
            raise DataError(
                f"{root} has the column {name} of {kind or 'nested values'}; keep numbers only"
            )
    if not columns:
        raise DataError(f"{root} has no column but its label; add features or images")
    arrow = split.select_columns(columns).with_format("arrow")
    for batch in arrow.iter(10_000):
        cells = [batch.column(name).to_numpy(zero_copy_only=False) for name in columns]
        block = np.stack([column.astype(np.float32) for column in cells], axis=1)
        bad = ~np.isfinite(block).all(axis=0)
        if bad.any():
            name = columns[int(bad.argmax())]
            raise DataError(f"{root} has missing or infinite values in {name}; fill them")
        yield block


def _list(names: Any) -> str:
    return ", ".join(names)
