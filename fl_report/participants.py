"""The parts of a report that tell of the clients: what they hold, how well the model serves each,
how far they drift apart, who took part.  Each turns runs into HTML, empty where no run recorded
what it shows."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from fl_report import plots
from fl_report.figures import MANY, drawn, of_runs
from fl_report.markup import (
    Markup,
    accuracy,
    element,
    folded,
    grid,
    joined,
    loss,
    number,
    section,
    table,
)
from fl_report.seeds import Line
from fl_report.series import (
    ANSWERED,
    FAILED,
    NOT_DRAWN,
    OF_CLIENTS,
    OF_UPDATES,
    REJECTED,
    curve,
    gain_of,
    last,
    local_gain,
    refusal_counts,
    refusals,
    states_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from fl_report.compare import Run
    from fl_report.markup import Pictures
    from fl_report.series import Refusal

SHOWN, LISTED = 20, 200
"""Most lines of refusals that are not folded, and that a page has; the history has all."""
NAMED = 6
"""Clients that a line of refusals names."""
PARTITIONS = 2
"""Pictures of partitions that are not folded."""


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
        each = f"{_range(samples)} samples and {_range(most)} classes each"
        caption = (
            f"{len(samples)} clients hold {sum(samples)} training samples of {len(classes)} "
            f"classes: {each}."
        )
        if len(distinct) > 1:
            caption = f"{', '.join(names)}: {caption}"

        def draw(path: Path, counts: Any = counts, classes: Any = classes) -> None:
            plots.label_distribution(counts, classes, path)

        name = f"labels-{i + 1}" if i else "labels"
        figures.append(pictures.figure(name, draw, caption, caption))
    more, rest = figures[PARTITIONS:], ""
    if more:
        rest = folded(f"{len(more)} more partitions", joined(more))
    return section("Labels over clients", *figures[:PARTITIONS], rest)


def clients(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """Accuracy on every client's own held-out samples."""
    title = "Accuracy on the clients"
    if len(runs) > 1:
        figures = []
        for key, what in OF_CLIENTS.items():
            figures += drawn(pictures, key, of_runs(runs, key), f"accuracy, {what}")
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
    lines = {what: Line(*curve(run, key)) for key, what in OF_CLIENTS.items()}
    rows = [[what, accuracy(row.get(key))] for key, what in OF_CLIENTS.items()]
    rows += [["lowest", accuracy(lowest)], ["highest", accuracy(highest)]]
    return section(
        title,
        table(["accuracy", f"round {row['round']}"], rows),
        grid([bars, *drawn(pictures, "client-accuracy-rounds", lines, "accuracy on clients")]),
    )


