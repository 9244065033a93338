"""The table of a suite, for the terminal and as a page: functions of its JSON alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fl_common.files import write_atomically
from fl_report import markup
from fl_report.markup import element, joined
from fl_report.suite_metrics import Metric
from fl_report.suite_table import NONE, rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

    from fl_report.markup import Markup

MEAN = "Mean ± standard deviation over the seeds (n runs)."


def _ours(table: Mapping[str, Any]) -> str:
    if table["reduced"]:
        return "ours, reduced"
    return "ours, other settings" if table["overrides"] else "ours"


def _columns(table: Mapping[str, Any]) -> dict[str, str]:
    """Headings, each with the field of a row that stands below it."""
    by_setting = any(cell["setting"] for cell in table["cells"])
    return {
        **({"setting": "setting"} if by_setting else {}),
        "method": "method",
        "metric": "metric",
        **({"published": "published"} if table["published"] else {}),
        _ours(table): "ours",
        **({"difference": "difference"} if table["published"] else {}),
    }


def _lines(table: Mapping[str, Any]) -> list[list[str]]:
    found, numbers = [], _cited(table)
    for row in rows(table):
        mark = "" if row.block is None else f" [{numbers[row.block]}]"
        missing = f" ({row.missing} missing)" if row.missing else ""
        told = asdict(row) | {"published": row.published + mark, "ours": row.ours + missing}
        found.append([told[name] for name in _columns(table).values()])
    return found


def _cited(table: Mapping[str, Any]) -> dict[int, int]:
    """The published blocks that a line is from, each with the number of its remark."""
    places = sorted({row.block for row in rows(table) if row.block is not None})
    return {place: number for number, place in enumerate(places, 1)}


def terminal(table: Mapping[str, Any]) -> Table:
    """For the terminal (rich)."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(box=SIMPLE, pad_edge=False, title=table["title"], caption=_caption(table))
    for heading in _columns(table):
        left = heading in ("setting", "method", "metric")
        made.add_column(heading, justify="left" if left else "right")
    for line in _lines(table):
        made.add_row(*line)
    return made


def _caption(table: Mapping[str, Any]) -> str:
    return " ".join(["mean ± standard deviation (n runs).", *_conditions(table)])


def opening(table: Mapping[str, Any]) -> Markup:
    """What stands on top of the report of its runs: how they were made, and the table."""
    told = [element("p", element("strong", line)) for line in _conditions(table)]
    told += [element("p", MEAN), markup.table(list(_columns(table)), _lines(table))]
    return joined([*told, *(element("p", line, class_="soft") for line in _remarks(table))])


def _conditions(table: Mapping[str, Any]) -> list[str]:
    told, compared = [], ""
    if table["published"]:
        compared = "; so it is not compared with the published numbers"
    if table["reduced"]:
        about = f": {table['reduced_about']}" if table["reduced_about"] else ""
        told.append(f"Reduced{about}{compared}.")
    if table["overrides"]:
        keys = ", ".join(table["overrides"])
        told.append(f"Other settings than the suite's ({keys}){compared}.")
    missing = [c["status"] for c in table["cells"] if c["status"] != "completed"]
    if missing:
        begun = Counter(status for status in missing if status != "missing")
        why = ", ".join(f"{count} {status}" for status, count in begun.items())
        whole = f"{len(missing)} of {len(table['cells'])} runs are missing"
        told.append(f"{whole} ({why})." if why else f"{whole}.")
    return told


