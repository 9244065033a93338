"""A finished run, put together again from its results folder: settings, data, final model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fl_common import assembly
from fl_common.config import ConfigError, absolute_paths, resolve
from fl_common.layout import tensors_of
from fl_common.results import CLIENTS, CONFIG, MODEL, checkpoints

if TYPE_CHECKING:
    from fl_common.assembly import Share
    from fl_common.config import CoreConfig
    from fl_common.data.sources import Dataset


@dataclass(frozen=True, eq=False)
class Stored:
    """A finished run: its settings, its data and its final model."""

    folder: Path
    config: CoreConfig
    data: Dataset
    shares: list[Share]
    """The clients' samples; empty where every node has its own data."""
    net: torch.nn.Module
    device: torch.device

    @classmethod
    def load(cls, folder: Path, data_path: Path | None = None) -> Stored:
        """The run in `folder`, its data at `data_path` if they are not where they were.

        Raises ValueError with one line where something is missing or does not fit.
        """
        if not (folder / MODEL).is_file():
            remedy = f"; `flatfed resume {quote(str(folder))}` completes it"
            raise ValueError(
                f"{folder}: holds no model ({MODEL}): the run has not ended"
                + (remedy if checkpoints(folder) else "")
            )
        for name in (CONFIG, CLIENTS):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: holds no {name}, which is needed to rebuild the model")
        try:
            config = _config(folder, data_path)
            data = assembly.load_data(config)
            shares = _shares(folder, config, data)
            shape = assembly.input_shape(config, data)
            device = _device(config)
            net = assembly.new_model(config, len(data.classes), shape, device)
        except ConfigError as error:
            raise ValueError(f"{folder}: {'; '.join(error.errors)}") from None
        except Exception as error:  # the model and the data may be the user's own
            line = " ".join(str(error).split())
            raise ValueError(f"{folder}: {line or type(error).__name__}") from error
        _fill(net, folder / MODEL, config.model.name)
        return cls(folder, config, data, shares, net, device)

    def prepare_process(self) -> None:
        """The process settings of the run."""
        train = self.config.train
        determinism.prepare_process(train.threads, train.deterministic, self.device.type)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a results folder keeps of the network, by name."""
        return _tensors(self.net)


def _config(folder: Path, data_path: Path | None) -> CoreConfig:
    """The run's settings, for this process on this machine.  Raises ConfigError, ValueError."""
    values = json.loads((folder / CONFIG).read_text())
    values |= {
        "engine.name": "inprocess", "engine.connection": "", "engine.client-gpus": 0.0,
        "engine.workers": "auto", "engine.cohort": "1",
        "clients.keys": "", "client.state-dir": "", "flatness.engine": "own",
    }  # fmt: skip
    if not Path(values.get("data.cache-dir", "")).is_dir():
        values["data.cache-dir"] = ""
    if data_path is not None:
        values["data.path"] = str(data_path)
    return resolve(absolute_paths(values))


def _device(config: CoreConfig) -> torch.device:
    """The run's, or the best that this machine has."""
    try:
        return assembly.training_device(config)
    except ValueError:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _shares(folder: Path, config: CoreConfig, data: Dataset) -> list[Share]:
    """The samples of every client.  Raises ValueError if they are not those of the run."""
    told = json.loads((folder / CLIENTS).read_text())
    partitions = assembly.split_data(config, data)
    clients = range(0 if partitions is None else config.clients.number)
    shares = [assembly.share_of(config, data, partitions, k) for k in clients]
    if told["classes"] == list(data.classes):
        labels = [data.train.y[share.train] for share in shares]
        counts = [np.bincount(y, minlength=len(data.classes)).tolist() for y in labels]
        if not shares or counts == told["label_counts"]:
            return shares
    raise ValueError(
        f"the data here are not those of the run: classes or labels differ ({CLIENTS}); "
        "give their place with --data-path"
    )


def _tensors(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By name."""
    return {name: t for tensors in tensors_of(net).values() for name, t in tensors.items()}


@torch.no_grad()
def _fill(net: torch.nn.Module, path: Path, model: str) -> None:
    """Copy the tensors of the file into the network.  Raises ValueError if they do not fit."""
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    own = _tensors(net)
    for name in [*own, *saved]:
        here, there = (
            f"{tuple(t[name].shape)} {t[name].dtype}".replace("torch.", "") if name in t else None
            for t in (own, saved)
        )
        if here != there:
            raise ValueError(
                f"{path}: does not fit {CONFIG}: {name} is {there or 'not there'}, and "
                f"{here or 'no tensor'} in model.name = {model}"
            )
    for name, tensor in own.items():
        tensor.copy_(saved[name])
