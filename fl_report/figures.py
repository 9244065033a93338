"""Curves: pictures of columns of the history over rounds, bytes and seconds, with what they say in
words.  Runs that differ in their seed only are one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_report import plots, seeds
from fl_report.compare import SERIES, TITLES
from fl_report.markup import (
    Markup,
    accuracy,
    element,
    folded,
    grid,
    loss,
    loss_of,
    number,
    section,
    size,
    table,
)
from fl_report.series import AXES, curve, measured

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from fl_report.compare import Run
    from fl_report.markup import Pictures
    from fl_report.series import Axis

UNITS = {"rounds": "round", "bytes": "MB sent, up and down", "seconds": "seconds"}
MANY = 8
"""Most runs in a table that is not folded, where pictures or means tell the same."""


def curves(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """Accuracy and loss over rounds, bytes and seconds."""
    figures = []
    for what in ("accuracy", "loss"):
        for axis in AXES:
            lines = of_runs(runs, what, axis) if len(runs) > 1 else _of_models(runs[0], what, axis)
            title = f"test {what}" if len(runs) > 1 or what == "accuracy" else what
            figures += drawn(pictures, f"{what}-{axis}", lines, title, axis, what == "accuracy")
    for m, key in SERIES.items():
        if len(runs) > 1 and m != "cloud":
            figures += drawn(
                pictures, f"accuracy-{m}", of_runs(runs, key), f"accuracy, {TITLES[m]}"
            )
    told = ""
    if seeds.repeated(seeds.alike(runs)):
        told = element("p", "Lines are means over seeds, bands one standard deviation.")
    return section("Accuracy and loss", told, flatness_seconds(runs), grid(figures), _history(runs))


def flatness_seconds(runs: Sequence[Run]) -> Markup:
    """A note that seconds include the measuring of flatness, where they do."""
    names = [run.label for run in runs if any(map(measured, run.rows))]
    of = f" of {', '.join(names)}" if len(names) < len(runs) else ""
    told = element("p", f"Seconds{of} include the measuring of flatness during the run.")
    return told if names else Markup("")


def of_runs(
    runs: Sequence[Run],
    key: str | Callable[[Mapping[str, Any]], float | None],
    axis: Axis = "rounds",
) -> dict[str, seeds.Line]:
    """A line for each set of runs that differ in their seed only."""
    return {group.label: seeds.line(group, key, axis) for group in seeds.alike(runs)}


def _of_models(run: Run, what: str, axis: Axis) -> dict[str, seeds.Line]:
    columns = {TITLES[m]: key.replace("accuracy", what) for m, key in SERIES.items()}
    if what == "loss":
        columns["clients, while training"] = "client_loss"
    lines = {title: seeds.Line(*curve(run, key, axis)) for title, key in columns.items()}
    return {title: line for title, line in lines.items() if line.x}


def drawn(
    pictures: Pictures,
    name: str,
    lines: Mapping[str, seeds.Line],
    what: str,
    axis: Axis = "rounds",
    percent: bool = True,
) -> list[Markup]:
    """One picture of those lines that have points; none if no line has two.

    axis: of x, in rounds, bytes or seconds.  percent: y are shares.
    """
    places = {label: i for i, label in enumerate(lines)}
    by_x, by_y = 1e6 if axis == "bytes" else 1, 100 if percent else 1
    scaled = {
        label: ([a / by_x for a in line.x], [by_y * b for b in line.y])
        for label, line in lines.items()
        if line.x
    }
    if not any(len(x) > 1 for x, _ in scaled.values()):
        return []
    spreads = {label: [by_y * s for s in line.spread or ()] for label, line in lines.items()}
    told = "; ".join(
        f"{label}: {y[0]:.4g} at {x[0]:.4g} to {y[-1]:.4g} at {x[-1]:.4g}, lowest {min(y):.4g}, "
        f"highest {max(y):.4g}"
        for label, (x, y) in scaled.items()
    )
    caption = f"{what[0].upper()}{what[1:]} over {axis}"
    unit = f"{what} [%]" if percent else what

    def draw(path: Path) -> None:
        plots.lines(scaled, UNITS[axis], unit, path, spreads, places)

    return [pictures.figure(name, draw, f"{caption}. {told}.", caption)]


def _history(runs: Sequence[Run]) -> Markup:
    """Every round's numbers, of one run."""
    if len(runs) > 1 or not runs[0].rows:
        return Markup("")
    rows = [
        [
            number(row["round"]),
            accuracy(row.get("accuracy")),
            loss_of(row),
            loss(row.get("client_loss")),
            number(len(row.get("replies", ()))) + " of " + number(len(row.get("cohort", ()))),
            size(row.get("bytes_up")),
            size(row.get("bytes_down")),
            number(row.get("seconds"), "{:.2f}"),
        ]
        for row in runs[0].rows
    ]
    head = ["round", "accuracy", "loss", "client loss", "clients", "up", "down", "s"]
    return folded(f"All {len(rows)} rounds as numbers", table(head, rows))
