"""The norm of the local gradient over iterations: does it jump when models are averaged?

With full updates it does, which FedPart (NeurIPS 2024, first figure) takes as a sign that layers
which were averaged one by one do not fit each other; with partial updates the jump is smaller.
Needs runs with `eval.grad-norm=true`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fl_report.plots import gradient_norms

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

    from fl_report.compare import Run

WHOLE = "all"
"""The name of the whole gradient, of all that a round trains."""


def jumps(run: Run, group: str) -> list[float]:
    """For every aggregation, the mean norm in the first quarter of the local steps after it over
    that in the last quarter before it; only where both rounds train the same groups, of which this
    is one.  Not of single steps: they are noisy, and an epoch's last batch is smaller."""
    found = []
    for one, other in pairwise(row for row in run.rows if "grad_norm" in row):
        before, after = one["grad_norm"], other["grad_norm"]
        neighbours = one["round"] + 1 == other["round"] and before.keys() == after.keys()
        if neighbours and group in before:
            steps = max(1, len(after[group]) // 4)
            late, early = before[group][-steps:], after[group][:steps]
            if sum(late) > 0:
                found.append(sum(early) / len(early) / (sum(late) / len(late)))
    return found


def split(run: Run) -> list[Run]:
    """The rounds that train all groups and those that train some, as runs of their own.

    Raises ValueError if the run recorded nothing.
    """
    rows = _recorded(run)
    most = max(len(row["grad_norm"]) for row in rows)
    full = [row for row in rows if len(row["grad_norm"]) == most]
    partial = [row for row in rows if len(row["grad_norm"]) < most]
    if not partial:
        return [replace(run, rows=full)]
    parts = (("full rounds", full), ("partial rounds", partial))
    return [replace(run, label=f"{run.label}, {what}", rows=part) for what, part in parts if part]


def _recorded(run: Run) -> list[dict[str, Any]]:
    """The rows with gradient norms.  Raises ValueError if there are none."""
    rows = [row for row in run.rows if "grad_norm" in row]
    if not rows:
        raise ValueError(f"{run.label}: no gradient norms; run it with eval.grad-norm=true")
    return rows


def table(runs: Sequence[Run]) -> Table:
    """The mean jump (geometric) of the whole gradient and of each group, with the number of
    aggregations that it is taken over.  Raises ValueError."""
    from rich.box import SIMPLE
    from rich.table import Table

    parts = [part for run in runs for part in split(run)]
    names = [WHOLE, *sorted({g for part in parts for row in part.rows for g in row["grad_norm"]})]
    made = Table(
        box=SIMPLE,
        pad_edge=False,
        caption="gradient norm, first quarter of a round / last quarter of the one before: "
        "geometric mean (aggregations)",
    )
    made.add_column("group", no_wrap=True)
    for part in parts:
        made.add_column(part.label, justify="right")
    for name in dict.fromkeys(names):
        made.add_row(name, *(_mean(jumps(part, name)) for part in parts))
    return made


def _mean(ratios: Sequence[float]) -> str:
    positive = [ratio for ratio in ratios if ratio > 0]
    if not positive:
        return ""
    return f"{math.exp(sum(map(math.log, positive)) / len(positive)):.3f} ({len(positive)})"


def draw(runs: Sequence[Run], path: Path) -> None:
    """One panel per run, below each other: the whole gradient's norm over local steps, with a line
    at every aggregation.  Raises ValueError."""
    panels = {run.label: [row["grad_norm"][WHOLE] for row in _recorded(run)] for run in runs}
    gradient_norms(panels, path)