def drift(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """How far local training leads away from what is good for all."""
    gained = any(map(local_gain, runs))
    moved = any(last(run, key) is not None for run in runs for key in OF_UPDATES)
    rows, partial = [], False
    for run in runs:
        both = [
            (row["client_loss"], row["loss"])
            for row in run.rows
            if row.get("client_loss") is not None and row.get("loss") is not None
        ]
        own, test = both[-1] if both else (None, None)
        gains = local_gain(run)
        _, before, after = gains[-1] if gains else (None, None, None)
        more = "{:+.4f}" if both and test < 1e4 else "{:+.3e}"
        row = [run.label, loss(own), loss(test), number(test - own if both else None, more)]
        if gained:
            gain = number(after - before if gains else None, "{:+.4f}")
            row += [accuracy(before), accuracy(after), gain]
        if moved:
            moving = [own for own in run.rows if own.get("update_norm") is not None]
            mark = "*" if moving and moving[-1].get("active") else ""
            row += [number(last(run, key), "{:.4g}") + mark for key in OF_UPDATES]
            partial |= bool(mark)
        rows.append(row)
    told = (
        "Losses: of the clients on their own samples while they train, without what regularizers "
        "add, and of the global model where it is evaluated; the last round that has both."
    )
    head = ["run", "client loss", "global loss", "difference"]
    if gained:
        head += ["received", "trained", "gain"]
        told += (
            " Received, trained: accuracy on the clients' own held-out samples before and after "
            "local training, the mean over those that trained."
        )
    if moved:
        head += OF_UPDATES.values()
        told += (
            " An update: trained less received parameters, in the last round that was evaluated; "
            "alignment: 1 where all clients made the same, 1 / K where K clients went each their "
            "own way, at right angles, and 0 where what they did cancels out."
        )
    if partial:
        told += (
            " *: a round in which some groups of layers trained and the others were frozen; it "
            "does not compare with full rounds."
        )
    if not any(run.rows for run in runs):
        return Markup("")
    short = table(head, rows, cards=True)
    if len(runs) > MANY:
        short = folded(f"All {len(runs)} runs as numbers", short)
    return section("Client drift", element("p", told), short, grid(_drifts(runs, pictures)))


def _drifts(runs: Sequence[Run], pictures: Pictures) -> list[Markup]:
    aligned, alignment = of_runs(runs, "update_alignment"), OF_UPDATES["update_alignment"]
    if len(runs) == 1:
        gains = local_gain(runs[0])
        rounds = [t for t, _, _ in gains]
        lines = {
            "as received": Line(rounds, [before for _, before, _ in gains]),
            "after training": Line(rounds, [after for _, _, after in gains]),
        }
        lengths = ("update_norm", "update_norm_max")
        norms = {OF_UPDATES[key]: Line(*curve(runs[0], key)) for key in lengths}
        return [
            *drawn(pictures, "drift", lines, "accuracy on own samples"),
            *drawn(pictures, "update-norm", norms, "length of updates", percent=False),
            *drawn(pictures, "update-alignment", aligned, alignment, percent=False),
        ]
    norms, norm = of_runs(runs, "update_norm"), OF_UPDATES["update_norm"]
    losses = of_runs(runs, "client_loss")
    return [
        *drawn(pictures, "drift", of_runs(runs, gain_of), "gain on own samples by training"),
        *drawn(
            pictures, "client-loss", losses, "loss of the clients while training", percent=False
        ),
        *drawn(pictures, "update-norm", norms, norm, percent=False),
        *drawn(pictures, "update-alignment", aligned, alignment, percent=False),
    ]


def participation(runs: Sequence[Run], pictures: Pictures) -> Markup:
    """Who took part, and whose answers did not come or did not count."""
    parts: list[Markup] = []
    if len(runs) == 1 and runs[0].rows:
        parts += _who(runs[0], pictures)
    refused = [(run, refusals(run)) for run in runs]
    if not any(found for _, found in refused):
        if any(run.rows for run in runs):
            parts.append(element("p", "No client failed and no update was rejected."))
        return section("Participation", *parts)
    counts = sum((refusal_counts(run) for run in runs), Counter())
    kinds = ", ".join(f"{count} {what}" for what, count in counts.items())
    parts.append(element("h3", f"Failures and rejected updates: {kinds}"))
    rows = [
        [number(same[0].round), *[run.label] * (len(runs) > 1), *_by_reason(same)]
        for run, found in refused
        for same in _alike(found)
    ]
    head = ["round", *["run"] * (len(runs) > 1), "clients", "what", "reason"]
    whole = table(head, rows[:LISTED])
    more = f"The first {LISTED} of" if len(rows) > LISTED else "All"
    title = f"{more} {len(rows)}, by round and reason"
    parts.append(folded(title, whole) if len(rows) > SHOWN else whole)
    return section("Participation", *parts)


def _alike(found: Sequence[Refusal]) -> Collection[list[Refusal]]:
    """Refusals grouped by round and reason, whatever numbers are in the reason."""
    groups: dict[object, list[Refusal]] = {}
    for one in found:
        same = one.round, one.what, re.sub(r"\d+", "", one.reason)
        groups.setdefault(same, []).append(one)
    return groups.values()


def _by_reason(same: Sequence[Refusal]) -> list[str]:
    """Whom it concerns, what became of them, and why."""
    names = ", ".join(str(one.client) for one in same[:NAMED])
    more = f" and {len(same) - NAMED} more" if len(same) > NAMED else ""
    differ = len({one.reason for one in same}) > 1
    return [names + more, same[0].what, same[0].reason + " (other numbers in others)" * differ]


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
        often = _range(drawn)
        caption = f"Each of {len(states)} clients was drawn for {often} of {len(rounds)} rounds"

        def draw(path: Path) -> None:
            plots.participation(states, rounds, path)

        alt = f"Clients over rounds. {caption}."
        shown = pictures.figure("participation", draw, alt, caption)
    return [shown, folded(f"All {len(states)} clients as numbers", _each(run, states, drawn))]


def _range(counts: Iterable[int]) -> str:
    """From the least to the most; one number where they are the same."""
    return " to ".join(map(str, dict.fromkeys([min(counts), max(counts)])))


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
