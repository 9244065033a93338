"""The parts of a report that are words and numbers: how runs ended, what they reached and cost,
their settings and commands.  Each goes from runs to HTML, empty where there is nothing to tell."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from fl_report import plots
from fl_report.compare import SERIES, TITLES, method_of
from fl_report.markup import (
    NONE,
    Markup,
    accuracy,
    element,
    folded,
    joined,
    number,
    seconds,
    section,
    size,
    table,
    text,
)
from fl_report.series import (
    OF_CLIENTS,
    SHARE_OF_BEST,
    curve,
    last,
    reached,
    refusal_counts,
    sent,
)
from fl_report.settings import changed, command, differences, meanings, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_report.compare import Run


def heading(title: str, runs: Sequence[Run]) -> Markup:
    """The title; for one run, its folder and how it ended."""
    parts = [element("h1", title)]
    if len(runs) == 1:
        parts += [element("p", runs[0].folder, class_="soft"), _ending(runs[0])]
    return element("header", joined(parts))


def _ending(run: Run) -> Markup:
    told = _status(run)
    if run.summary.get("status") == "running":
        told += ": it goes on, or was killed without a word"
    again = [number(t) for t in run.summary.get("resumed_after_rounds", ())]
    if again:
        told += text(", resumed after round ") + joined(again, ", ")
    back = [one["bytes"] for one in run.summary.get("memory_given_back", ())]
    if back:
        told += text("; clients that lost their memory were given it back: ") + number(len(back))
        told += text(" times, ") + size(sum(back))
    return element("p", told)


def _status(run: Run) -> Markup:
    """How it ended, with the reason if it failed."""
    status = str(run.summary.get("status", "unknown"))
    kind = {"completed": "good", "failed": "bad"}.get(status, "soft")
    reason = f": {run.summary['error']}" if "error" in run.summary else ""
    return element("span", status, class_=kind) + reason


def numbers(run: Run) -> Markup:
    """The headline numbers of one run."""
    summary, config = run.summary, run.config
    evaluated = [row for row in run.rows if row.get("accuracy") is not None]
    best = max(evaluated, key=lambda row: row["accuracy"], default={})
    end = evaluated[-1] if evaluated else {}
    up, down = sent(run)
    rounds, drawn = config.get("run.rounds"), config.get("clients.per-round")
    cells = [
        ("accuracy", accuracy(end.get("accuracy")), _in_round(end)),
        ("best accuracy", accuracy(best.get("accuracy")), _in_round(best)),
        ("loss", number(end.get("loss"), "{:.4f}"), _in_round(end)),
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
        "run", "accuracy", "best", *(TITLES[m] for m in models),
        *(OF_CLIENTS[key] for key in shares), "loss", "rounds", "up", "down", "time",
        "processor time", *["refused"] * any(refused), "status", "model_sha256",
    ]  # fmt: skip
    rows = []
    for i, run in enumerate(runs):
        accuracies = curve(run, "accuracy")[1]
        rows.append([
            _named(i, run) + _small(_other_name(run)),
            accuracy(accuracies[-1] if accuracies else None),
            accuracy(max(accuracies, default=None)),
            *(accuracy(last(run, SERIES[m])) for m in models),
            *(accuracy(last(run, key)) for key in shares),
            number(last(run, "loss"), "{:.4f}"),
            number(len(run.rows)),
            *map(size, sent(run)),
            seconds(run.summary.get("wall_s")),
            seconds(run.summary.get("cpu_s")),
            *[number(refused[i])] * any(refused),
            _status(run),
            element("code", run.summary.get("model_sha256", NONE)[:16]),
        ])  # fmt: skip
    return section("Runs", table(head, rows))


def _named(i: int, run: Run) -> Markup:
    """A run, with its colour in the pictures."""
    colour = plots.COLOURS[i % len(plots.COLOURS)]
    dot = element("span", "", class_="dot", style=f"background:{colour}")
    return dot + f"\N{NO-BREAK SPACE}{run.label}"


def _other_name(run: Run) -> str:
    """Its method where it is called by its folder, else its folder's name; empty if the same."""
    folder, method = run.folder.resolve().name, method_of(run.config)
    return "" if folder == method else folder if run.label == method else method


def target(runs: Sequence[Run], aim: float | None, given: bool) -> Markup:
    """Rounds, bytes and seconds to an accuracy."""
    if aim is None:
        return Markup("")
    rows = []
    for i, run in enumerate(runs):
        found = reached(run, aim)
        if found:
            spent = [number(found.round), size(found.bytes), seconds(found.seconds)]
        else:
            best = max(curve(run, "accuracy")[1], default=None)
            spent = [text("not reached; best ") + accuracy(best), "", ""]
        rows.append([_named(i, run) if len(runs) > 1 else run.label, *spent])
    why = "" if given else f", {SHARE_OF_BEST:.0%} of the best"
    told = text("The first evaluation with an accuracy of ") + accuracy(aim) + f" or more{why}."
    head = ["run", "round", "up and down", "time in rounds"]
    return section("To a target accuracy", element("p", told), table(head, rows))


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
    meant, rows = meanings(), []
    for key, values in differences(runs).items():
        marked = [_value(v) if v == values[0] else element("mark", _value(v)) for v in values]
        rows.append([_key(key, meant), *marked])
    if not rows:
        return section("Settings that differ", element("p", "None."))
    told = "All other settings are the same; marked: unlike the first run."
    head = ["setting", *(run.label for run in runs)]
    return section("Settings that differ", element("p", told), table(head, rows))


def _key(key: str, meant: dict[str, str]) -> Markup:
    return element("code", key) + _small(meant.get(key, "unknown to this version"))


def _value(value: Any) -> str:
    if value is None:
        return NONE
    return shown(value) if value != "" else "(empty)"


def commands(runs: Sequence[Run]) -> Markup:
    """What repeats each run, and what continues one that ended early."""
    parts = []
    for run in runs:
        if not run.config:
            continue
        if len(runs) > 1:
            parts.append(element("h3", run.label))
        parts.append(_shell(command(run.config)))
        if run.summary.get("status") != "completed" and (run.folder / "checkpoints").exists():
            parts.append(element("p", "To continue it from its last checkpoint:"))
            parts.append(_shell(shlex.join(["flatfed", "resume", str(run.folder)])))
    return section("To repeat it", *parts)


def _shell(line: str) -> Markup:
    return element("pre", element("code", line))
