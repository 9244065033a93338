"""Several runs side by side: a table for the terminal, and a picture of their accuracies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fl_report.plots import comparison

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

SERIES = {"cloud": "accuracy", "sel": "accuracy_sel", "all": "accuracy_all"}
"""Models that a run may evaluate, and the columns of its history."""
TITLES = {
    "cloud": "global model",
    "sel": "mean of the cohort's models",
    "all": "mean of all last models",
}


@dataclass(frozen=True)
class Run:
    """What a results folder says."""

    label: str
    summary: dict[str, Any]
    rows: list[dict[str, Any]]

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

    Raises ValueError with one line for a folder that holds no run.
    """
    runs = []
    for folder in folders:
        try:
            summary = json.loads((folder / "summary.json").read_text())
            config = json.loads((folder / "config.json").read_text())
            rows = [json.loads(line) for line in (folder / "history.jsonl").open()]
            label = "+".join(filter(None, (config["strategy.name"], config["regularizers"])))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: holds no run ({error})") from None
        runs.append(Run(label, summary, rows))
    labels = [run.label for run in runs]
    return [
        Run(folder.name, run.summary, run.rows) if labels.count(run.label) > 1 else run
        for folder, run in zip(folders, runs, strict=True)
    ]


def table(runs: Sequence[Run]) -> Table:
    """Accuracy, last and best, of every model that was evaluated; rounds, bytes and time."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(
        box=SIMPLE, pad_edge=False, caption="accuracy: last (best); MB: 10^6 bytes up / down"
    )
    models = [m for m in SERIES if any(run.series(m)[0] for run in runs)]
    for column in ("run", "rounds", *models, "MB", "CPU s"):
        made.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for run in runs:
        accuracies = [run.series(m)[1] for m in models]
        cells = [f"{found[-1]:.3f} ({max(found):.3f})" if found else "" for found in accuracies]
        up, down = (
            sum(row.get(key, 0) for row in run.rows) / 1e6 for key in ("bytes_up", "bytes_down")
        )
        cpu = f"{run.summary['cpu_s']:.0f}" if "cpu_s" in run.summary else ""
        made.add_row(run.label, str(len(run.rows)), *cells, f"{up:.1f} / {down:.1f}", cpu)
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
