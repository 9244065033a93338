"""The page of all published results, and of those that are open: docs/results/README.md is its
output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_common.config import resolve
from fl_common.data.catalogue import SOURCES
from fl_report.suite import Reduced, cells_of, parse, placeholder
from fl_report.suite_table import NONE, rows

if TYPE_CHECKING:
    from collections.abc import Mapping

HEAD = """\
# Results

`python -m fl_report.suite_index > docs/results/README.md` makes this page from the JSON files
beside it and the suites in `experiments/`. A page has its suite's table, with published numbers
where there are any, the command, versions, seconds and every run. *Reduced* pages are of settings
that fit a CPU: they show whether a method works and are not compared with published numbers.
[What they say about the papers](../suites.md#what-was-found).
"""
OPEN = f"""\
## Open

At full size these suites need a GPU, and some of them data that must be downloaded elsewhere
(`{placeholder("cifar10")}` stands for a folder with it: [data](../data.md)). `--cells PATTERN`
runs some of the cells, what is interrupted goes on, and `flatfed suite FILE --publish docs/results`
makes the page of what is there.
"""


def page(results: Path, suites: Path) -> str:
    tables = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    lines = ["| page | size | runs | ours less published | device | date |", "|---" * 6 + "|"]
    lines += [_line(table) for table in sorted(tables, key=lambda t: (t["reduced"], t["name"]))]
    done = {
        table["name"]: len(_completed(table))
        for table in tables
        if not (table["reduced"] or table["overrides"])
    }
    left = ["| suite | runs left | command |", "|---" * 3 + "|"]
    for path in sorted(suites.glob("*.toml")):
        if "[methods" in path.read_text():
            left += _open(path, done.get(path.stem, 0))
    return "\n".join([HEAD, *lines, "", OPEN, *left, ""])


def _completed(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in table["cells"] if cell["status"] == "completed"]


def _line(table: Mapping[str, Any]) -> str:
    done, whole = _completed(table), len(table["cells"])
    dates = sorted({cell["date"] for cell in done})
    size = "reduced" if table["reduced"] else "full"
    told = [
        f"[{table['title']}]({table['name']}.md)",
        f"{size}, other settings" if table["overrides"] else size,
        f"{len(done)}" if len(done) == whole else f"{len(done)} of {whole}",
        "; ".join(_compared(table)) or NONE,
        ", ".join(sorted({cell["device"] for cell in done})) or NONE,
        " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else NONE,
    ]
    return "| " + " | ".join(told) + " |"


def _compared(table: Mapping[str, Any]) -> list[str]:
    """The range of the differences, by metric."""
    found: dict[str, list[str]] = {}
    for row in rows(table):
        if row.difference != NONE:
            found.setdefault(row.metric, []).append(row.difference)
    return [
        f"{metric}: {min(told, key=float)} to {max(told, key=float)} ({len(told)} numbers)"
        for metric, told in found.items()
    ]


def _open(path: Path, done: int) -> list[str]:
    """The line of a suite at full size, of which `done` runs are there; none if all are."""
    suite = parse(path)
    cells = cells_of(path, suite, Reduced(), {})
    if done >= len(cells):
        return []
    default = resolve({}).data.source
    source = str(cells[0].values.get("data.source", default))
    command = f"flatfed suite experiments/{path.name} --device cuda engine.cohort=auto"
    if SOURCES[source].path != "none":
        command += f" data.path={placeholder(source)}"
    return [f"| {suite.title} | {len(cells) - done} | `{command}` |"]


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    print(page(root / "docs" / "results", root / "experiments"), end="")
