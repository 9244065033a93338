"""Pictures of a run, as PNG files.  matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fl_common.pictures import BLUE, GREY, ORANGE, name_of, new_figure, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axis import Axis

COLOURS = (
    BLUE, ORANGE, "#1a7f37", "#8250df", "#bf3989", "#0a7f86", "#9a6700", "#57606a", "#6cb6ff",
    "#f0b37e", "#7ee787", "#c9a7ff", "#ff9bce", "#39c5cf", "#e3b341", "#24292f", "#0b2f66",
    "#6e2c00", "#b31d28", "#a8b1ba",
)  # fmt: skip
"""Colours of runs, in their order; they repeat from the 21st on."""
DASHES, MARKERS = ("-", (0, (5, 3)), (0, (2, 2))), "os^vDPX"
"""Vary with the colours, so that a line shows under another; where colours repeat, these differ."""
ACROSS = 3
"""Panels beside each other; more stand below."""
STATES = {
    "not drawn": "#eaeef2", "answered": "#7fb0f5", "no answer": "#eda100", "rejected": "#8b1020"
}  # fmt: skip
"""Colours of a client in a round; distinct without red or green vision too, and in grey."""


def _style(place: int, points: int) -> dict[str, Any]:
    """The style of the line, of so many points, of the run at this place."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)] if points < 25 else None,
    }


def _whole(axis: Axis) -> None:
    """Whole numbers at the ticks, where there is only one too."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _columns(labels: Iterable[str]) -> int:
    """Of the legend below a panel."""
    return 2 if max(map(len, labels)) < 22 else 1


def curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy, and both losses, over rounds."""
    figure, (left, right) = new_figure(9, 3.4, columns=2)
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
        plain(axes)
        _whole(axes.xaxis)
    figure.savefig(path, dpi=130)


Lines = dict[str, tuple[list[float], list[float]]]
"""x and y by label."""
Spreads = dict[str, list[float]]
"""The standard deviation of each y, by label."""


