"""What a suite came to: *published | ours | difference*, from the results folders of its cells.

`gather` reads the folders into plain JSON; all else is made from that JSON alone, so that a page
(`suite_page`) can be made again from the file beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fl_common.results import SUMMARY
from fl_report import compare
from fl_report.suite import NUMBER
from fl_report.suite_metrics import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from fl_report.suite import Plan

NONE = "-"


def gather(
    plan: Plan,
    base: Path,
    command: str,
    measured: Callable[[Path], dict[str, Any]],
    code_of: Callable[[Path], str],
    overrides: Iterable[str] = (),
) -> dict[str, Any]:
    """Everything that the table tells, as JSON has it.

    measured, code_of: what a folder says of a cell besides its run.
    overrides: settings of the command line with which the cells are not the suite's.
    """
    suite, cells = plan.suite, []
    for cell in plan.cells:
        folder = base / cell.name
        told: dict[str, Any] = {
            "cell": cell.name,
            "method": cell.method,
            "setting": cell.setting,
            "seed": cell.seed,
            "status": "missing",
        }
        try:
            [run] = compare.read([folder])
        except ValueError:
            if (folder / SUMMARY).exists():
                told["status"] = "broken"
            cells.append(told)
            continue
        told["status"] = run.summary.get("status", "unknown")
        if told["status"] == "failed" and run.summary.get("error") in ("interrupted", "stopped"):
            told["status"] = run.summary["error"]
        if told["status"] == "completed":
            extra, summary = measured(folder), run.summary
            told |= {
                "values": {m.name: m.value(run, extra) for m in plan.metrics},
                "rounds": summary["rounds"],
                "wall_s": summary["wall_s"],
                "cpu_s": summary["cpu_s"],
                "device": summary.get("device") or run.config.get("train.device", "auto"),
                "date": extra.get("date", "unknown"),
                "jobs": extra.get("jobs"),
                "model_sha256": summary["model_sha256"],
                "code": code_of(folder),
                "versions": summary["versions"],
                "curve": _curve(run),
            }
        cells.append(told)
    reduced = suite.reduced.about if plan.reduced and suite.reduced else ""
    return {
        "name": plan.folder_name,
        "title": suite.title,
        "source": suite.source,
        "about": suite.about,
        "command": command,
        "reduced": plan.reduced,
        "reduced_about": reduced,
        "overrides": list(overrides),
        "metrics": [metric.name for metric in plan.metrics],
        "published": [block.model_dump() for block in suite.published],
        "against": dict(suite.against),
        "cells": cells,
    }


def _curve(run: compare.Run) -> dict[str, list[float]]:
    """Where the global model was evaluated: rounds, MB until then (up and down), accuracies."""
    rounds, accuracies = run.series("cloud")
    sent = run.megabytes()
    return {"rounds": rounds, "mb": [sent[t] for t in rounds], "accuracy": accuracies}


def with_shared_settings(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the settings that all its completed runs share told once."""
    cells = table["cells"]
    every = [cell["settings"].items() for cell in cells if "settings" in cell]
    shared = dict(every[0]) if every else {}
    shared = {k: v for k, v in shared.items() if all((k, v) in items for items in every)}
    apart = [
        cell | {"settings": {k: v for k, v in cell["settings"].items() if k not in shared}}
        if "settings" in cell
        else cell
        for cell in cells
    ]
    return {**table, "settings": shared, "cells": apart}


