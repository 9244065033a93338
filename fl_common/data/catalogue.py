"""The data sets by name, and the checks that need none of their samples.

Importing this module imports only the standard library: config validation uses it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fl_common.data import layouts
from fl_common.data.errors import DataError

PARTITIONS = ("iid", "dirichlet", "dirichlet-balanced", "pathological", "local")
"""local: every node trains on its own data, whole."""


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a data set before it is read.

    path: whether `data.path` is given. Where it is optional, an empty path means `hub`.
    hub: the data set's name on the Hugging Face hub.
    train_size: training samples; None where only reading tells, as for classes and shape.
    shape: a sample as a model receives it, (C, H, W) or (F,); (V, L) of L tokens out of V, which
        come as their ids (L,).
    pipelines: the values of `data.augment` it has (see transforms.py).
    resizable: whether `data.image-size` applies.
    """

    help: str
    path: Literal["none", "optional", "required"] = "none"
    hub: str = ""
    train_size: int | None = None
    classes: int | None = None
    shape: tuple[int, ...] | None = None
    pipelines: tuple[str, ...] = ("default", "none")
    resizable: bool = False


_ANY_IMAGES = ("default", "none", "crop-flip")

SOURCES: dict[str, SourceInfo] = {
    "digits": SourceInfo(
        "scikit-learn's handwritten digits: real 8 x 8 images, in the package",
        train_size=1438,
        classes=10,
        shape=(1, 8, 8),
    ),
    "breast-cancer": SourceInfo(
        "scikit-learn's breast cancer table: 30 standardised features, in the package",
        train_size=456,
        classes=2,
        shape=(30,),
    ),
    "synthetic": SourceInfo(
        "random images and labels of CIFAR-10's shape and size, to measure speed",
        train_size=50_000,
        classes=10,
        shape=(3, 32, 32),
        pipelines=_ANY_IMAGES,
    ),
    "synthetic-text": SourceInfo(
        "made-up documents of 16 to 32 words, on topics that differ in which word follows which",
        train_size=4200,
        classes=6,
        shape=(256, 32),
    ),
    "cifar10": SourceInfo(
        "CIFAR-10: parquet files or the binary version; empty path: from the hub",
        path="optional",
        hub="uoft-cs/cifar10",
        train_size=50_000,
        classes=10,
        shape=(3, 32, 32),
        pipelines=(*_ANY_IMAGES, "fedalign", "moon", "feddc", "fling"),
    ),
    "cifar100": SourceInfo(
        "CIFAR-100 (fine labels): parquet files or the binary version; empty path: from the hub",
        path="optional",
        hub="uoft-cs/cifar100",
        train_size=50_000,
        classes=100,
        shape=(3, 32, 32),
        pipelines=(*_ANY_IMAGES, "fedalign", "feddc", "fling"),
    ),
    "tiny-imagenet": SourceInfo(
        "Tiny-ImageNet: the published folder or parquet files; empty path: from the hub",
        path="optional",
        hub="zh-plus/tiny-imagenet",
        train_size=100_000,
        classes=200,
        shape=(3, 64, 64),
        pipelines=(*_ANY_IMAGES, "fling"),
    ),
    "imagenet-200": SourceInfo(
        "FedAlign's 200 classes of a local ImageNet (train/ and val/ by class); 20 GB of cache",
        path="required",
        train_size=100_000,
        classes=200,
        shape=(3, 224, 224),
        pipelines=("default", "none", "fedalign"),
    ),
    "folder": SourceInfo(
        "images in a folder per class: train/ and test/ (or val/), or one tree, a fifth held out",
        path="required",
        pipelines=_ANY_IMAGES,
        resizable=True,
    ),
    "huggingface": SourceInfo(
        "images or numeric columns with a label: a parquet file, a folder of parquet, csv or json "
        "files, a folder that `datasets` has saved, or a hub name (owner/name[@revision])",
        path="required",
        pipelines=_ANY_IMAGES,
        resizable=True,
    ),
}


def is_local_path(source: str, path: str) -> bool:
    """Whether `path` names a place in the file system, rather than a data set on the hub."""
    return bool(path) and not (source == "huggingface" and layouts.is_hub_name(path))


def check(
    source: str,
    path: str = "",
    *,
    partition: str = "iid",
    clients: int = 1,
    min_size: int = 10,
    classes_per_client: int = 2,
    augment: str = "default",
    image_size: int = 0,
    on_nodes: bool = False,
) -> list[tuple[str, str]]:
    """What is wrong with these settings of a source: (key, one line with the remedy); nothing is
    decoded.

    on_nodes: the data lie on other machines, so that the path is not looked up here.
    """
    info = SOURCES[source]
    errors = [] if on_nodes else _check_path(source, path, info)
    if augment not in info.pipelines:
        errors.append(
            ("data.augment", f"{source} has no {augment}; it has {', '.join(info.pipelines)}")
        )
    if image_size and not info.resizable:
        errors.append(
            ("data.image-size", f"{source} has its own size; leave it at 0, or use folder")
        )
    if not errors and source == "folder" and partition != "local" and not on_nodes:
        try:
            info = replace(info, train_size=layouts.train_size(path))
        except DataError as error:
            errors.append(("data.path", str(error)))
    errors += _check_partition(info, partition, clients, min_size, classes_per_client)
    return errors


def _check_path(source: str, path: str, info: SourceInfo) -> list[tuple[str, str]]:
    if info.path == "none" and path:
        return [("data.path", f"{source} is in the package; leave it empty")]
    if info.path == "required" and not path:
        return [("data.path", f"{source} needs one: {info.help}")]
    try:
        layouts.find(source, path, info.hub)
    except DataError as error:
        return [("data.path", str(error))]
    return []


def _check_partition(
    info: SourceInfo, partition: str, clients: int, min_size: int, classes_per_client: int
) -> list[tuple[str, str]]:
    n = info.train_size if partition != "local" else None
    if n is not None and clients > n:
        return [("clients.number", f"{clients} clients, but {n} training samples; lower it")]
    if n is not None and partition == "dirichlet" and clients * min_size > n:
        return [
            (
                "data.min-size",
                f"{clients} clients of at least {min_size} need {clients * min_size} samples, "
                f"there are {n}; lower it or clients.number",
            )
        ]
    if partition == "pathological" and info.classes and classes_per_client > info.classes:
        return [("data.classes-per-client", f"there are {info.classes} classes; lower it")]
    if partition == "pathological" and clients * classes_per_client < (info.classes or 0):
        return [
            (
                "data.classes-per-client",
                f"{clients} clients of {classes_per_client} hold at most "
                f"{clients * classes_per_client} of {info.classes} classes, and no client would "
                "have the others; raise it or clients.number",
            )
        ]
    return []
