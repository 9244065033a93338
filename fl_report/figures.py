"""The parts of a report that have pictures, each beside its numbers.  Each goes from runs to HTML,
empty where no run recorded what it shows."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from fl_report import grad_norm, plots
from fl_report.compare import SERIES, TITLES
from fl_report.markup import (
    Markup,
    accuracy,
    element,
    folded,
    grid,
    number,
    of_rich,
    section,
    size,
    table,
    text,
)
from fl_report.series import (
    ANSWERED,
    AXES,
    FAILED,
    NOT_DRAWN,
    OF_CLIENTS,
    REJECTED,
    curve,
    last,
    local_gain,
    measurements,
    refusal_counts,
    refusals,
    states_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from fl_report.compare import Run
    from fl_report.markup import Pictures
    from fl_report.series import Axis

UNITS = {"rounds": "round", "bytes": "MB sent, up and down", "seconds": "seconds"}
SHOWN, LISTED = 20, 200
"""Refusals that are in sight, and that are listed at all; the history has all."""
MEASURED = {
    "lambda_max": "largest eigenvalue",
    "trace": "trace of the Hessian",
    "h_n": "H_N",
    "h_d": "H_D",
}


def curves(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """Accuracy and loss over rounds, bytes and seconds."""
    figures = []
    for what in ("accuracy", "loss"):
        for axis in AXES:
            lines = _of_runs(runs, what, axis) if len(runs) > 1 else _of_models(runs[0], what, axis)
            name = f"{what}-{axis}"
            title = f"test {what}" if len(runs) > 1 or what == "accuracy" else what
            figures += _drawn(pictures, name, lines, title, axis, what == "accuracy")
    for m, key in SERIES.items():
        if len(runs) > 1 and m != "cloud":
            lines = _of_runs(runs, key, "rounds")
            figures += _drawn(pictures, f"accuracy-{m}", lines, f"accuracy, {TITLES[m]}")
    return section("Accuracy and loss", grid(figures), _history(runs))


def _of_runs(runs: Sequence[Run], key: str, axis: Axis = "rounds") -> plots.Lines:
    return {run.label: curve(run, key, axis) for run in runs}


def _of_models(run: Run, what: str, axis: Axis) -> plots.Lines:
    columns = {TITLES[m]: key.replace("accuracy", what) for m, key in SERIES.items()}
    if what == "loss":
        columns["clients, while training"] = "client_loss"
    return {title: curve(run, key, axis) for title, key in columns.items()}


def _drawn(
    pictures: Pictures,
    name: str,
    lines: plots.Lines,
    what: str,
    axis: Axis = "rounds",
    percent: bool = True,
) -> list[Markup]:
    """One picture of those lines that have points; none if no line has two.

    axis: of x, in rounds, bytes or seconds.  percent: y are shares.
    """
    lines = {
        label: (
            [a / 1e6 for a in x] if axis == "bytes" else x,
            [100 * b for b in y] if percent else y,
        )
        for label, (x, y) in lines.items()
        if x
    }
    if not any(len(x) > 1 for x, _ in lines.values()):
        return []
    told = "; ".join(
        f"{label}: {y[0]:.4g} at {x[0]:.4g} to {y[-1]:.4g} at {x[-1]:.4g}, lowest {min(y):.4g}, "
        f"highest {max(y):.4g}"
        for label, (x, y) in lines.items()
    )
    caption = f"{what[0].upper()}{what[1:]} over {axis}"
    unit = f"{what} [%]" if percent else what

    def draw(path: Path) -> None:
        plots.lines(lines, UNITS[axis], unit, path)

    return [pictures.figure(name, draw, f"{caption}. {told}.", caption)]


def _history(runs: Sequence[Run]) -> Markup:
    """Every round's numbers, of one run."""
    if len(runs) > 1 or not runs[0].rows:
        return Markup("")
    rows = [
        [
            number(row["round"]),
            accuracy(row.get("accuracy")),
            number(row.get("loss"), "{:.4f}"),
            number(row.get("client_loss"), "{:.4f}"),
            number(len(row.get("replies", ()))) + " of " + number(len(row.get("cohort", ()))),
            size(row.get("bytes_up")),
            size(row.get("bytes_down")),
            number(row.get("seconds"), "{:.2f}"),
        ]
        for row in runs[0].rows
    ]
    head = ["round", "accuracy", "loss", "client loss", "clients", "up", "down", "s"]
    return folded(f"All {len(rows)} rounds as numbers", table(head, rows))


