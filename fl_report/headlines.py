"""The parts of a report that are words and numbers: how runs ended, what they reached and cost,
their settings and commands.  Each turns runs into HTML, empty where there is nothing to tell."""

from __future__ import annotations

import shlex
from dataclasses import replace
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from fl_common.results import checkpoints
from fl_report import plots
from fl_report.compare import SERIES, TITLES, method_of
from fl_report.figures import MANY, flatness_seconds
from fl_report.markup import (
    NONE,
    Markup,
    accuracy,
    element,
    folded,
    joined,
    loss_of,
    number,
    seconds,
    section,
    size,
    table,
    text,
)
from fl_report.seeds import ASIDE, SEED, Alike, alike, repeated
from fl_report.series import (
    OF_CLIENTS,
    SHARE_OF_BEST,
    curve,
    evaluated,
    final_loss,
    last,
    loss_told,
    reached,
    refusal_counts,
    sent,
)
from fl_report.settings import as_argument, changed, command, differences, meanings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_report.compare import Run

WIDE = 8
"""Most columns that can be read on paper."""


def heading(title: str, runs: Sequence[Run]) -> Markup:
    """The title; for one run, its folder and how it ended."""
    parts = [element("h1", title)]
    if len(runs) == 1:
        parts += [element("p", runs[0].folder, class_="soft"), element("p", _ending(runs[0]))]
    return element("header", joined(parts))


def _ending(run: Run) -> Markup:
    told = _status(run)
    if "error" in run.summary:
        told += f": {run.summary['error']}"
    if run.summary.get("status") == "running":
        told += ", unless it was killed"
    again = [number(t) for t in run.summary.get("resumed_after_rounds", ())]
    if again:
        told += text(", resumed after round ") + joined(again, ", ")
    back = [one["bytes"] for one in run.summary.get("memory_given_back", ())]
    if back:
        told += text("; clients that had lost their memory, or a part of the model, were given it ")
        told += text("back: ") + number(len(back))
        told += text(" times, ") + size(sum(back))
    return told


def _status(run: Run) -> Markup:
    """The word alone."""
    status = str(run.summary.get("status", "unknown"))
    kind = {"completed": "good", "failed": "bad"}.get(status, "soft")
    return element("span", status, class_=kind)


def numbers(run: Run) -> Markup:
    """The headline numbers of one run."""
    summary, config = run.summary, run.config
    rows = evaluated(run)
    best = max(rows, key=lambda row: row["accuracy"], default={})
    end = rows[-1] if rows else {}
    up, down = sent(run)
    rounds, drawn = config.get("run.rounds"), config.get("clients.per-round")
    cells = [
        ("accuracy", accuracy(end.get("accuracy")), _in_round(end)),
        ("best accuracy", accuracy(best.get("accuracy")), _in_round(best)),
        ("loss", loss_of(end), _in_round(end)),
        ("rounds", number(len(run.rows)), f"of {rounds}" if rounds else ""),
        ("up", size(up), "from clients"),
        ("down", size(down), "to clients"),
        ("time", seconds(summary.get("wall_s")), ""),
        ("processor time", seconds(summary.get("cpu_s")), "server and clients"),
        ("clients", number(summary.get("clients")), f"{drawn} a round" if drawn else ""),
        ("engine", summary.get("engine", NONE), f"seed {summary.get('seed', NONE)}"),
    ]
    if "flatness_bytes_up" in summary:
        measured = summary["flatness_bytes_up"] + summary["flatness_bytes_down"]
        cells.append(("to measure flatness", size(measured), "up and down, beside the above"))
    boxes = [
        element("div", element("dt", name) + element("dd", text(value) + _small(note)))
        for name, value, note in cells
    ]
    if "model_sha256" in summary:
        digest = element("dt", "model_sha256") + element("dd", summary["model_sha256"])
        boxes.append(element("div", digest, class_="long"))
    return element("dl", joined(boxes))


def _small(note: str) -> Markup:
    return element("small", note) if note else Markup("")


def _in_round(row: dict[str, Any]) -> str:
    return f"round {row['round']}" if row else "never evaluated"