def markdown(table: Mapping[str, Any]) -> str:
    """The page of a suite: a function of the JSON alone."""
    parts = [f"# {table['title']}\n"]
    if table["about"]:
        parts.append(f"{table['about']}\n")
    if table["source"]:
        parts.append(f"Published: {table['source']}.\n")
    parts += [f"**{text}**\n" for text in _conditions(table)]
    parts.append(f"{MEAN}\n")
    parts.append(_grid(list(_columns(table)), _lines(table)))
    parts += [f"{line}\n" for line in _remarks(table)]
    done = [cell for cell in table["cells"] if cell["status"] == "completed"]
    commands = dict.fromkeys(cell.get("command", table["command"]) for cell in done)
    told = "\n".join(commands or [table["command"]])
    parts.append(f"\n## How it was made\n\n```\n{told}\n```\n")
    parts.append(_made(done, table.get("elapsed_s")))
    parts.append("\n## Every run\n")
    apart = ["device"] if len(_devices(done)) > 1 else []
    parts.append(_grid(["run", *_titles(table), "rounds", "wall s", "CPU s", *apart, "model"],
                       [_run(table, cell, apart) for cell in table["cells"]]))  # fmt: skip
    return "\n".join(parts)


def _devices(done: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({cell["device"] for cell in done})


def _titles(table: Mapping[str, Any]) -> list[str]:
    return [Metric.of(name).title for name in table["metrics"]]


def _run(table: Mapping[str, Any], cell: Mapping[str, Any], more: Sequence[str]) -> list[str]:
    """`more`: what else is told of the run."""
    names = table["metrics"]
    if cell["status"] != "completed":
        nothing = [NONE] * (len(names) + len(more) + 3)
        return [cell["cell"], *nothing, cell["status"]]
    numbers = [_number(Metric.of(name), cell["values"].get(name)) for name in names]
    times = [f"{cell['wall_s']:.1f}", f"{cell['cpu_s']:.1f}"]
    told = [*times, *(cell[key] for key in more)]
    return [cell["cell"], *numbers, str(cell["rounds"]), *told, cell["model_sha256"][:12]]


def _number(metric: Metric, value: float | None) -> str:
    return NONE if value is None else f"{value:.{metric.kind.digits + 1}f}"


def _made(done: Sequence[Mapping[str, Any]], elapsed: float | None) -> str:
    """Versions, code, dates and time of the runs that are there."""
    if not done:
        return "No run is complete.\n"
    versions = {", ".join(f"{k} {v}" for k, v in cell["versions"].items()) for cell in done}
    dates = sorted({cell["date"] for cell in done})
    wall, cpu = (sum(cell[key] for cell in done) for key in ("wall_s", "cpu_s"))
    lines = [
        f"{len(done)} runs, {wall:,.0f} s of wall time and {cpu:,.0f} s of processor time in all; "
        f"device: {', '.join(_devices(done))}",
        "seconds are those of the runs themselves: without the start of their processes",
        *_beside(done, elapsed),
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}",
        *sorted(versions),
        "code " + ", ".join(sorted({cell["code"][:12] for cell in done})),
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _beside(done: Sequence[Mapping[str, Any]], elapsed: float | None) -> list[str]:
    """How many runs shared the machine, without which wall time says little, and the suite's own
    time; nothing where a run did not record it."""
    jobs = {cell.get("jobs") for cell in done}
    if None in jobs:
        return []
    told = f"{' or '.join(map(str, sorted(jobs)))} at once (--jobs)"
    return [f"{told}; the suite's own time: {elapsed:,.0f} s" if elapsed else told]


def _remarks(table: Mapping[str, Any]) -> list[str]:
    """What there is to say of the published blocks, each under its number."""
    lines = []
    for place, number in _cited(table).items():
        block = table["published"][place]
        told = [f"[{number}] {block['table']}"]
        told += [block["note"]] if block["note"] else []
        told += [f"not compared: {block['differs']}"] if block["differs"] else []
        lines.append("; ".join(told) + ".")
    return lines


def _grid(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    made = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return "\n".join([*made, *("| " + " | ".join(line) + " |" for line in lines), ""])


def write(table: Mapping[str, Any], markdown_file: Path) -> list[Path]:
    """The page, and the JSON that it is made from beside it; gives both."""
    markdown_file.parent.mkdir(parents=True, exist_ok=True)
    data = markdown_file.with_suffix(".json")
    write_atomically(data, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(markdown_file, markdown(table).encode())
    return [markdown_file, data]