def labels(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """What the clients hold; runs of one partition share a picture."""
    distinct: list[tuple[Mapping[str, Any], list[str]]] = []
    for run in runs:
        same = [names for clients, names in distinct if clients == run.clients]
        if same:
            same[0].append(run.label)
        elif run.clients:
            distinct.append((run.clients, [run.label]))
    figures = []
    for i, (held, names) in enumerate(distinct):
        counts, classes, samples = held["label_counts"], held["classes"], held["samples"]
        most = [sum(1 for count in client if count) for client in counts]
        caption = (
            f"{len(samples)} clients hold {sum(samples)} training samples of {len(classes)} "
            f"classes: {min(samples)} to {max(samples)} samples and {min(most)} to {max(most)} "
            "classes each."
        )
        if len(distinct) > 1:
            caption = f"{', '.join(names)}: {caption}"

        def draw(path: Path, counts: Any = counts, classes: Any = classes) -> None:
            plots.label_distribution(counts, classes, path)

        name = f"labels-{i + 1}" if i else "labels"
        figures.append(pictures.figure(name, draw, caption, caption, wide=True))
    return section("Labels over clients", *figures)


def clients(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """Accuracy on every client's own held-out samples."""
    title = "Accuracy on the clients"
    if len(runs) > 1:
        figures = []
        for key, what in OF_CLIENTS.items():
            figures += _drawn(pictures, key, _of_runs(runs, key), f"accuracy, {what}")
        return section(title, grid(figures))
    run = runs[0]
    row = next((row for row in reversed(run.rows) if row.get("client_accuracy")), None)
    if row is None:
        return Markup("")
    values = row["client_accuracy"]
    worst = math.ceil(len(values) / 10)
    caption = f"Each client's own held-out samples, round {row['round']}; orange: the worst tenth"

    def draw(path: Path) -> None:
        percent = {name: 100 * value for name, value in values.items()}
        plots.sorted_bars(percent, worst, "accuracy [%]", path)

    lowest, highest = min(values.values()), max(values.values())
    alt = f"{caption}. From {lowest:.4f} to {highest:.4f}."
    bars = pictures.figure("client-accuracy", draw, alt, caption)
    lines = {what: curve(run, key) for key, what in OF_CLIENTS.items()}
    rows = [[what, accuracy(row.get(key))] for key, what in OF_CLIENTS.items()]
    rows += [["lowest", accuracy(lowest)], ["highest", accuracy(highest)]]
    return section(
        title,
        table(["accuracy", f"round {row['round']}"], rows),
        grid([bars, *_drawn(pictures, "client-accuracy-rounds", lines, "accuracy on clients")]),
    )


def drift(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """How far local training leads away from what is good for all."""
    rows, lines = [], {}
    for run in runs:
        both = [
            (row["client_loss"], row["loss"])
            for row in run.rows
            if row.get("client_loss") is not None and row.get("loss") is not None
        ]
        own, test = both[-1] if both else (None, None)
        gains = local_gain(run)
        _, before, after = gains[-1] if gains else (None, None, None)
        rows.append([
            run.label, number(own, "{:.4f}"), number(test, "{:.4f}"),
            number(test - own if both else None, "{:+.4f}"),
            accuracy(before), accuracy(after),
            number(after - before if gains else None, "{:+.4f}"),
        ])  # fmt: skip
        if gains:
            prefix = f"{run.label}, " if len(runs) > 1 else ""
            rounds = [t for t, _, _ in gains]
            lines[f"{prefix}as received"] = (rounds, [b for _, b, _ in gains])
            lines[f"{prefix}after training"] = (rounds, [a for _, _, a in gains])
    told = (
        "Losses: of the clients on their own samples while they train, and of the global model "
        "where it is evaluated; the last round that has both."
    )
    head = ["run", "client loss", "global loss", "difference"]
    if lines:
        head += ["received", "trained", "gain"]
        told += (
            " Received, trained: accuracy on the clients' own held-out samples before and after "
            "local training, the mean over those that trained."
        )
    elif not any(run.rows for run in runs):
        return Markup("")
    figures = _drawn(pictures, "drift", lines, "accuracy on own samples")
    short = [row[: len(head)] for row in rows]
    return section("Client drift", element("p", told), table(head, short), grid(figures))


def participation(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """Who took part, and whose answers did not come or did not count."""
    parts: list[Markup] = []
    if len(runs) == 1 and runs[0].rows:
        parts += _who(runs[0], pictures)
    listed = [(run.label, refusal) for run in runs for refusal in refusals(run)]
    if not listed:
        if any(run.rows for run in runs):
            parts.append(element("p", "No client failed and no update was rejected."))
        return section("Participation", *parts)
    counts = sum((refusal_counts(run) for run in runs), Counter())
    kinds = ", ".join(f"{count} {what}" for what, count in counts.items())
    parts.append(element("h3", f"Failures and rejected updates: {kinds}"))
    rows = [
        [number(r.round), *[label] * (len(runs) > 1), number(r.client), r.what, r.reason]
        for label, r in listed[:LISTED]
    ]
    head = ["round", *["run"] * (len(runs) > 1), "client", "what", "reason"]
    whole = table(head, rows)
    more = f"The first {LISTED}; history.jsonl has all" if len(listed) > LISTED else "All"
    parts.append(folded(f"{more} {len(listed)}", whole) if len(listed) > SHOWN else whole)
    return section("Participation", *parts)


def _who(run: Run, pictures: Pictures) -> list[Markup]:
    """A strip of clients over rounds, and each client's numbers."""
    states = states_of(run)
    if not states.size:
        return []
    rounds = [row["round"] for row in run.rows]
    drawn = (states != NOT_DRAWN).sum(axis=1)
    if (states == ANSWERED).all():
        told = f"All {len(states)} clients took part in all {len(rounds)} rounds."
        shown = element("p", told)
    else:
        caption = (
            f"Each of {len(states)} clients was drawn for {drawn.min()} to {drawn.max()} of "
            f"{len(rounds)} rounds"
        )

        def draw(path: Path) -> None:
            plots.participation(states, rounds, path)

        alt = f"Clients over rounds. {caption}."
        shown = pictures.figure("participation", draw, alt, caption, wide=True)
    return [shown, folded(f"All {len(states)} clients as numbers", _each(run, states, drawn))]


def _each(run: Run, states: np.ndarray, drawn: np.ndarray) -> Markup:
    samples = run.clients.get("samples", [None] * len(states))
    own = last(run, "client_accuracy") or {}
    rows = []
    for k, of_client in enumerate(states):
        counted = [int((of_client == state).sum()) for state in (ANSWERED, FAILED, REJECTED)]
        cells = [number(k), number(samples[k]), number(int(drawn[k])), *map(number, counted)]
        rows.append([*cells, *([accuracy(own.get(str(k)))] if own else [])])
    head = ["client", "samples", "drawn", "answered", "no answer", "rejected"]
    return table([*head, *["accuracy"] * bool(own)], rows)


def gradients(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """The norm of the local gradient over steps, and its jumps at aggregations."""
    recorded = [run for run in runs if any("grad_norm" in row for row in run.rows)]
    if not recorded:
        return Markup("")
    caption = "The mean over clients at every local step; dotted lines: aggregations"

    def draw(path: Path) -> None:
        grad_norm.draw(recorded, path)

    figure = pictures.figure("grad-norm", draw, f"Gradient norm. {caption}.", caption, wide=True)
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
        lines = _of_runs(runs, key)
        figures += _drawn(pictures, f"flatness-{key}", lines, MEASURED[key], percent=False)
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