def comparison(panels: Mapping[tuple[str, str], Lines], path: Path) -> None:
    """Accuracies: a panel per title and x axis, in it a line per run; their names are below."""
    labels = next(iter(panels.values()))  # all panels have the same
    wide = min(len(panels), ACROSS)
    deep = -(-len(panels) // wide)
    columns = wide * _columns(labels)
    height = 3.6 * deep + 0.16 * -(-len(labels) // columns)
    figure, axes = new_figure(4.6 * wide, height, columns=wide, rows=deep, shared=False)
    places = np.atleast_1d(axes).flat
    for panel, ((title, over), runs) in zip(places, panels.items(), strict=False):
        for i, (label, (x, accuracies)) in enumerate(runs.items()):
            style = _style(i, len(x))
            panel.plot(x, [100 * a for a in accuracies], label=name_of(label), ms=3, **style)
        panel.set(xlabel=over, ylabel="test accuracy [%]", title=title)
        plain(panel)
        if over == "round":
            _whole(panel.xaxis)
    for unused in places[len(panels) :]:
        unused.remove()
    figure.legend(
        *panel.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center",
        ncols=columns, handlelength=3,
    )  # fmt: skip
    figure.savefig(path, dpi=130)


def lines(
    series: Lines,
    over: str,
    what: str,
    path: Path,
    spreads: Spreads | None = None,
    places: Mapping[str, int] | None = None,
) -> None:
    """One panel, small enough for a phone: a line per label, with a band where there is a spread.

    places: the place of each label among the runs, where that is not its place among the lines.
    """
    columns = _columns(series)
    below = 0.16 * -(-len(series) // columns) if len(series) > 1 else 0
    figure, axes = new_figure(4.4, 3.1 + below)
    for i, (label, (x, y)) in enumerate(series.items()):
        style = _style(places[label] if places else i, len(x))
        if spread := (spreads or {}).get(label):
            low, high = (np.asarray(y) + sign * np.asarray(spread) for sign in (-1, 1))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(x, y, label=name_of(label), linewidth=1.4, ms=3, **style)
    axes.set(xlabel=over, ylabel=what)
    plain(axes)
    if over == "round":
        _whole(axes.xaxis)
    heights = [height for _, y in series.values() for height in y]
    if 0 < 1000 * min(heights) < max(heights):  # a loss has run away
        axes.set_yscale("log")
    if len(series) > 1:  # below, where it hides no line
        figure.legend(
            frameon=False, fontsize=8, loc="outside lower center", ncols=columns, handlelength=3
        )
    figure.savefig(path, dpi=150)


def sorted_bars(values: Mapping[str, float], marked: int, what: str, path: Path) -> None:
    """A bar per client, lowest first; the first `marked` in another colour."""
    figure, axes = new_figure(4.4, 3.1)
    names = sorted(values, key=lambda name: (values[name], int(name)))
    few = len(names) <= 25
    heights, width = [values[name] for name in names], 0.85 if few else 1
    colours = [ORANGE if i < marked else BLUE for i in range(len(names))]
    axes.bar(range(len(names)), heights, color=colours, width=width)
    axes.set_xticks(range(len(names)) if few else [], names if few else [], fontsize=8)
    axes.set(xlabel="client, lowest first", ylabel=what)
    plain(axes)
    figure.savefig(path, dpi=150)


def participation(states: np.ndarray, rounds: Sequence[int], path: Path) -> None:
    """Who took part when: a row per client, a column per round.

    states: (clients, rounds) of 0 not drawn, 1 answered, 2 no answer, 3 rejected.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    clients, colours = len(states), list(STATES.values())
    figure, axes = new_figure(4.4, min(1.6 + 0.14 * clients, 6))
    edges = (rounds[0] - 0.5, rounds[-1] + 0.5, clients - 0.5, -0.5)
    axes.imshow(
        states, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1, aspect="auto",
        extent=edges, interpolation="nearest",
    )  # fmt: skip
    # Points, so that one among thousands is seen.
    for state in (2, 3):
        who, when = np.nonzero(states == state)
        places = [rounds[t] for t in when]
        axes.scatter(places, who, color=colours[state], marker="s", s=4, linewidths=0, zorder=2)
    there = [
        Patch(color=colour, label=name)
        for state, (name, colour) in enumerate(STATES.items())
        if (states == state).any()
    ]
    figure.legend(
        handles=there, frameon=False, fontsize=8, loc="outside upper center", ncols=len(there),
        handlelength=1,
    )  # fmt: skip
    axes.set(xlabel="round", ylabel="client", xlim=edges[:2], ylim=edges[2:])
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        _whole(axis)
    figure.savefig(path, dpi=150)


def gradient_norms(panels: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """The norm at every local step, the mean over clients, a panel per run and a list per round;
    dotted lines are aggregations."""
    from matplotlib.collections import LineCollection

    figure, axes = new_figure(4.4, 2.4 * len(panels), rows=len(panels))
    panes = np.atleast_1d(axes)
    for panel, (label, rounds) in zip(panes, panels.items(), strict=True):
        # One line with gaps: one for each of thousands of rounds takes minutes.
        x, y, ends, points = [], [], [0], []
        for norms in rounds:
            points += [len(x)] * (len(norms) == 1)
            ends.append(ends[-1] + len(norms))
            x += range(ends[-2], ends[-1] + 1)
            y += [*norms, np.nan]
        panel.plot(x, y, color=BLUE, linewidth=0.8, marker=".", markevery=points)
        between = LineCollection(
            [[(end - 0.5, 0), (end - 0.5, 1)] for end in ends[1:]], color=GREY, linestyle=":",
            linewidth=min(1, 40 / len(rounds)), transform=panel.get_xaxis_transform(), zorder=0,
        )  # fmt: skip
        panel.add_collection(between, autolim=False)
        panel.update_datalim([(ends[-1] - 0.5, 1)], updatey=False)
        panel.set(ylabel="gradient norm", yscale="log")
        panel.set_title(name_of(label), fontsize=10)
        plain(panel)
        _whole(panel.xaxis)
    panes[-1].set(xlabel="local step")
    figure.savefig(path, dpi=150)


def label_distribution(counts: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Stacked bars: how many samples of each class every client holds.

    `counts` is (clients, classes).  Beyond 100 clients the first 100 are drawn, and said so.
    """
    table = np.asarray(counts[:100])
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection

    few = table.shape[1] <= 10
    names = [name_of(str(name)) for name in classes] if few else []
    columns = max(1, min(5, 60 // (6 + max(map(len, names), default=0))))
    figure, axes = new_figure(4.4, 3.2 + 0.16 * -(-len(names) // columns))
    colours = colormaps["tab10" if few else "viridis"]
    left, bottom = np.arange(len(table)) - 0.425, np.zeros(len(table))
    for label in range(table.shape[1]):
        top = bottom + table[:, label]
        # One collection a class: with 100 classes, a patch a bar takes seconds.
        corners = [(left, bottom), (left + 0.85, bottom), (left + 0.85, top), (left, top)]
        bars = np.moveaxis(np.array(corners), 2, 0)  # (clients, corners, x and y)
        colour = colours(label if few else label / (table.shape[1] - 1))
        name = names[label] if few else None
        axes.add_collection(PolyCollection(bars, facecolors=[colour], label=name))
        bottom = top
    axes.set(xlim=(-0.7, len(table) - 0.3), ylim=(0, max(1.05 * bottom.max(), 1)))
    shown = f", the first {len(table)} of {len(counts)}" if len(counts) > len(table) else ""
    axes.set(xlabel=f"client{shown}", ylabel="training samples", title="Labels over clients")
    _whole(axes.xaxis)
    plain(axes)
    if few:
        figure.legend(
            frameon=False, fontsize=8, loc="outside lower center", ncols=columns, handlelength=1
        )
    figure.savefig(path, dpi=150)
