"""Tables and pictures of measured runs, side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fl_flatness import plots

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table


@dataclass(frozen=True)
class Measured:
    """A run, and how flat it is."""

    label: str
    folder: Path
    rows: list[dict[str, Any]]
    """Its history."""
    found: dict[str, Any]
    """What `finished.examine` gives."""


def table(runs: Sequence[Measured]) -> Table:
    """A line per run."""
    matched = [run for run in runs if "match" in run.found]
    most = max(len(run.found.get("eigenvalues", ())) for run in runs)
    columns = ["run", "accuracy", "lambda_max", "trace"]
    columns += [f"lambda_2..{most}"] * (most > 1)
    columns += ["H_N", "H_D", "H_N (code)", "H_D (code)"] * bool(matched)
    made = _table(
        *columns,
        caption="±: of lambda_max its residual, of trace its standard error"
        + ("; (code): as FedAlign's code has it" if matched else ""),
    )
    for run in runs:
        found = run.found
        cells = [run.label, f"{found['accuracy']:.3f}", *_measures(found)]
        if most > 1:
            cells.append(" ".join(f"{a:.3g}" for a in found.get("eigenvalues", ())[1:]))
        for mode in ("paper", "fedalign-code") if matched else ():
            pair = found.get("match", {}).get(mode)
            cells += [f"{pair['h_n']:.4g}", f"{pair['h_d']:.4f}"] if pair else ["", ""]
        made.add_row(*cells)
    return made


def layer_table(run: Measured) -> Table:
    """A line per layer, in the network's order."""
    made = _table(
        "layer", "kind", "lambda_max", "trace", "input ||a||^2", "output a^2",
        title=run.label,
        caption="input ||a||^2: mean over samples; output a^2: mean over the elements of what the\n"
        "next activation function gives",
    )  # fmt: skip
    for row in run.found["layers"]:
        norms = (row["input_per_sample"], row["output_per_element"])
        cells = ["" if norm is None else f"{norm:.4g}" for norm in norms]
        made.add_row(row["layer"], row["kind"], *_measures(row), *cells)
    return made


def _table(*columns: str, caption: str, title: str | None = None) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(
        box=SIMPLE, pad_edge=False, title=title, caption=caption, title_justify="left",
        caption_justify="left",
    )  # fmt: skip
    for column in columns:
        name = column in ("run", "layer", "kind")
        # A list of eigenvalues wraps: in one line it would take the room of the other columns.
        wraps = name or column.startswith("lambda_2..")
        justify = "left" if name else "right"
        made.add_column(column, justify=justify, no_wrap=not wraps, overflow="fold")
    return made


def _measures(found: dict[str, Any]) -> tuple[str, str]:
    """lambda_max and trace, each with its error in the same unit."""
    top = found["lambda_max"]
    residual = abs(top) * found["lambda_max_residual"]
    return f"{top:.4g} ± {residual:.1g}", f"{found['trace']:.4g} ± {found['trace_error']:.1g}"


def draw(runs: Sequence[Measured], folder: Path) -> list[Path]:
    """Every picture that the runs have numbers for, those of all runs in one; gives the files.

    Names end with the run's label where there are several.
    """
    made: list[Path] = []

    def place(name: str, run: Measured | None = None) -> Path:
        which = "" if run is None or len(runs) == 1 else "-" + re.sub(r"[^\w.+-]", "-", run.label)
        made.append(folder / f"flatness-{name}{which}.png")
        return made[-1]

    densities = {run.label: run.found["density"] for run in runs if "density" in run.found}
    if densities:
        plots.spectral_density(densities, place("spectrum"))
    recorded = {
        run.label: run.rows
        for run in runs
        if any(row.get("lambda_max") is not None for row in run.rows)
    }
    if recorded:
        plots.over_rounds(recorded, place("rounds"))
    lines = {run.label: run.found["line"] for run in runs if "line" in run.found}
    if lines:
        drawn = {label: (one["steps"], _infinite(one["losses"])) for label, one in lines.items()}
        plots.loss_lines(drawn, place("line"), _directions(runs[0])[0])
    for run in runs:
        if "landscape" in run.found:
            steps, losses = (run.found["landscape"][key] for key in ("steps", "losses"))
            values, path = list(map(_infinite, losses)), place("landscape", run)
            plots.loss_plane(steps, steps, values, path, _directions(run), run.label)
        if "layers" in run.found:
            plots.layer_bars(run.found["layers"], place("layers", run))
    return made


def _infinite(losses: Sequence[float | None]) -> list[float]:
    """With infinity for None, which stands for it in the file."""
    return [float("inf") if a is None else a for a in losses]


def _directions(run: Measured) -> tuple[str, str]:
    eigen = run.found["settings"]["directions"] == "eigenvectors"
    kind = "eigenvector" if eigen else "random direction"
    return f"first {kind}", f"second {kind}"
