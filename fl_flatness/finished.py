"""Flatness of a finished run: its model, put together again from its results folder.

What `measure` gives is computed over a seeded subsample of the test set; H_N and H_D over the
run's own partitions, client by client, as the clients themselves compute them during a run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fl_common import assembly
from fl_common.config import ConfigError, absolute_paths, resolve
from fl_common.evaluation import evaluate
from fl_common.files import write_atomically
from fl_common.layout import tensors_of
from fl_common.wire import model_sha256
from fl_flatness.diagonals import estimate, subsample
from fl_flatness.landscape import filter_normalised, plane
from fl_flatness.match import match
from fl_flatness.measure import Settings, measure
from fl_flatness.products import Curvature, cut

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_common.assembly import Share
    from fl_common.config import CoreConfig
    from fl_common.data.sources import Dataset

FLATNESS, MODEL = "flatness.json", "model.safetensors"
MATCH_PROBES = 200
DENSITY_PROBES = 4
SIDE, REACH = 21, 1.0
"""Points along each side of the loss plane, which goes from -REACH to REACH: at 1 a filter is
moved by as much as it is long."""


@dataclass(frozen=True)
class Options:
    """What is measured; the options of `flatfed flatness`."""

    samples: int = 1024
    """Test samples, and at most of its own that a client's diagonal is made from."""
    top: int = 5
    """Largest eigenvalues."""
    probes: int = 32
    """Random vectors of the trace, and of each layer's."""
    density: bool = False
    layers: bool = False
    landscape: bool = False
    match: bool = False
    match_probes: int = MATCH_PROBES
    """Random vectors of each client's diagonal."""
    engine: Literal["own", "pyhessian"] = "own"
    seed: int = 0
    """Of samples and random vectors, the same for all runs."""

    @property
    def settings(self) -> Settings:
        density = DENSITY_PROBES if self.density else 0
        return Settings(
            engine=self.engine, probes=self.probes, top=self.top, density_probes=density,
            layers=self.layers,
        )  # fmt: skip

    def errors(self) -> list[str]:
        """Every mistake, a line each."""
        most = self.settings.steps
        found = {
            f"--samples {self.samples}: must be at least 1": self.samples < 1,
            f"--top {self.top}: must be from 1 to {most}": not 1 <= self.top <= most,
            f"--probes {self.probes}: must be at least 2": self.probes < 2,
            f"--match-probes {self.match_probes}: must be even, and at least 2": (
                self.match_probes < 2 or self.match_probes % 2
            ),
            "--engine pyhessian: it is not installed; pip install 'flatfed[pyhessian]', or leave "
            "it at own": self.engine == "pyhessian" and find_spec("pyhessian") is None,
        }
        return [line for line, wrong in found.items() if wrong]


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run: its settings, its data and its final model."""

    folder: Path
    config: CoreConfig
    data: Dataset
    shares: list[Share]
    """The clients' samples; empty where every node has its own data."""
    net: torch.nn.Module
    device: torch.device

    @classmethod
    def load(cls, folder: Path, data_path: Path | None = None) -> Finished:
        """The run in `folder`, its data at `data_path` if they are not where they were.

        Raises ValueError with one line where something is missing or does not fit.
        """
        if not (folder / MODEL).is_file():
            raise ValueError(
                f"{folder}: holds no model ({MODEL}), the run has not ended; `flatfed resume "
                f"{folder}` completes it"
            )
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

    def unmatched(self) -> str | None:
        """Why H_N and H_D cannot be had from this folder, as one line; None if they can."""
        if not self.shares:
            return (
                f"{self.folder}: --match: data.partition = local, so that the clients' data are "
                "theirs alone; ask them during the run, with flatness.every and flatness.match"
            )
        if len(self.shares) < 2:
            return f"{self.folder}: --match: the run has 1 client; H_N and H_D compare two or more"
        return None

    def measure(self, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
        """What `measure.measure` gives, JSON-ready, and besides

        settings: the options; samples: how many test samples there were to take.
        accuracy, loss: on the whole test set.
        landscape: losses (SIDE, SIDE) over steps (SIDE,), with `options.landscape`.
        match: {"paper": {"h_n", "h_d"}, "fedalign-code": the same}, from the same diagonals, with
            `options.match`; or match_error, a line, where they are lost in the noise.

        Raises ValueError where the curvature is not finite.
        """
        determinism.prepare_process(self.config.train.threads, self.config.train.deterministic)
        test, transform = self.data.test, assembly.transform(self.config).eval
        accuracy, loss = evaluate(self.net, test, np.arange(len(test)), transform, self.device)
        chosen = subsample(len(test), options.samples, options.seed).numpy()
        x, y = (torch.from_numpy(a[chosen]).to(self.device) for a in (test.x, test.y))
        x = transform(x)
        found = {
            "settings": asdict(options),
            "samples": len(y),
            "device": self.device.type,
            "model_sha256": model_sha256(_tensors(self.net)),
            "accuracy": accuracy,
            "loss": loss,
        }
        say(f"eigenvalues and trace over {len(y):,} of {len(test):,} test samples")
        found |= measure(self.net, x, y, options.settings, options.seed)
        if options.landscape:
            say(f"{SIDE} x {SIDE} losses around the model")
            found["landscape"] = self._landscape(x, y, options.seed)
        if options.match:
            try:
                found["match"] = self._match(options, say)
            except ValueError as error:
                found["match_error"] = str(error)
        return found

    def _landscape(self, x: torch.Tensor, y: torch.Tensor, seed: int) -> dict[str, Any]:
        """Over the plane of two random directions, whose filters are as long as the model's."""
        curvature = Curvature(self.net, cut(x, y, Settings.batch_size))
        first, second = (filter_normalised(curvature, seed=seed, index=i) for i in (0, 1))
        steps = [REACH * (2 * i / (SIDE - 1) - 1) for i in range(SIDE)]
        losses = plane(curvature, first, second, steps, steps).tolist()
        # JSON has no infinity.
        finite = [[a if np.isfinite(a) else None for a in row] for row in losses]
        return {"steps": steps, "losses": finite}

    def _match(self, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
        """As in the last round of the run itself, for equal settings and seeds."""
        config, train = _asking(self.config, options), self.data.train
        transform = assembly.transform(config).eval
        diagonals = []
        for k, share in enumerate(self.shares):
            say(f"diagonal of client {k}, {len(share.train):,} samples")
            x, y = (torch.from_numpy(a[share.train]).to(self.device) for a in (train.x, train.y))
            diagonals.append(estimate(self.net, x, y, transform, config, config.run.rounds))
        sizes = [p.numel() for p in self.net.parameters() if p.requires_grad]
        return {mode: asdict(match(diagonals, mode, sizes)) for mode in ("paper", "fedalign-code")}


def write(folder: Path, found: dict[str, Any]) -> Path:
    """flatness.json, whole or not at all; gives its path.  Raises OSError."""
    path = folder / FLATNESS
    write_atomically(path, (json.dumps(found, indent=2, allow_nan=False) + "\n").encode())
    return path


def _config(folder: Path, data_path: Path | None) -> CoreConfig:
    """The run's settings, for this process on this machine.  Raises ConfigError, ValueError."""
    values = json.loads((folder / "config.json").read_text())
    values |= {"engine.name": "inprocess", "engine.connection": "", "client.state-dir": ""}
    if not Path(values.get("data.cache-dir", "")).is_dir():
        values["data.cache-dir"] = ""
    if data_path is not None:
        values["data.path"] = str(data_path)
    return resolve(absolute_paths(values))


def _asking(config: CoreConfig, options: Options) -> CoreConfig:
    """What a client is asked by: its partition does not depend on this."""
    how = {"samples": options.samples, "match_probes": options.match_probes, "match": "paper"}
    flatness = config.flatness.model_copy(update=how)
    run = config.run.model_copy(update={"seed": options.seed})
    return config.model_copy(update={"flatness": flatness, "run": run})


def _device(config: CoreConfig) -> torch.device:
    """The run's, or the best that this machine has."""
    try:
        return assembly.training_device(config)
    except ValueError:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _shares(folder: Path, config: CoreConfig, data: Dataset) -> list[Share]:
    """The samples of every client.  Raises ValueError if they are not those of the run."""
    told = json.loads((folder / "clients.json").read_text())
    partitions = assembly.split_data(config, data)
    clients = range(0 if partitions is None else config.clients.number)
    shares = [assembly.share_of(config, data, partitions, k) for k in clients]
    if told["classes"] == list(data.classes):
        labels = [data.train.y[share.train] for share in shares]
        counts = [np.bincount(y, minlength=len(data.classes)).tolist() for y in labels]
        if not shares or counts == told["label_counts"]:
            return shares
    raise ValueError(
        "the data here are not those of the run, by classes or labels (clients.json); name their "
        "place with --data-path"
    )


def _tensors(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that a results folder keeps of a network, by name."""
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
                f"{path}: does not fit config.json: {name} is {there or 'not there'}, and "
                f"{here or 'no tensor'} in model.name = {model}"
            )
    for name, tensor in own.items():
        tensor.copy_(saved[name])