def side_by_side(runs: Sequence[Run]) -> Markup:
    """The headline numbers of several runs."""
    models = [m for m in SERIES if m != "cloud" and any(run.series(m)[0] for run in runs)]
    shares = [key for key in OF_CLIENTS if any(last(run, key) is not None for run in runs)]
    refused = [sum(refusal_counts(run).values()) for run in runs]
    head = [
        "run", "status", "accuracy", "best", "loss", "rounds", "up", "down", "time",
        "processor time", *["refused"] * any(refused), *(TITLES[m] for m in models),
        *(OF_CLIENTS[key] for key in shares), "model_sha256",
    ]  # fmt: skip
    groups, rows = alike(runs), []
    for i, run in enumerate(runs):
        accuracies = curve(run, "accuracy")[1]
        rows.append([
            _named(run.label, _place(groups, run)) + _small(_other_name(run)),
            _status(run),
            accuracy(accuracies[-1] if accuracies else None),
            accuracy(max(accuracies, default=None)),
            loss_of((evaluated(run) or [{}])[-1]),
            number(len(run.rows)),
            *map(size, sent(run)),
            seconds(run.summary.get("wall_s")),
            seconds(run.summary.get("cpu_s")),
            *[number(refused[i])] * any(refused),
            *(accuracy(last(run, SERIES[m])) for m in models),
            *(accuracy(last(run, key)) for key in shares),
            element("code", run.summary.get("model_sha256", NONE)[:16]),
        ])  # fmt: skip
    # Below the table: in a narrow cell of it a line of text is as tall as a page.
    reasons = [
        element("p", text(f"{run.label} ") + _ending(run)) for run in runs if "error" in run.summary
    ]
    whole = joined([table(head, rows, cards=True), *reasons])
    if not repeated(groups):
        return section("Runs", whole)
    if len(runs) > MANY:
        return section("Means over seeds", _means(groups), folded(f"All {len(runs)} runs", whole))
    return section("Means over seeds", _means(groups)) + section("Runs", whole)


def _means(groups: Sequence[Alike]) -> Markup:
    """The headline numbers of runs that are alike but for their seed."""
    rows = []
    for i, group in enumerate(groups):
        known = [curve(run, "accuracy")[1] for run in group.counted]
        known = [accuracies for accuracies in known if accuracies]
        losses = [final_loss(run) for run in group.counted if evaluated(run)]
        up, down = (mean(sizes) for sizes in zip(*map(sent, group.counted), strict=True))
        times = [run.summary["wall_s"] for run in group.counted if "wall_s" in run.summary]
        rows.append([
            _named(group.label, i),
            number(len(group.counted)) + _out_of(group),
            _spread([accuracies[-1] for accuracies in known]),
            _spread([max(accuracies) for accuracies in known]),
            text(loss_told(None)) if None in losses else _spread(losses),
            size(round(up)),
            size(round(down)),
            seconds(mean(times) if times else None),
        ])  # fmt: skip
    told = "Of completed runs that differ in nothing but run.seed: mean ± standard deviation."
    head = ["method", "seeds", "accuracy", "best", "loss", "up", "down", "time"]
    return element("p", told) + table(head, rows, cards=True)


def _out_of(group: Alike) -> str:
    return f" of {len(group.runs)}" if len(group.counted) < len(group.runs) else ""


def _spread(values: Sequence[float]) -> Markup:
    if not values:
        return number(None)
    error = text(" ± ") + number(stdev(values), "{:.4f}") if len(values) > 1 else ""
    return accuracy(mean(values)) + error


def _place(groups: Sequence[Alike], run: Run) -> int:
    return next(i for i, group in enumerate(groups) if any(run is one for one in group.runs))


def _named(label: str, place: int) -> Markup:
    """A run, with its colour in the pictures."""
    colour = plots.COLOURS[place % len(plots.COLOURS)]
    dot = element("span", "\N{BLACK CIRCLE}", class_="dot", style=f"color:{colour}")
    return dot + f"\N{NO-BREAK SPACE}{label}"


def _other_name(run: Run) -> str:
    """Its method where it is called by its folder, else its folder's name; empty if the same."""
    folder, method = run.folder.resolve().name, method_of(run.config)
    return "" if folder == method else folder if run.label == method else method


