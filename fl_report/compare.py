"""Several runs side by side: a table for the terminal, and a picture of their accuracies."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fl_common.results import CLIENTS, CONFIG, HISTORY, SUMMARY
from fl_report.plots import comparison

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

SERIES = {
    "cloud": "accuracy",
    "sel": "accuracy_sel",
    "all": "accuracy_all",
    "first": "accuracy_first",
}
"""Models that a run may evaluate, and the columns of its history."""
TITLES = {
    "cloud": "global model",
    "sel": "mean of the cohort's models",
    "all": "mean of all last models",
    "first": "with the first client's statistics",
}


@dataclass(frozen=True)
class Run:
    """What a results folder says."""

    label: str
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    """Every setting; empty where the run failed because of them."""
    clients: dict[str, Any] = field(default_factory=dict)
    """classes (C,), samples (N,) and label_counts (N, C); empty before the roll call."""
    folder: Path | None = None

    def series(self, model: str) -> tuple[list[int], list[float]]:
        """Rounds and accuracies of one of the evaluated models."""
        rows = [row for row in self.rows if row.get(SERIES[model]) is not None]
        return [row["round"] for row in rows], [row[SERIES[model]] for row in rows]

    def megabytes(self) -> dict[int, float]:
        """10^6 bytes that went up and down until the end of each round."""
        sizes = [row.get("bytes_up", 0) + row.get("bytes_down", 0) for row in self.rows]
        sums = accumulate(size / 1e6 for size in sizes)
        return dict(zip((row["round"] for row in self.rows), sums, strict=True))


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, named by method, or by folder where methods repeat.

    Raises ValueError with one line for a folder that holds no run, or one with a broken file, as
    where a completed run's history lacks rounds.
    """
    runs = []
    for folder in folders:
        try:
            summary = parsed((folder / SUMMARY).read_bytes(), folder / SUMMARY)
            config = _optional(folder / CONFIG)
            clients = _optional(folder / CLIENTS)
            rows = _rows(folder / HISTORY)
        except OSError as error:
            inside = sorted(path.parent for path in folder.glob(f"*/{SUMMARY}"))
            remedy = f"those in it, as {inside[0]}" if inside else "a run's results folder"
            raise ValueError(
                f"{folder}: holds no run ({error.filename}: {error.strerror}); give {remedy}"
            ) from None
        told = summary.get("rounds", len(rows))
        if summary.get("status") == "completed" and len(rows) != told:
            raise ValueError(
                f"{folder / HISTORY}: has {len(rows)} of {told} rounds; repair it, or "
                "leave this run out"
            )
        label = method_of(config) or folder.resolve().name
        runs.append(Run(label, summary, rows, config, clients, folder))
    for other_name in (lambda run: run.folder.resolve().name, lambda run: str(run.folder)):
        labels = [run.label for run in runs]
        runs = [
            replace(run, label=other_name(run)) if labels.count(run.label) > 1 else run
            for run in runs
        ]
    return runs


def method_of(config: Mapping[str, Any]) -> str:
    """Strategy and regularizers."""
    return "+".join(filter(None, (config.get("strategy.name"), config.get("regularizers"))))


def parsed(text: bytes, where: object) -> dict[str, Any]:
    """The JSON object in a file, or in a line of it.  Raises ValueError with one line."""
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return found
        why: object = "no object"
    except ValueError as error:
        why = getattr(error, "msg", error)
    raise ValueError(f"{where}: is not JSON ({why}); repair it, or leave this run out")


def _optional(path: Path) -> dict[str, Any]:
    return parsed(path.read_bytes(), path) if path.exists() else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    """None before the first round; a last line that a crash cut short is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = (line for line in lines if line.endswith(b"\n"))
    rows = [parsed(line, f"{path}, line {i}") for i, line in enumerate(whole, 1)]
    for i, row in enumerate(rows, 1):
        if (there := row.get("round")) != i:
            raise ValueError(
                f"{path}, line {i}: is not of round {i} (round: {there}); repair it, or leave "
                "this run out"
            )
    return rows


def table(runs: Sequence[Run], more: Mapping[str, Sequence[str]] | None = None) -> Table:
    """Accuracy, last and best, of every model that was evaluated; rounds, bytes and time; the
    status, where a run is not completed; and `more` columns, a cell per run."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(
        box=SIMPLE, pad_edge=False, caption="accuracy: last (best); MB: 10^6 bytes up / down"
    )
    models = [m for m in SERIES if any(run.series(m)[0] for run in runs)]
    more = dict(more or {})
    status = [str(run.summary.get("status", "unknown")) for run in runs]
    if set(status) != {"completed"}:
        more = {"status": status} | more
    for column in ("run", "rounds", *models, "MB", "CPU s", *more):
        made.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for i, run in enumerate(runs):
        accuracies = [run.series(m)[1] for m in models]
        cells = [f"{found[-1]:.3f} ({max(found):.3f})" if found else "" for found in accuracies]
        up, down = (
            sum(row.get(key, 0) for row in run.rows) / 1e6 for key in ("bytes_up", "bytes_down")
        )
        cpu = f"{run.summary['cpu_s']:.0f}" if "cpu_s" in run.summary else ""
        made.add_row(
            run.label,
            str(len(run.rows)),
            *cells,
            f"{up:.1f} / {down:.1f}",
            cpu,
            *(cells_of[i] for cells_of in more.values()),
        )
    return made


def draw(runs: Sequence[Run], path: Path) -> None:
    """Accuracy over rounds, one line per run; a panel for every model that was evaluated, and one
    over bytes if some run sends less than another in a round."""
    if not any(run.series(m)[0] for run in runs for m in SERIES):
        raise ValueError("no run here was evaluated: there is nothing to draw")
    panels = {(TITLES[m], "round"): {run.label: run.series(m) for run in runs} for m in SERIES}
    sent = [run.megabytes() for run in runs]
    per_round = [total[max(total)] / len(total) for total in sent if total]
    if max(per_round) > 1.01 * min(per_round):
        lines = {}
        for run, total in zip(runs, sent, strict=True):
            rounds, accuracies = run.series("cloud")
            lines[run.label] = ([total[r] for r in rounds], accuracies)
        panels[TITLES["cloud"], "MB sent, up and down"] = lines
    comparison({p: s for p, s in panels.items() if any(x for x, _ in s.values())}, path)
