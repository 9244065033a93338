"""The table of a suite, for the terminal and as a page: functions of its JSON alone."""

from __future__ import annotations

import json
from collections import Counter
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fl_common.files import write_atomically
from fl_report import markup
from fl_report.markup import element, joined
from fl_report.suite_metrics import Metric
from fl_report.suite_table import NONE, Row, pairs, rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.console import Group
    from rich.table import Table

    from fl_report.markup import Markup
    from fl_report.plots import Lines

MEAN = "Mean ± standard deviation over the seeds."
PAIRED = (
    "Each run less that of the other method with the same seed: mean ± standard deviation of the "
    "differences; of times and memory, the ratios (x)."
)
WIDE = 12
"""Columns of a page's table; with more, each number has a line of its own."""


def _ours(table: Mapping[str, Any]) -> str:
    if table["reduced"]:
        return "ours, reduced"
    return "ours, other settings" if table["overrides"] else "ours"


def _main(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the page's table."""
    grid = _grid(table)
    return grid if len(grid[0]) <= WIDE else _long(table)


def _grid(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A line for each method in each setting."""
    numbers, by_metric, found = _cited(table), _titles(table), rows(table)
    cells: dict[tuple[str, str], list[str]] = {}
    for cell in table["cells"]:
        cells.setdefault((cell["setting"], cell["method"]), []).append(cell["status"])
    by_place = {(row.setting, row.method, row.metric): row for row in found}
    cited = {row.metric for row in found if row.block is not None}
    compared = {row.metric for row in found if row.difference != NONE}
    by_setting = any(setting for setting, _ in cells)
    head = [*(["setting"] if by_setting else []), "method", "runs"]
    for metric in by_metric:
        head += [f"{metric}, published", _ours(table)] if metric in cited else [metric]
        head += ["difference"] if metric in compared else []
    lines = []
    for (setting, method), statuses in cells.items():
        line = [*([setting] if by_setting else []), method]
        line.append(_of(statuses.count("completed"), len(statuses)))
        for metric in by_metric:
            row = by_place.get((setting, method, metric))
            if metric in cited:
                line.append(_printed(row, numbers) if row else NONE)
            line.append(row.ours if row else NONE)
            if metric in compared:
                line.append(row.difference if row else NONE)
        lines.append(line)
    return head, lines


def _long(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A line for each number."""
    numbers, found = _cited(table), rows(table)
    columns = {
        **({"setting": [r.setting for r in found]} if any(r.setting for r in found) else {}),
        "method": [row.method for row in found],
        "metric": [row.metric for row in found],
        "runs": [_of(row.runs, row.runs + row.missing) for row in found],
    }
    if table["published"]:
        columns["published"] = [_printed(row, numbers) for row in found]
    columns[_ours(table)] = [row.ours for row in found]
    if any(row.difference != NONE for row in found):
        columns["difference"] = [row.difference for row in found]
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def _of(some: int, whole: int) -> str:
    return f"{some}" if some == whole else f"{some} of {whole}"


def _printed(row: Row, numbers: Mapping[int, int]) -> str:
    return row.published + ("" if row.block is None else f" [{numbers[row.block]}]")


def _paired(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the differences from base methods; no lines where there are none."""
    found = pairs(table)
    by_setting = any(pair.setting for pair in found)
    titles = [t for t in _titles(table) if any(p.differences.get(t, NONE) != NONE for p in found)]
    head = [*(["setting"] if by_setting else []), "method", "less", "seeds", *titles]
    if len(head) > WIDE:
        return _long_pairs(table)
    lines = [
        [*([p.setting] if by_setting else []), p.method, p.base, str(p.seeds)]
        + [p.differences[title] for title in titles]
        for p in found
    ]
    return head, lines


def _long_pairs(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A line for each difference."""
    found = pairs(table)
    by_setting = any(pair.setting for pair in found)
    lines = [
        [*([p.setting] if by_setting else []), p.method, p.base, str(p.seeds), metric, told]
        for p in found
        for metric, told in p.differences.items()
        if told != NONE
    ]
    head = ["method", "less", "seeds", "metric", "difference"]
    return [*(["setting"] if by_setting else []), *head], lines


def _cited(table: Mapping[str, Any]) -> dict[int, int]:
    """The published blocks that a line is from, each with the number of its remark."""
    places = sorted({row.block for row in rows(table) if row.block is not None})
    return {place: number for number, place in enumerate(places, 1)}


def terminal(table: Mapping[str, Any]) -> Group:
    """For the terminal (rich), which may be narrow: a line for each number."""
    from rich.console import Group

    caption = " ".join([MEAN, *_conditions(table)])
    made = [_rich(table["title"], caption, *_long(table))]
    if pairs(table):
        made.append(_rich("", PAIRED, *_long_pairs(table)))
    return Group(*made)


def _rich(title: str, caption: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text  # or it would take "[s]" for markup

    made = Table(box=SIMPLE, pad_edge=False, title=Text(title), caption=Text(caption))
    for heading in head:
        words = heading in ("setting", "method", "metric", "less")
        made.add_column(heading, justify="left" if words else "right")
    for line in lines:
        made.add_row(*map(Text, line))
    return made


def opening(table: Mapping[str, Any]) -> Markup:
    """What stands on top of the report of its runs: how they were made, and the table."""
    told = [element("p", element("strong", line)) for line in _conditions(table)]
    told += [element("p", MEAN), markup.table(*_main(table))]
    told += [element("p", line, class_="soft") for line in _remarks(table)]
    head, lines = _paired(table)
    told += [element("p", PAIRED), markup.table(head, lines)] if lines else []
    return joined(told)


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
    parts.append(_markdown(*_main(table)))
    parts += [f"{line}\n" for line in _remarks(table)]
    head, lines = _paired(table)
    parts += [f"{PAIRED}\n", _markdown(head, lines)] if lines else []
    if panels(table):
        parts.append(f"![Accuracy over rounds, the mean over the seeds]({table['name']}.png)\n")
    done = [cell for cell in table["cells"] if cell["status"] == "completed"]
    commands = dict.fromkeys(cell.get("command", table["command"]) for cell in done)
    told = "\n".join(commands or [table["command"]])
    parts.append(f"\n## How it was made\n\n```\n{told}\n```\n")
    parts.append(_made(done, table.get("elapsed_s")))
    parts.append("\n## Every run\n")
    apart = ["device"] if len(_devices(done)) > 1 else []
    parts.append(_markdown(["run", *_titles(table), "rounds", "wall s", "CPU s", *apart, "model"],
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


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    made = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return "\n".join([*made, *("| " + " | ".join(line) + " |" for line in lines), ""])


def panels(table: Mapping[str, Any]) -> dict[tuple[str, str], Lines]:
    """The page's picture: accuracies over rounds, a panel per setting, or over MB too if methods
    differ in what they send; in it a line per method, the mean over its runs.  Empty where a run
    has less than two points, or is from before they were stored."""
    found: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for cell in table["cells"]:
        if cell["status"] == "completed":
            if len(cell.get("curve", {}).get("rounds", ())) < 2:
                return {}
            by_method = found.setdefault((cell["setting"], "round"), {})
            by_method.setdefault(cell["method"], []).append(cell["curve"])
    if len(found) == 1:
        [by_method] = found.values()
        per_round = [c["mb"][-1] / c["rounds"][-1] for its in by_method.values() for c in its]
        if max(per_round) > 1.01 * min(per_round):
            found["", "MB sent, up and down"] = by_method
    methods = dict.fromkeys(method for by_method in found.values() for method in by_method)
    return {
        (setting, over): {method: _mean(by_method.get(method, ()), over) for method in methods}
        for (setting, over), by_method in found.items()
    }


def _mean(
    curves: Sequence[Mapping[str, list[float]]], over: str
) -> tuple[list[float], list[float]]:
    """x and y at the rounds that all of them have."""
    whole = set.intersection(*(set(curve["rounds"]) for curve in curves)) if curves else set()
    points = [
        [point for point in zip(*(curve[k] for k in ("rounds", "mb", "accuracy")), strict=True)
         if point[0] in whole] for curve in curves
    ]  # fmt: skip
    means = [tuple(map(fmean, zip(*at, strict=True))) for at in zip(*points, strict=True)]
    return [at[0 if over == "round" else 1] for at in means], [at[2] for at in means]


def write(table: Mapping[str, Any], markdown_file: Path) -> list[Path]:
    """The page, the JSON that it is made from and its picture beside it; gives their paths."""
    markdown_file.parent.mkdir(parents=True, exist_ok=True)
    data = markdown_file.with_suffix(".json")
    write_atomically(data, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(markdown_file, markdown(table).encode())
    picture = markdown_file.with_name(f"{table['name']}.png")
    if not (drawn := panels(table)):
        picture.unlink(missing_ok=True)  # of other runs
        return [markdown_file, data]
    from fl_report import plots

    plots.comparison(drawn, picture)
    return [markdown_file, data, picture]
