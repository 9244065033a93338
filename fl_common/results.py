"""The files of a run's results folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CONFIG, CLIENTS, HISTORY = "config.json", "clients.json", "history.jsonl"
SUMMARY, MODEL = "summary.json", "model.safetensors"
FLATNESS, REPORT = "flatness.json", "report.html"
CHECKPOINTS = "checkpoints"


def checkpoints(folder: Path) -> list[Path]:
    """Those of the run in `folder`, without any that a crash left half written: the run can be
    resumed if there is one."""
    return list((folder / CHECKPOINTS).glob("*.safetensors"))
