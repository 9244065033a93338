"""What all pictures share: figures without a screen, colours, names as they are."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f6feb", "#d9730d", "#8c959f"
LONGEST = 40
"""Most characters of a name in a picture."""


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, *, shared: bool = True
) -> tuple[Figure, Any]:
    """A figure of this size in inches, and its axes; shared: rows have the x axis in common."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # About names in scripts that the font lacks; the page has them as text.
    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=shared and rows > 1)


def plain(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Grid lines across this axis, no frame at the top and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def name_of(label: str) -> str:
    """A label as it is: not as a formula ($), not hidden (a leading underscore), not endless."""
    tail = LONGEST // 2  # names and paths that begin alike differ at their ends
    short = label if len(label) <= LONGEST else f"{label[: LONGEST - tail - 1]}…{label[-tail:]}"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")
