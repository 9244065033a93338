"""From the configuration to the objects that server and clients both need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fl_common.config import methods, shown
from fl_common.data.errors import DataError
from fl_common.data.partition import cached_partition
from fl_common.data.sources import load
from fl_common.data.transforms import pipeline
from fl_common.determinism import seed_of
from fl_common.groups import Groups
from fl_common.layout import PARAMS
from fl_common.models.catalogue import MODELS, build

if TYPE_CHECKING:
    from fl_common.config import CoreConfig
    from fl_common.data.partition import Partition
    from fl_common.data.sources import Dataset, Split
    from fl_common.data.transforms import Transform


def load_data(config: CoreConfig) -> Dataset:
    """The configured data set, memory-mapped from its cache; decoded first if need be."""
    data = config.data
    return load(
        data.source,
        data.path,
        cache_dir=data.cache_dir or None,
        seed=config.run.seed,
        image_size=data.image_size,
        every_class=data.partition != "local",
    )


def split_data(config: CoreConfig, data: Dataset) -> Partition | None:
    """Which training samples each client holds; None if every node has its own data."""
    if config.data.partition == "local":
        return None
    return cached_partition(
        data,
        scheme=config.data.partition,
        clients=config.clients.number,
        seed=config.run.seed,
        alpha=config.data.alpha,
        min_size=config.data.min_size,
        classes_per_client=config.data.classes_per_client,
        cache_dir=config.data.cache_dir or None,
    )


@dataclass(frozen=True, eq=False)
class Share:
    """One client's samples: indices into `train`, and into the split that it evaluates on."""

    train: np.ndarray
    """(n_i,) int64, into the data set's training samples."""
    held_out: np.ndarray
    """(h_i,) int64, into `held_out_of`; empty if clients do not evaluate."""
    held_out_of: Split


def share_of(config: CoreConfig, data: Dataset, partitions: Partition | None, i: int) -> Share:
    """Client i's samples.

    With data.partition=local (no partitions): this node's data, its own test split held out.  Else
    its partition, of which `eval.holdout` is held out if clients evaluate at all.  At most
    `data.max-samples` are kept.  Draws come from the stream (seed, partition).  Raises DataError
    if nothing is left to train on.
    """
    evaluates = config.eval.on != "server"
    indices = np.arange(len(data.train)) if partitions is None else np.asarray(partitions[i])
    if 0 < (most := config.data.max_samples) < len(indices):
        drawn = np.random.default_rng(seed_of("max-samples", config.run.seed, i))
        indices = np.sort(drawn.permutation(indices)[:most])
    if partitions is None:
        held_out = np.arange(len(data.test) if evaluates else 0)
        return Share(indices, held_out, data.test)
    count = max(1, round(config.eval.holdout * len(indices))) if evaluates else 0
    if count >= len(indices):
        raise DataError(
            f"client {i} has {len(indices)} samples, too few to train and to hold out; raise "
            "data.min-size or data.max-samples, or lower clients.number or eval.holdout"
        )
    order = np.random.default_rng(seed_of("holdout", config.run.seed, i)).permutation(indices)
    return Share(np.sort(order[count:]), np.sort(order[:count]), data.train)


def input_shape(config: CoreConfig, data: Dataset) -> tuple[int, ...]:
    """A sample's shape as the model receives it, (C, H, W) or (F,)."""
    if len(data.shape) == 1:
        return data.shape
    return transform(config, torch.device("cpu")).shape(data.shape)


def new_model(
    config: CoreConfig, classes: int, shape: tuple[int, ...], device: torch.device
) -> torch.nn.Module:
    """The initial model, the same for every run with this seed."""
    torch.manual_seed(seed_of("init", config.run.seed))
    model = config.model
    net = build(model.name, classes=classes, shape=shape, norm=model.norm, head=model.head)
    for name in config.regularizer_names:
        methods("regularizers")[name].prepare(net, config.params_of(name))
    order = torch.channels_last if innermost(config, device) else torch.preserve_format
    return net.to(device, parameter_dtype(config), memory_format=order)


def groups_of(config: CoreConfig, net: torch.nn.Module, shape: tuple[int, ...]) -> Groups:
    """The groups of layers that have versions of their own.  Raises ValueError."""
    if not methods("strategies")[config.strategy.name].partial:
        return Groups.whole(net)
    patterns = config.params_of(config.strategy.name).groups
    if not patterns:
        return Groups.of(net, shape)
    try:
        return Groups.matching(net, patterns)
    except ValueError as error:
        key = f"{config.strategy.name}.groups = {shown(patterns)}"
        raise ValueError(f"{key}: {error}") from error


def layers_of(config: CoreConfig, net: torch.nn.Module, shape: tuple[int, ...]) -> Groups:
    """The groups of layers that a run reports one by one: its own groups, or each layer."""
    groups = groups_of(config, net, shape)
    return Groups.of(net, shape) if PARAMS in groups.members else groups


def transform(config: CoreConfig, device: torch.device) -> Transform:
    """What a batch goes through before the model on `device`."""
    return pipeline(
        config.data.source,
        config.data.augment,
        parameter_dtype(config),
        channels_last=innermost(config, device),
    )


def innermost(config: CoreConfig, device: torch.device) -> bool:
    """Whether channels lie innermost in memory on `device`; with `auto`, only where that is faster,
    in networks that are known to allow it (`x.view(len(x), -1)` does not)."""
    train, known = config.train, MODELS.get(config.model.name)
    if train.channels_last != "auto" or known is None:
        return train.channels_last == "on"
    if device.type == "cuda":
        return train.dtype == "bfloat16"
    return train.dtype == "float32" and known.innermost


def parameter_dtype(config: CoreConfig) -> torch.dtype:
    """Parameters stay float32 under bfloat16 autocast."""
    return torch.float64 if config.train.dtype == "float64" else torch.float32


def training_device(config: CoreConfig) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU.

    A run on Ray without shares of a GPU is on the CPU: Ray counts no card for its clients, but
    does not hide one from them.  Raises ValueError if this machine does not have the device.
    """
    name = config.train.device
    if name == "auto":
        without = config.engine.name == "ray" and not config.engine.client_gpus
        name = "cuda" if torch.cuda.is_available() and not without else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"train.device = {name}: this machine has {torch.cuda.device_count()} CUDA devices "
            "that torch can use; set cpu, or auto"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
