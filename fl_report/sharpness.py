"""The parts of a report that tell of gradients and curvature.  Each turns runs into HTML, empty
where no run recorded what it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fl_report import grad_norm
from fl_report.figures import MANY, drawn, of_runs
from fl_report.markup import Markup, folded, grid, number, of_rich, section, table, text
from fl_report.series import measurements

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fl_report.compare import Run
    from fl_report.markup import Pictures

MEASURED = {
    "lambda_max": "largest eigenvalue",
    "trace": "trace of the Hessian",
    "h_n": "H_N",
    "h_d": "H_D",
}


def gradients(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """The norm of the local gradient over steps, and its jumps at aggregations."""
    recorded = [run for run in runs if any("grad_norm" in row for row in run.rows)]
    if not recorded:
        return Markup("")
    caption = "The mean over clients at every local step; dotted lines: aggregations"

    if len(recorded) > MANY:
        caption += f"; the first {MANY} of {len(recorded)} runs"

    def draw(path: Path) -> None:
        grad_norm.draw(recorded[:MANY], path)

    figure = pictures.figure("grad-norm", draw, f"Gradient norm. {caption}.", caption)
    return section("Gradient norms", of_rich(grad_norm.table(recorded)), figure)


def flatness(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """The curvature of the loss at the global model, where it was measured."""
    rows, errors = [], []
    told = [
        (run, when if isinstance(when, str) else number(when), found)
        for run in runs
        for when, found in measurements(run)
    ]
    columns = [key for key in MEASURED if any(f.get(key) is not None for _, _, f in told)]
    for run, when, found in told:
        if any(found.get(key) is not None for key in columns):
            rows.append([run.label, when, *(_with_error(found, key) for key in columns)])
        if "flatness_error" in found:
            errors.append([run.label, when, found["flatness_error"]])
    figures = []
    for key in columns:
        lines = of_runs(runs, key)
        figures += drawn(pictures, f"flatness-{key}", lines, MEASURED[key], percent=False)
    whole = table(["run", "round", *(MEASURED[key] for key in columns)], rows) if rows else ""
    return section(
        "Flatness",
        grid(figures),
        folded(f"All {len(rows)} measurements", whole) if len(rows) > 12 else whole,
        table(["run", "round", "what could not be measured"], errors) if errors else "",
    )


def _with_error(found: Mapping[str, Any], key: str) -> Markup:
    """A measure with its error in the same unit: an eigenvalue's residual is a share of it."""
    value, error = found.get(key), None
    if key == "trace":
        error = found.get("trace_error")
    elif key == "lambda_max" and None not in (value, found.get("lambda_max_residual")):
        error = abs(value) * found["lambda_max_residual"]
    spread = "" if error is None else text(" ± ") + number(error, "{:.2g}")
    return number(value, "{:.4g}") + spread
