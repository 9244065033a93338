"""Rounds reported, as they end, to TensorBoard, MLflow or Weights & Biases (`tracking.to`).

The history is the truth, and trackers get a copy: one that fails is left out for the rest of the
run, and a run that is resumed reports to each only the rounds that it has not had.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from typing import TYPE_CHECKING, Any, Protocol

from fl_common.config import methods

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fl_common.config import CoreConfig, Scalar

Numbers = dict[str, float]

REMEDIES = {
    "tensorboard": "pip install 'flatfed[tracking]'",
    "mlflow": "pip install mlflow",
    "wandb": "pip install wandb",
    "pyhessian": 'pip install "flatfed[pyhessian]"',
}
COUNTED = ("cohort", "replies", "failed", "rejected", "evaluation_failed", "flatness_failed")
"""Columns of a history that name clients; their number is told."""
AVERAGED = ("client_accuracy_before", "client_accuracy_after")
"""Columns with a number per client, whose mean is in no other column."""
PROJECT = "flatfed"
"""MLflow's experiment and W&B's project, unless their own environment variables say another."""


def missing(config: CoreConfig) -> list[str]:
    """A line for everything that only the server needs and that is not installed here."""
    wanted = {name: f'tracking.to = "{name}"' for name in config.tracking.names}
    if config.flatness.engine == "pyhessian":
        wanted["pyhessian"] = 'flatness.engine = "pyhessian"'
    return [
        f"{key}: it is not installed where the server runs; {REMEDIES[name]}, or leave it out"
        for name, key in wanted.items()
        if importlib.util.find_spec(name) is None
    ]


def numbers_of(row: Mapping[str, Any]) -> Numbers:
    """What is told of a round: every number of its row, how many clients each list names, the mean
    over the clients' accuracies before and after training and over the steps' gradient norms, and
    the layers' measures.  What is not finite is null in the row, and left out."""
    told: Numbers = {}
    for key, value in row.items():
        if key in COUNTED:
            told[key] = len(value)
        elif key in AVERAGED:
            told[key] = sum(value.values()) / len(value)
        elif key == "grad_norm":
            told |= {f"{key}/{group}": sum(norms) / len(norms) for group, norms in value.items()}
        elif key == "layers":
            for layer in value:
                told |= {f"{key}/{layer['layer']}/{k}": v for k, v in _numeric(layer).items()}
        elif key != "round":
            told |= _numeric({key: value})
    return told


def settings_of(config: CoreConfig) -> dict[str, Scalar]:
    """The settings, less those of methods that take no part."""
    known = {*methods("strategies"), *methods("regularizers")}
    idle = known - {config.strategy.name, *config.regularizer_names}
    return {k: v for k, v in config.flat().items() if k.partition(".")[0] not in idle}


def _numeric(values: Mapping[str, Any]) -> Numbers:
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class Tracker(Protocol):
    """Takes the rounds of a run.  It may raise whatever it likes."""

    last: int
    """The last round that it has had; 0 for none."""

    def row(self, server_round: int, numbers: Numbers) -> None: ...

    def close(self, summary: Mapping[str, Any]) -> None:
        """The run has ended: summary["status"] is completed or failed."""


class Tracking:
    """All trackers of a run."""

    def __init__(
        self,
        config: CoreConfig,
        folder: Path,
        experiment: str,
        rows: Sequence[Mapping[str, Any]],
        note: Callable[[str], None],
    ) -> None:
        """Start or continue the run `experiment` in each tracker, and report the `rows` so far."""
        self._note = note
        self._trackers: dict[str, Tracker] = {}
        settings = settings_of(config)
        for name in config.tracking.names:
            self._try(name, lambda name=name: self._open(name, folder, experiment, settings, rows))

    def _open(
        self,
        name: str,
        folder: Path,
        experiment: str,
        settings: Mapping[str, Scalar],
        rows: Sequence[Mapping[str, Any]],
    ) -> None:
        tracker = OPEN[name](folder, experiment, settings)
        for row in rows:
            if row["round"] > tracker.last:
                tracker.row(row["round"], numbers_of(row))
        self._trackers[name] = tracker

    def row(self, row: Mapping[str, Any]) -> None:
        for name, tracker in [*self._trackers.items()]:
            # Rounds that are played again after a resume may have been told already.
            if row["round"] > tracker.last:
                self._try(name, lambda t=tracker: t.row(row["round"], numbers_of(row)))

    def close(self, summary: Mapping[str, Any]) -> None:
        for name, tracker in [*self._trackers.items()]:
            self._try(name, lambda t=tracker: t.close(summary))
        self._trackers.clear()

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._trackers.pop(name, None)
            why = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            self._note(f"warning: tracking.to = {name}: {why}; the run goes on without it")