def target(runs: Sequence[Run], aim: float | None, given: bool) -> Markup:
    """Rounds, bytes and seconds to an accuracy."""
    if aim is None:
        return Markup("")
    rows, groups = [], alike(runs)
    for i, group in enumerate(groups):
        found = [when for run in group.counted if (when := reached(run, aim))]
        name = _named(group.label, i) if len(runs) > 1 else group.label
        if not found:
            best = max(
                (a for run in group.counted for a in curve(run, "accuracy")[1]), default=None
            )
            rows.append([name, text("not reached; best ") + accuracy(best), "", ""])
            continue
        total = len(group.counted)
        some = f" ({len(found)} of {total} runs)" if len(found) < total else ""
        rounds = [when.round for when in found]
        rows.append([
            name,
            (number(rounds[0]) if total == 1 else number(mean(rounds), "{:.1f}")) + some,
            size(round(mean(when.bytes for when in found))),
            seconds(mean(when.seconds for when in found)),
        ])  # fmt: skip
    why = "" if given else f", {SHARE_OF_BEST:.0%} of the best"
    told = text("The first evaluation with an accuracy of ") + accuracy(aim) + f" or more{why}."
    if repeated(groups):
        told += " Means over the runs that reached it."
    head = ["run", "round", "up and down", "time in rounds"]
    return section(
        "To a target accuracy", element("p", told), flatness_seconds(runs), table(head, rows)
    )


def settings(runs: Sequence[Run]) -> Markup:
    """One run: what is not the default.  Several: what is not the same in all."""
    return _unusual(runs[0]) if len(runs) == 1 else _different(runs)


def _unusual(run: Run) -> Markup:
    if not run.config:
        return Markup("")
    meant = meanings()
    rows = [
        [_key(key, meant), element("mark", _value(value)), _value(default)]
        for key, (value, default) in changed(run.config).items()
    ]
    whole = table(["setting", "here", "default"], rows) if rows else element("p", "None.")
    versions = list(run.summary.get("versions", {}).items())
    made = folded("Versions", table(["package", "version"], versions)) if versions else ""
    return section("Settings that are not the default", whole, made)


def _different(runs: Sequence[Run]) -> Markup:
    meant, rows, groups = meanings(), [], alike(runs)
    told = "All other settings are the same; marked: unlike the first run."
    if repeated(groups):
        runs = [replace(group.runs[0], label=group.label) for group in groups]
        told = "All other settings but the seed are the same; marked: unlike the first."
    for key, values in differences(runs).items():
        if repeated(groups) and key in ASIDE:
            continue
        marked = [_value(v) if v == values[0] else element("mark", _value(v)) for v in values]
        rows.append([_key(key, meant), *marked])
    if not rows:
        return section("Settings that differ", element("p", "None."))
    head = ["setting", *(run.label for run in runs)]
    if len(runs) > WIDE:
        head, *rows = map(list, zip(*[["run", *head[1:]], *rows], strict=True))
    return section("Settings that differ", element("p", told), table(head, rows))


def _key(key: str, meant: dict[str, str]) -> Markup:
    return element("code", key) + _small(meant.get(key, "unknown to this version"))


def _value(value: Any) -> str:
    if value is None:
        return NONE
    return as_argument(value) if value != "" else "(empty)"


def commands(runs: Sequence[Run]) -> Markup:
    """What repeats each run, and what continues one that ended early."""
    parts = []
    for group in alike(runs):
        first, *others = group.runs
        if not first.config:
            continue
        if len(runs) > 1:
            parts.append(element("h3", group.label))
        parts.append(_shell(command(first.config)))
        if others:
            values = ", ".join(as_argument(run.config.get(SEED, NONE)) for run in others)
            parts.append(
                element("p", text("The others with ") + element("code", SEED) + f" = {values}.")
            )
    for run in runs:
        if not run.config:
            continue
        if run.summary.get("status") != "completed" and checkpoints(run.folder):
            which = "it" if len(runs) == 1 else run.label
            parts.append(element("p", f"To continue {which} from its last checkpoint:"))
            parts.append(_shell(shlex.join(["flatfed", "resume", str(run.folder)])))
    return section("To repeat it", *parts)


def _shell(line: str) -> Markup:
    return element("pre", element("code", line))
