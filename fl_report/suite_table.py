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
        "cells": cells,
    }


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
    told = [f"{device}: {_ours(some, metric)}" for device, some in alike.items()
            if _values(some, metric)]  # fmt: skip
    return "; ".join(told) or NONE


def _ours(cells: Sequence[Any], metric: Metric) -> str:
    """mean ± standard deviation (n - 1) over the runs that have the number."""
    values, runs, digits = _values(cells, metric), len(cells), metric.kind.digits
    if not values:
        return "never" if runs and metric.may_fail else NONE
    told = f"{fmean(values):.{digits}f}"
    if len(values) > 1:
        told += f" ± {stdev(values):.{max(digits, 1)}f}"
    of = f" of {runs}" if len(values) < runs else ""
    return f"{told} (n = {len(values)}{of})"