class TensorBoard:
    """Event files in the results folder, so that `tensorboard --logdir results` names each run by
    its folder.  Numbers are float32 there."""

    def __init__(self, folder: Path, experiment: str, settings: Mapping[str, Scalar]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # A new file that begins anew: readers forget what is in earlier ones of this folder.
        self.last = 0
        self._writer = SummaryWriter(str(folder), purge_step=0)
        scores = {"accuracy": 0.0, "loss": 0.0}  # their values are those of the curves
        experiment_, start, self._end = hparams(dict(settings), scores)
        for summary in (experiment_, start):
            self._writer.file_writer.add_summary(summary)
        rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)
        self._writer.flush()

    def row(self, server_round: int, numbers: Numbers) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, server_round)
        self._writer.flush()

    def close(self, summary: Mapping[str, Any]) -> None:
        told = json.dumps(summary, indent=4).replace("\n", "\n    ")
        self._writer.add_text("summary", f"    {told}", summary["rounds"])
        if summary["status"] == "completed":
            self._writer.file_writer.add_summary(self._end)
        self._writer.close()


class MLflow:
    """A run in the experiment $MLFLOW_EXPERIMENT_NAME of $MLFLOW_TRACKING_URI, or of a database
    beside the results folder; found again by its tag."""

    TAG = "flatfed.experiment"

    def __init__(self, folder: Path, experiment: str, settings: Mapping[str, Scalar]) -> None:
        # Else a server that is gone holds up every round for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._metric, self._tag = Metric, RunTag
        uri, files = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:  # its own default is the working directory, which on Ray is soon gone
            uri, files = f"sqlite:///{folder.parent / 'mlflow.db'}", folder.parent / "mlflow"
        self._client = MlflowClient(uri)
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        known = self._client.get_experiment_by_name(project)
        where = (
            known.experiment_id
            if known
            else self._client.create_experiment(project, str(files) if files else None)
        )
        found = self._client.search_runs([where], f"tags.`{self.TAG}` = '{experiment}'")
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            told = self._client.get_metric_history(self._run, "seconds")
            self.last = max((metric.step for metric in told), default=0)
            return
        made = self._client.create_run(where, tags={self.TAG: experiment}, run_name=folder.name)
        self._run, self.last = made.info.run_id, 0
        params = [Param(key, str(value)) for key, value in settings.items()]
        for i in range(0, len(params), 100):  # as many as it takes at once
            self._client.log_batch(self._run, params=params[i : i + 100])

    def row(self, server_round: int, numbers: Numbers) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [
            self._metric(_plain(key), value, now, server_round) for key, value in numbers.items()
        ]
        for i in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[i : i + 1000])

    def close(self, summary: Mapping[str, Any]) -> None:
        words = {k: v for k, v in summary.items() if isinstance(v, str)}
        self.row(summary["rounds"], {f"summary/{k}": v for k, v in _numeric(summary).items()})
        self._client.log_batch(self._run, tags=[self._tag(k, v) for k, v in words.items()])
        ended = "FINISHED" if summary["status"] == "completed" else "FAILED"
        self._client.set_terminated(self._run, ended)


def _plain(key: str) -> str:
    """A name that MLflow takes: a layer's may have any character."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in key)


class WandB:
    """A run of the project $WANDB_PROJECT, or flatfed; its id is that of the experiment."""

    def __init__(self, folder: Path, experiment: str, settings: Mapping[str, Scalar]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=experiment,
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.last = self._run.step - 1 if self._run.resumed else 0

    def row(self, server_round: int, numbers: Numbers) -> None:
        self._run.log(dict(numbers), step=server_round)

    def close(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary["status"] == "completed" else 1)


OPEN: dict[str, Callable[[Path, str, Mapping[str, Scalar]], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}
