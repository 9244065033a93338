"""A run's results folder: config.json, clients.json, history.jsonl, summary.json,
model.safetensors, and the pictures curves.png and clients.png."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_common.wire import model_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from fl_common.config import CoreConfig, Scalar
    from fl_server.roster import Member

CONFIG, CLIENTS, HISTORY = "config.json", "clients.json", "history.jsonl"
SUMMARY, MODEL = "summary.json", "model.safetensors"


def default_output_dir() -> Path:
    """Where plain `flwr run` leaves results: its working directory is not the user's."""
    return Path(os.environ.get("FLATFED_RESULTS") or Path.home() / "flatfed-results")


def timestamp() -> str:
    """A folder name that sorts by time: 20260131-235959-123."""
    now = time.time()
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(now)) + f"-{int(now % 1 * 1000):03d}"


def results_folder(output_dir: str, name: str) -> Path:
    base = Path(output_dir) if output_dir else default_output_dir()
    return base / (name or timestamp())


def folder_error(folder: Path) -> str | None:
    """Why results cannot go to `folder`, as one line; None if they can."""
    try:
        exists = folder.exists()
    except OSError as error:
        return f"run.name: {folder.name[:40]}...: {error.strerror}; give a shorter one"
    if exists:
        return (
            f"run.name: {folder} exists and is not overwritten; give another run.name or "
            "run.output-dir, or leave run.name empty for a timestamp"
        )
    parent = next(p for p in folder.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return f"run.output-dir: {parent} cannot be written to; choose another folder"
    return None


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by a file that holds all of `data`, or leave it as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


class Recorder:
    """Writes as the run goes, so that whatever ends it, what was reached can be found."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.summary: dict[str, Any] = {"status": "running"}
        self.labels: dict[str, Any] = {}

    def begin(self, config: CoreConfig, values: Mapping[str, Scalar], engine: str) -> None:
        write_atomically(self.folder / CONFIG, _json(dict(values)))
        write_atomically(self.folder / SUMMARY, _json(self.summary))
        self.summary |= {
            "strategy": config.strategy.name,
            "regularizers": list(config.regularizer_names),
            "engine": engine,
            "seed": config.run.seed,
            "versions": _versions(),
        }

    def row(self, row: dict[str, Any]) -> None:
        """One round, appended to the history and flushed."""
        # JSON has no NaN and no infinity.
        lost = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        row |= dict.fromkeys(lost)
        self.rows.append(row)
        with (self.folder / HISTORY).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def members(self, members: Sequence[Member], classes: Sequence[str]) -> None:
        """Who takes part: samples and label counts of every client."""
        self.summary["clients"] = len(members)
        self.labels = {
            "classes": list(classes),
            "samples": [member.samples for member in members],
            "label_counts": [list(member.label_counts) for member in members],
        }
        write_atomically(self.folder / CLIENTS, _json(self.labels))

    def finish(self, model: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The final model, the pictures and the summary of a completed run."""
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in model.items()}
        write_atomically(self.folder / MODEL, save(tensors))
        self.summary |= {"status": "completed", "model_sha256": model_sha256(tensors)}
        return self._close()

    def fail(self, reason: str) -> dict[str, Any]:
        """The summary, and the pictures so far, of a run that ended early."""
        self.summary |= {"status": "failed", "error": reason}
        return self._close()

    def _close(self) -> dict[str, Any]:
        evaluated = [row for row in self.rows if row.get("accuracy") is not None]
        if evaluated:
            self.summary |= {
                "accuracy": evaluated[-1]["accuracy"],
                "best_accuracy": max(row["accuracy"] for row in evaluated),
                "loss": evaluated[-1]["loss"],
            }
        # In one process the clients' time is part of ours.
        own = self.summary.get("engine") == "inprocess"
        elsewhere = [] if own else [row["client_cpu_s"] for row in self.rows]
        self.summary |= {
            "rounds": len(self.rows),
            "bytes_up": sum(row["bytes_up"] for row in self.rows),
            "bytes_down": sum(row["bytes_down"] for row in self.rows),
            "wall_s": round(time.perf_counter() - self.started, 3),
            "cpu_s": round(time.process_time() - self.cpu_started + sum(elsewhere), 3),
        }
        write_atomically(self.folder / SUMMARY, _json(self.summary))
        self._draw()
        return self.summary

    def _draw(self) -> None:
        """The pictures, last: matplotlib is not in memory while rounds run."""
        from fl_report.plots import curves, label_distribution

        if self.rows:
            curves(self.rows, self.folder / "curves.png")
        if self.labels:
            counts, classes = self.labels["label_counts"], self.labels["classes"]
            label_distribution(counts, classes, self.folder / "clients.png")


def _versions() -> dict[str, str]:
    names = ("flatfed", "flwr", "torch", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:  # PackageNotFoundError: run from a bundle, not installed
            found[name] = "not installed"
    return found
