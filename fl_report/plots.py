"""Pictures of a run, as PNG files.  matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f6feb", "#d9730d", "#8c959f"


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=rows > 1)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy, and both losses, over rounds."""
    figure, (left, right) = _figure(9, 3.4, columns=2)
    evaluated = [row for row in rows if "accuracy" in row]
    rounds = [row["round"] for row in evaluated]
    marker = "o" if len(rounds) < 25 else None
    left.plot(rounds, [100 * r["accuracy"] for r in evaluated], color=BLUE, marker=marker, ms=3)
    left.set(xlabel="round", ylabel="test accuracy [%]", title="Accuracy")
    right.plot(
        rounds, [r["loss"] for r in evaluated], color=BLUE, label="test", marker=marker, ms=3
    )
    trained = [row for row in rows if row["client_loss"] is not None]
    right.plot(
        [row["round"] for row in trained],
        [row["client_loss"] for row in trained],
        color=ORANGE,
        label="clients, while training",
    )
    right.set(xlabel="round", ylabel="loss", title="Loss")
    right.legend(frameon=False)
    for axes in (left, right):
        _plain(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=130)


Lines = dict[str, tuple[list[float], list[float]]]
"""x and y by label."""


def comparison(panels: Mapping[tuple[str, str], Lines], path: Path) -> None:
    """Accuracies: a panel per title and x axis, in it a line per run."""
    figure, axes = _figure(4.6 * len(panels), 3.6, columns=len(panels))
    for panel, ((title, over), runs) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for label, (x, accuracies) in runs.items():
            panel.plot(x, [100 * a for a in accuracies], label=label, marker="o", ms=2.5)
        panel.set(xlabel=over, ylabel="test accuracy [%]", title=title)
        _plain(panel)
        panel.xaxis.get_major_locator().set_params(integer=over == "round")
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def gradient_norms(panels: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """The norm at every local step, the mean over clients, a panel per run and a list per round;
    dotted lines are aggregations."""
    figure, axes = _figure(9, 2.4 * len(panels), rows=len(panels))
    panes = np.atleast_1d(axes)
    for panel, (label, rounds) in zip(panes, panels.items(), strict=True):
        start = 0
        for norms in rounds:
            panel.plot(range(start, start + len(norms)), norms, color=BLUE, linewidth=0.8)
            start += len(norms)
            panel.axvline(start - 0.5, color=GREY, linewidth=0.5, linestyle=":")
        panel.set(ylabel="gradient norm", title=label, yscale="log")
        _plain(panel)
    panes[-1].set(xlabel="local step")
    figure.savefig(path, dpi=130)


def label_distribution(counts: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Stacked bars: how many samples of each class every client holds.

    `counts` is (clients, classes).  Beyond 100 clients the first 100 are drawn, and said so.
    """
    table = np.asarray(counts[:100])
    figure, axes = _figure(min(4 + 0.22 * len(table), 14), 3.6)
    from matplotlib import colormaps

    colours = colormaps["tab10" if table.shape[1] <= 10 else "viridis"]
    positions, bottom = np.arange(len(table)), np.zeros(len(table))
    few = table.shape[1] <= 10
    for label in range(table.shape[1]):
        colour = colours(label if few else label / (table.shape[1] - 1))
        axes.bar(
            positions,
            table[:, label],
            bottom=bottom,
            color=colour,
            width=0.85,
            label=classes[label] if few else None,
        )
        bottom += table[:, label]
    shown = f", the first {len(table)} of {len(counts)}" if len(counts) > len(table) else ""
    axes.set(xlabel=f"client{shown}", ylabel="training samples", title="Labels over clients")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain(axes)
    if few:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
