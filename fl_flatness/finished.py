"""Flatness of a finished run.

What `measure` gives is computed over a seeded subsample of the test set; H_N and H_D over the
run's own partitions, client by client, as the clients themselves compute them during a run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fl_common import assembly
from fl_common.deferred import torch
from fl_common.determinism import seed_of
from fl_common.evaluation import evaluate
from fl_common.failures import first_line
from fl_common.files import write_atomically
from fl_common.results import FLATNESS
from fl_common.wire import model_sha256
from fl_flatness.diagonals import as_sent, estimate, subsample
from fl_flatness.landscape import filter_normalised, line, plane
from fl_flatness.match import match
from fl_flatness.measure import Settings, measure
from fl_flatness.products import Curvature, cut
from fl_flatness.spectrum import Lanczos, eigenpairs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fl_common.config import CoreConfig
    from fl_flatness.stored import Stored

MATCH_PROBES = 200
DENSITY_PROBES = 4
SIDE, LINE, REACH = 21, 41, 1.0
"""Points along each side of the loss plane, and along the line, from -REACH to REACH.  A step of 1
moves each filter by its own length, or all parameters by an eigenvector of length 1."""


@dataclass(frozen=True)
class Options:
    """What is measured; the options of `flatfed flatness`."""

    samples: int = 1024
    """Most test samples, and most of its own samples that a client's diagonal is made from."""
    top: int = 5
    """Largest eigenvalues."""
    probes: int = 32
    """Random vectors of the trace, and of each layer's."""
    density: bool = False
    layers: bool = False
    landscape: bool = False
    line: bool = False
    directions: Literal["random", "eigenvectors"] = "random"
    """Of the landscape and the line."""
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


def unmatched(run: Stored) -> str | None:
    """Why H_N and H_D cannot be had from a folder, as one line; None if they can."""
    if not run.shares:
        return (
            f"{run.folder}: --match: data.partition = local, so that the clients' data are "
            "theirs alone; ask them during the run, with flatness.every and flatness.match"
        )
    if len(run.shares) < 2:
        return f"{run.folder}: --match: the run has 1 client; H_N and H_D compare two or more"
    return None


def examine(run: Stored, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """What `measure.measure` gives, JSON-ready, and besides

    settings: the options; samples: how many test samples were taken.
    accuracy, loss: on the whole test set.
    landscape: losses (SIDE, SIDE) over steps (SIDE,), with `options.landscape`.
    line: losses (LINE,) over steps (LINE,), with `options.line`.
    match: {"paper": {"h_n", "h_d"}, "fedalign-code": the same}, from the same diagonals, with
        `options.match`; or match_error, a line, where they are lost in the noise, or torch cannot
        compute them.

    Raises ValueError where the curvature is not finite.
    """
    run.prepare_process()
    test, transform = run.data.test, assembly.transform(run.config, run.device).eval
    accuracy, loss = evaluate(run.net, test, np.arange(len(test)), transform, run.device)
    chosen = subsample(len(test), options.samples, options.seed).numpy()
    x, y = (torch.from_numpy(a[chosen]).to(run.device) for a in (test.x, test.y))
    x = transform(x)
    found = {
        "settings": asdict(options),
        "samples": len(y),
        "device": run.device.type,
        "model_sha256": model_sha256(run.tensors()),
        "accuracy": accuracy,
        "loss": loss,
    }
    say(f"eigenvalues and trace over {len(y):,} of {len(test):,} test samples")
    found |= measure(run.net, x, y, options.settings, options.seed)
    if options.landscape or options.line:
        found |= _around(run.net, x, y, options, say)
    if options.match:
        try:
            found["match"] = _match(run, options, say)
        except (RuntimeError, ValueError) as error:  # of torch: mostly for want of memory
            found["match_error"] = first_line(error)
    return found


def _around(
    net: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    options: Options,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Losses over the plane of two directions, and along the first of them."""
    curvature = Curvature(net, cut(x, y, options.settings.batch_size))
    if options.directions == "random":  # whose filters are as long as the model's
        first, second = (filter_normalised(curvature, seed=options.seed, index=i) for i in (0, 1))
    else:
        say("the two top eigenvectors")
        first, second = eigenpairs(Lanczos(curvature, seed_of("flatness", options.seed)), 2).vectors
    found: dict[str, Any] = {}
    if options.landscape:
        say(f"{SIDE} x {SIDE} losses around the model")
        steps = _steps(SIDE)
        losses = [_finite(row) for row in plane(curvature, first, second, steps, steps)]
        found["landscape"] = {"steps": steps, "losses": losses}
    if options.line:
        say(f"{LINE} losses along a line")
        losses = _finite(line(curvature, first, _steps(LINE)))
        found["line"] = {"steps": _steps(LINE), "losses": losses}
    return found


def _steps(count: int) -> list[float]:
    return [REACH * (2 * i / (count - 1) - 1) for i in range(count)]


def _finite(losses: torch.Tensor) -> list[float | None]:
    """JSON has no infinity."""
    return [a if np.isfinite(a) else None for a in losses.tolist()]


def _match(run: Stored, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """H_N and H_D; for equal settings and seeds those of the last round of the run itself."""
    config, train = _asking(run.config, options), run.data.train
    transform = assembly.transform(config, run.device).eval
    sent: dict[str, list[torch.Tensor]] = {"paper": [], "fedalign-code": []}
    for k, share in enumerate(run.shares):
        say(f"diagonal of client {k}, {len(share.train):,} samples")
        x, y = (torch.from_numpy(a[share.train]).to(run.device) for a in (train.x, train.y))
        halves = estimate(run.net, x, y, transform, config, config.run.rounds)
        for mode, diagonals in sent.items():
            diagonals.append(as_sent(halves, mode, run.net))
    return {mode: asdict(match(diagonals, mode)) for mode, diagonals in sent.items()}


def _asking(config: CoreConfig, options: Options) -> CoreConfig:
    """The settings by which clients estimate; their partitions do not depend on what differs."""
    how = {"samples": options.samples, "match_probes": options.match_probes}
    flatness = config.flatness.model_copy(update=how)
    run = config.run.model_copy(update={"seed": options.seed})
    return config.model_copy(update={"flatness": flatness, "run": run})


def write(folder: Path, found: dict[str, Any]) -> Path:
    """flatness.json, whole or not at all; gives its path.  Raises OSError."""
    path = folder / FLATNESS
    write_atomically(path, (json.dumps(found, indent=2, allow_nan=False) + "\n").encode())
    return path