def completed(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The completed runs of a table, each with all its settings and the command that made it, by
    name.  A table written by an older version has no settings."""
    return {
        cell["cell"]: cell
        | {
            "settings": {**table.get("settings", {}), **cell.get("settings", {})},
            "command": cell.get("command", table["command"]),
        }
        for cell in table.get("cells", ())
        if cell["status"] == "completed"
    }


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    setting: str
    method: str
    metric: str
    published: str
    """As printed."""
    block: int | None
    """Which block of `published` it is from."""
    ours: str
    difference: str
    runs: int
    """Completed ones."""
    missing: int
    """Cells that are not there."""


def rows(table: Mapping[str, Any]) -> list[Row]:
    """By setting, metric and method, in the order of the suite."""
    cells = table["cells"]
    settings = dict.fromkeys(cell["setting"] for cell in cells)
    methods = dict.fromkeys(cell["method"] for cell in cells)
    found = []
    for setting in settings:
        for name in table["metrics"]:
            for method in methods:
                group = [c for c in cells if (c["setting"], c["method"]) == (setting, method)]
                if group and (row := _row(table, setting, method, Metric.of(name), group)):
                    found.append(row)
    return found


def _row(
    table: Mapping[str, Any], setting: str, method: str, metric: Metric, group: Sequence[Any]
) -> Row | None:
    """None where there is nothing: no number is published, and the runs have none."""
    there = [cell for cell in group if cell["status"] == "completed"]
    values = _values(there, metric)
    printed, place = _published(table, setting, method, metric.name)
    block = None if place is None else table["published"][place]
    if there and not values and not printed and not metric.may_fail:
        return None
    why = _incomparable(table, metric, block)
    match = NUMBER.fullmatch(printed)
    difference = NONE
    if match and values and not why:
        difference = f"{fmean(values) - float(match[1]):+.{metric.kind.digits}f}"
    return Row(
        setting,
        method,
        metric.title,
        printed or NONE,
        place,
        _by_device(there, metric) if metric.kind.of_machine else _ours(there, metric),
        difference,
        len(there),
        len(group) - len(there),
    )


def _published(
    table: Mapping[str, Any], setting: str, method: str, metric: str
) -> tuple[str, int | None]:
    """The number as printed, and the place of its block."""
    for place, block in enumerate(table["published"]):
        columns = block["settings"] or [""]
        if block["metric"] == metric and setting in columns and method in block["values"]:
            value = block["values"][method][columns.index(setting)]
            if value != "":
                return str(value), place
    return "", None


def _incomparable(
    table: Mapping[str, Any], metric: Metric, block: Mapping[str, Any] | None
) -> bool:
    """Whether ours were made under other conditions than the published numbers."""
    other = block is not None and bool(block["differs"])
    return bool(table["reduced"] or table["overrides"] or metric.kind.of_machine or other)


def _values(cells: Sequence[Any], metric: Metric) -> list[float]:
    return [v for cell in cells if (v := cell["values"].get(metric.name)) is not None]


def _by_device(cells: Sequence[Any], metric: Metric) -> str:
    """Means over runs on the same device, for other means would say nothing."""
    devices = sorted({cell["device"] for cell in cells})
    if len(devices) < 2:
        return _ours(cells, metric)
    alike = {device: [cell for cell in cells if cell["device"] == device] for device in devices}
    told = [f"{device}: {_spread(values, metric.kind.digits)} (n = {len(values)})"
            for device, some in alike.items() if (values := _values(some, metric))]  # fmt: skip
    return "; ".join(told) or NONE


def _ours(cells: Sequence[Any], metric: Metric) -> str:
    """mean ± standard deviation (n - 1) over the runs that have the number."""
    values = _values(cells, metric)
    if not values:
        return "never" if cells and metric.may_fail else NONE
    return _spread(values, metric.kind.digits) + _of_all(len(values), len(cells))


def _spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    told = f"{fmean(values):{sign}.{digits}f}"
    return told + (f" ± {stdev(values):.{max(digits, 1)}f}" if len(values) > 1 else "")


@dataclass(frozen=True)
class Pair:
    """A method beside its base in a setting, run by run."""

    setting: str
    method: str
    base: str
    differences: dict[str, str]
    """By metric: mean ± standard deviation over the seeds that have both numbers, or, with an x,
    of their ratios."""
    seeds: int
    """That have both runs."""


def pairs(table: Mapping[str, Any]) -> list[Pair]:
    """Each method less the method that the suite has it `against`, seed by seed: partitions and
    batches are those of the seed, so that their spread is not in the differences.  Of times and
    memory, its share of the other's."""
    done = {
        (cell["setting"], cell["method"], cell["seed"]): cell
        for cell in table["cells"]
        if cell["status"] == "completed"
    }
    settings = dict.fromkeys(cell["setting"] for cell in table["cells"])
    metrics = [Metric.of(name) for name in table["metrics"]]
    found = []
    for setting in settings:
        for method, base in table.get("against", {}).items():
            both = [
                (cell, done[setting, base, seed])
                for (its, name, seed), cell in done.items()
                if (its, name) == (setting, method) and (setting, base, seed) in done
            ]
            told = {metric.title: _beside(both, metric) for metric in metrics}
            if any(text != NONE for text in told.values()):
                found.append(Pair(setting, method, base, told, len(both)))
    return found


def _beside(both: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], metric: Metric) -> str:
    there = [
        (one, other, a, b)
        for one, other in both
        if (a := one["values"].get(metric.name)) is not None
        and (b := other["values"].get(metric.name)) is not None
    ]
    if metric.kind.of_machine:
        return _ratios(there, len(both))
    if not there:
        return NONE
    told = _spread([a - b for _, _, a, b in there], metric.kind.digits, "+")
    return told + _of_all(len(there), len(both))


def _ratios(there: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], float, float]],
            pairs: int) -> str:  # fmt: skip
    """Of runs on the same device, with as many beside them; by device, as `_by_device`."""
    found: dict[str, list[float]] = {}
    for one, other, a, b in there:
        if b and all(one.get(key) == other.get(key) for key in ("device", "jobs")):
            found.setdefault(one["device"], []).append(a / b)
    told = {device: f"x {_spread(ratios, 2)}" for device, ratios in sorted(found.items())}
    if len(told) > 1:
        return "; ".join(f"{d}: {text} (n = {len(found[d])})" for d, text in told.items())
    return "".join(f"{text}{_of_all(len(found[d]), pairs)}" for d, text in told.items()) or NONE


def _of_all(counted: int, runs: int) -> str:
    """What tells that not all runs have a number."""
    return f" ({counted} of {runs})" if counted < runs else ""
