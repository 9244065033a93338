"""What the terminal shows of finished runs: one in lines, several side by side."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fl_report import compare, series
from fl_report.compare import method_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, RenderableType
    from rich.table import Table

    from fl_report.compare import Run

WIDTH = 160
"""Columns where there is no terminal."""
DIGITS = 12
"""Of a model's sha256, where there is no room for all 64."""


def console(shown: RenderableType, columns: int) -> Console:
    """As wide as the terminal.  Without one it has so many columns, or as many as a table needs
    whose cells do not wrap: a file is not to lose digits."""
    from rich.console import Console
    from rich.table import Table

    made = Console(emoji=False, markup=False)  # names may have [brackets]
    if not sys.stdout.isatty():
        made.width = columns
        if isinstance(shown, Table) and all(column.no_wrap for column in shown.columns):
            whole = made.measure(shown, options=made.options.update(width=10**6))
            made.width = max(columns, whole.maximum)
    return made


def text(shown: RenderableType) -> str:
    """As the standard output would show it: with colours on a terminal, else plain."""
    drawn = console(shown, WIDTH)
    with drawn.capture() as captured:
        drawn.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def one_run(run: Run, target: float | None = None) -> Table:
    """A line for each: method, accuracy, loss, rounds, bytes, time, when the target was reached,
    what was refused, the model and the folder."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, told in _lines(run, target):
        made.add_row(name, told)
    return made


def _lines(run: Run, target: float | None) -> list[tuple[str, str]]:
    summary, (up, down) = run.summary, series.sent(run)
    found = {"method": f"{method_of(run.config)} on {run.config.get('data.source', 'its data')}"}
    status = str(summary.get("status", "unknown"))
    if status != "completed":
        found["status"] = f"{status}: {summary['error']}" if "error" in summary else status
    if evaluated := series.evaluated(run):
        best = max(evaluated, key=lambda row: row["accuracy"])
        last = evaluated[-1]["accuracy"]
        found["accuracy"] = f"{last:.4f}, best {best['accuracy']:.4f} in round {best['round']}"
        found["loss"] = series.loss_told(evaluated[-1].get("loss"))
    found["rounds"] = f"{len(run.rows)} of {run.config.get('run.rounds', '?')}"
    found["sent"] = f"{series.sized(up)} up, {series.sized(down)} down"
    if "wall_s" in summary:
        found["time"] = f"{summary['wall_s']:.1f} s, processors {summary.get('cpu_s', 0):.1f} s"
    if target is not None and evaluated:
        when = series.reached(run, target)
        found[f"to {target:.4f}"] = (
            f"in round {when.round}, after {series.sized(when.bytes)} and {when.seconds:.1f} s"
            if when
            else "never"
        )
    counts = series.refusal_counts(run)
    found["refused"] = ", ".join(f"{count} {what}" for what, count in counts.items()) or "none"
    if "model_sha256" in summary:
        found["model"] = summary["model_sha256"]
    if run.folder:
        found["folder"] = str(run.folder)
    return list(found.items())


def several_runs(runs: Sequence[Run], target: float | None = None) -> Table:
    """What `compare.table` tells, and loss, time, when the target was reached, what was refused,
    the model, and the folder where it is not what one would think."""
    told = series.loss_told
    more = {"loss": [told(series.final_loss(r)) if series.evaluated(r) else "" for r in runs]}
    more["s"] = [f"{run.summary['wall_s']:.0f}" if "wall_s" in run.summary else "" for run in runs]
    if target is not None:
        found = [series.reached(run, target) for run in runs]
        more[f"rounds to {target:.3f}"] = [str(r.round) if r else "never" for r in found]
        more["MB to it"] = [f"{r.bytes / 1e6:.1f}" if r else "" for r in found]
    refused = [sum(series.refusal_counts(run).values()) for run in runs]
    if any(refused):
        more["refused"] = [str(count) for count in refused]
    more["sha256"] = [str(run.summary.get("model_sha256", ""))[:DIGITS] for run in runs]
    folders = [run.folder.resolve().name for run in runs]
    if folders != [run.label for run in runs]:
        more["folder"] = folders
    return compare.table(runs, more)
