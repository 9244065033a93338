"""Pictures are made of what the measurements give, gaps included."""

from __future__ import annotations

import struct

import pytest
import torch
from matplotlib.figure import Figure
from small_nets import Y, batch_norm, images, made

from fl_flatness import plots
from fl_flatness.landscape import filter_normalised, line, plane
from fl_flatness.measure import Settings, measure
from fl_flatness.products import Curvature, cut


@pytest.fixture(scope="module")
def found():
    settings = Settings(density_probes=1, density_steps=4, layers=True, probes=2)
    return measure(made(batch_norm), images(), Y, settings, seed=0)


def size(path) -> tuple[int, int]:
    """Width and height of a PNG file [px]."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_every_picture(found, tmp_path):
    path = tmp_path / "picture.png"
    plots.spectral_density({"one": found["density"], "other": found["density"]}, path)
    assert size(path) == (910, 468)
    plots.layer_bars(found["layers"], path)
    assert size(path)[0] == 1430
    rows = [{"round": 1} | found, {"round": 2}, {"round": 3, "lambda_max": None}]
    only_top = {"round": 4, "lambda_max": 1.0}
    plots.over_rounds({"one": [*rows, only_top], "none yet": []}, path)
    assert size(path) == (1196, 468)


def test_names_are_shown_as_they_are(tmp_path, monkeypatch):
    """Left to matplotlib, a leading underscore hides a line, and $ begins a formula."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    names, shown = ["_old", r"a$\nothing$"], [" _old", r"a\$\nothing\$"]
    steps, row = [-1.0, 0.0, 1.0], {"round": 1, "lambda_max": 1.0}
    density = {"nodes": steps, "weights": [0.2, 0.5, 0.3]}
    plots.spectral_density(dict.fromkeys(names, density), tmp_path)
    plots.loss_lines(dict.fromkeys(names, (steps, steps)), tmp_path, "first one")
    plots.over_rounds({name: [row] for name in names}, tmp_path)
    for figure in drawn:
        [legend] = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
        assert [text.get_text() for text in legend.get_texts()] == shown
    plots.loss_plane(steps, steps, [steps] * 3, tmp_path, ("one", "other"), names[1])
    drawn[-1].canvas.draw()
    assert drawn[-1].axes[0].get_title() == f"Loss around {shown[1]}"


def test_landscapes_with_infinite_losses(tmp_path):
    path, steps = tmp_path / "picture.png", [-1.0, 0.0, 1.0]
    curvature = Curvature(made(batch_norm), cut(images(), Y, 13))
    first, second = (filter_normalised(curvature, index=i) for i in (0, 1))
    plots.loss_lines({"mine": (steps, line(curvature, first, steps).tolist())}, path, "first one")
    assert size(path) == (780, 468)
    losses = plane(curvature, first, second, steps, [-1.0, 1.0])
    losses[0, 0], losses[1, 2] = torch.inf, torch.nan
    plots.loss_plane(steps, [-1.0, 1.0], losses, path, ("first one", "second one"))
    assert size(path) == (1365, 546)
    losses[:], losses[0, 1] = torch.inf, 0.5
    losses[1, 1] = torch.nan
    plots.loss_plane(steps, [-1.0, 1.0], losses, path, ("first one", "second one"))
    assert size(path) == (1365, 546)
