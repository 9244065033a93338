"""Pictures of flatness, as PNG files.  matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fl_common.pictures import BLUE, GREY, ORANGE, name_of, new_figure, plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike

LAMBDA = r"$\lambda_{\mathrm{max}}$"


def spectral_density(densities: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """The density of the eigenvalues on a logarithmic scale, a line per label.

    densities: as `measure` gives them, {"nodes": (m,), "weights": (m,)} each.  The Gaussians in
    place of the nodes have 1/100 of the width of the whole spectrum.
    """
    figure, axes = new_figure(7, 3.6)
    ends = [edge for d in densities.values() for edge in (min(d["nodes"]), max(d["nodes"]))]
    width = (max(ends) - min(ends)) or 1.0
    sigma = width / 100
    grid = np.linspace(min(ends) - 4 * sigma, max(ends) + 4 * sigma, 1000)
    for label, found in densities.items():
        z = (grid[:, None] - np.asarray(found["nodes"])) / sigma
        heights = np.exp(-(z**2) / 2) @ np.asarray(found["weights"]) / (sigma * np.sqrt(2 * np.pi))
        (drawn,) = axes.plot(grid, heights, linewidth=1.4, label=name_of(label))
        axes.fill_between(grid, heights, 1e-12, color=drawn.get_color(), alpha=0.12, linewidth=0)
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(
        xlabel=r"eigenvalue $\lambda$", ylabel="density", yscale="log",
        title="Spectrum of the Hessian", ylim=(1e-6 / width, 200 / width),
    )  # fmt: skip
    plain(axes)
    if len(densities) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def loss_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, name: str
) -> None:
    """Losses along the direction of this name: steps and losses by label."""
    figure, axes = new_figure(6, 3.6)
    for label, (steps, losses) in lines.items():
        axes.plot(steps, losses, linewidth=1.6, label=name_of(label))
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"step along the {name}", ylabel="loss", title="Loss along a line")
    plain(axes)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def loss_plane(
    steps: Sequence[float],
    second_steps: Sequence[float],
    losses: ArrayLike,
    path: Path,
    names: Sequence[str],
    label: str = "the model",
) -> None:
    """Contours and surface of losses (m, n) at steps (n,) and second_steps (m,) around `label`,
    along the two directions of these names.

    The highest losses, beyond eight times the range of the lower half of the finite ones, are cut
    off; so are those that are not finite.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = new_figure(10.5, 4.2, columns=2)
    values = np.asarray(losses, dtype=float)
    finite = values[np.isfinite(values)]
    low, middle = finite.min(), float(np.median(finite))
    values = np.fmin(values, low + 8 * max(middle - low, 1e-12))
    levels = MaxNLocator(20).tick_values(low, values.max())
    filled = left.contourf(steps, second_steps, values, levels=levels, cmap="viridis")
    left.contour(
        steps, second_steps, values, levels=levels, colors="white", linewidths=0.4, alpha=0.6
    )
    left.plot(0, 0, marker="o", ms=5, color=ORANGE, markeredgecolor="white")
    left.set(xlabel=names[0], ylabel=names[1], title=f"Loss around {name_of(label)}")
    figure.colorbar(filled, ax=left, label="loss")
    right.remove()
    surface = figure.add_subplot(1, 2, 2, projection="3d")
    x, y = np.meshgrid(steps, second_steps)
    surface.plot_surface(x, y, values, cmap="viridis", linewidth=0, rstride=1, cstride=1)
    surface.set(xlabel=names[0], ylabel=names[1], zlabel="loss")
    surface.view_init(elev=32, azim=-58)
    surface.set_box_aspect(None, zoom=0.88)
    figure.savefig(path, dpi=130)


def over_rounds(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """lambda_max, and trace with its standard error, over rounds: a line per run.

    runs: by label, rows with "round" and what `measure` gives; those without are left out.
    """
    figure, (left, right) = new_figure(9.2, 3.6, columns=2)
    for label, all_rows in runs.items():
        rows = [row for row in all_rows if row.get("lambda_max") is not None]
        rounds = [row["round"] for row in rows]
        style = {"marker": "o", "ms": 2.5, "label": name_of(label)}
        left.plot(rounds, [row["lambda_max"] for row in rows], **style)
        rows = [row for row in rows if row.get("trace") is not None]
        rounds, traces = [row["round"] for row in rows], np.array([row["trace"] for row in rows])
        errors = np.array([row["trace_error"] for row in rows])
        (drawn,) = right.plot(rounds, traces, **style)
        colour = drawn.get_color()
        right.fill_between(
            rounds, traces - errors, traces + errors, color=colour, alpha=0.18, linewidth=0
        )
    left.set(xlabel="round", ylabel=LAMBDA, title="Largest eigenvalue of the Hessian")
    right.set(xlabel="round", ylabel=r"tr $H$", title="Trace, and its standard error")
    for axes in (left, right):
        plain(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if len(runs) > 1:
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def layer_bars(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Each layer's lambda_max, trace and mean squared input, top to bottom as in the network.

    rows: those of `measure`'s "layers".
    """
    figure, panels = new_figure(11, 1.4 + 0.26 * len(rows), columns=3)
    places = np.arange(len(rows))
    names = [f"{row['layer']} ({row['kind']})" for row in rows]
    columns = (
        ("lambda_max", LAMBDA + " of the layer's block", BLUE, None),
        ("trace", "trace of the layer's block", BLUE, "trace_error"),
        ("input_per_sample", r"input: mean $\|a\|^2$ per sample", ORANGE, None),
    )
    for panel, (key, title, colour, error) in zip(panels, columns, strict=True):
        widths = [row[key] or 0.0 for row in rows]
        spread = [row[error] for row in rows] if error else None
        panel.barh(places, widths, color=colour, height=0.7, xerr=spread, error_kw={"ecolor": GREY})
        panel.set_title(title, fontsize=10)
        panel.set_yticks(places, names if panel is panels[0] else [""] * len(rows), fontsize=8)
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.tick_params(axis="y", length=0)
        plain(panel, grid="x")
    figure.savefig(path, dpi=130)
