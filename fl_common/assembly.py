"""From the configuration to the objects that server and clients both need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fl_common.data.partition import cached_partition
from fl_common.data.sources import load
from fl_common.data.transforms import pipeline
from fl_common.determinism import seed_of
from fl_common.models.catalogue import build

if TYPE_CHECKING:
    from fl_common.config import CoreConfig
    from fl_common.data.partition import Partition
    from fl_common.data.sources import Dataset
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
    )


def split_data(config: CoreConfig, data: Dataset) -> Partition:
    """Which training samples each client holds."""
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


def new_model(config: CoreConfig, data: Dataset, device: torch.device) -> torch.nn.Module:
    """The model as every run with this seed starts it."""
    shape = data.shape if len(data.shape) == 1 else transform(config).shape(data.shape)
    torch.manual_seed(seed_of("init", config.run.seed))
    net = build(config.model.name, classes=len(data.classes), shape=shape, norm=config.model.norm)
    return net.to(device, parameter_dtype(config))


def transform(config: CoreConfig) -> Transform:
    """What a batch goes through before the model."""
    return pipeline(config.data.source, config.data.augment, parameter_dtype(config))


def parameter_dtype(config: CoreConfig) -> torch.dtype:
    """Parameters stay float32 under bfloat16 autocast."""
    return torch.float64 if config.train.dtype == "float64" else torch.float32


def training_device(config: CoreConfig) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU."""
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
