"""The page of all published results, and of those that are open: docs/results/README.md is its
output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_common.data.catalogue import SOURCES
from fl_report.suite import Reduced, cells_of, parse
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
OPEN = """\
## Open

At full size these suites need a GPU, and some of them data that must be downloaded elsewhere. The
commands are ready; `--cells '*_seed0'` begins with one seed, what is interrupted goes on, and
`--publish docs/results` adds the page.
"""


def page(results: Path, suites: Path) -> str:
    tables = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    lines = ["| page | size | runs | ours less published | device | date |", "|---" * 6 + "|"]
    lines += [_line(table) for table in sorted(tables, key=lambda t: (t["reduced"], t["name"]))]
    whole = {table["name"] for table in tables if not table["reduced"]}
    left = ["| suite | runs | command |", "|---" * 3 + "|"]
    for path in sorted(suites.glob("*.toml")):
        if path.stem not in whole and "[methods" in path.read_text():
            left.append(_open(path))
    return "\n".join([HEAD, *lines, "", OPEN, *left, ""])


def _line(table: Mapping[str, Any]) -> str:
    done = [cell for cell in table["cells"] if cell["status"] == "completed"]
    counted = f"{len(done)}" + f" of {len(table['cells'])}" * (len(done) < len(table["cells"]))
    dates = sorted({cell["date"] for cell in done})
    told = [
        f"[{table['title']}]({table['name']}.md)",
        "reduced" if table["reduced"] else "full",
        counted,
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


def _open(path: Path) -> str:
    suite = parse(path)
    cells = cells_of(path, suite, Reduced(), {})
    source = str(cells[0].values["data.source"])
    command = f"flatfed suite experiments/{path.name} --device cuda engine.cohort=auto"
    if SOURCES[source].path != "none":
        command += f" data.path={source.replace('-', '_').upper()}_DIR"
    return f"| {suite.title} | {len(cells)} | `{command}` |"


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    print(page(root / "docs" / "results", root / "experiments"), end="")
