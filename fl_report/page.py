"""The report of one run or of many: an HTML page that needs nothing but itself, and its pictures.

Every number on it is from the results folders; what a run did not record has no section.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_common.files import write_atomically
from fl_report import compare, figures, headlines, markup, participants, series, sharpness, terminal
from fl_report.settings import different_data

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

    from fl_report.compare import Run
    from fl_report.markup import Markup


def write(
    folders: Sequence[Path],
    out: Path,
    target: float | None = None,
    *,
    anyway: bool = False,
    title: str = "",
    opening: Markup | None = None,
) -> Path:
    """Writes the page `out` (*.html), and its pictures into a folder of the same stem; gives `out`.

    target: the accuracy (0 to 1) to tell rounds, bytes and seconds for; None: 0.9 times the best
    accuracy of all runs.  anyway: put runs of different data on one page too.  title: the page's;
    empty: from the runs.  opening: what stands below it.

    Raises ValueError with one line for a folder without a run, runs of different data, or a wrong
    argument; OSError where it cannot write.
    """
    if out.suffix != ".html":
        raise ValueError(f"{out}: the report is one HTML page; give a name that ends in .html")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("one results folder is given twice; give each once")
    beside = out.with_suffix("")
    if any(beside.resolve() in (folder.resolve(), folder.resolve().parent) for folder in folders):
        raise ValueError(f"{out}: its pictures would lie among the results in {beside}; give "
                         "another name")  # fmt: skip
    _check(target)
    runs = compare.read(folders)
    if not anyway and (problem := different_data(runs)):
        raise ValueError(problem)
    pictures = markup.Pictures(beside)
    title = title or _title(runs)
    parts = [
        headlines.heading(title, runs),
        opening,
        headlines.numbers(runs[0]) if len(runs) == 1 else headlines.side_by_side(runs),
        figures.curves(runs, pictures),
        headlines.target(runs, _target(runs, target), given=target is not None),
        participants.labels(runs, pictures),
        participants.clients(runs, pictures),
        participants.drift(runs, pictures),
        participants.participation(runs, pictures),
        sharpness.gradients(runs, pictures),
        sharpness.flatness(runs, pictures),
        headlines.settings(runs),
        headlines.commands(runs),
    ]
    body = markup.joined(part for part in parts if part)
    write_atomically(out, markup.page(title, body).encode())
    return out


def summary_table(runs: Sequence[Run], target: float | None = None) -> Table:
    """For the terminal, a run in lines or several side by side.  Raises ValueError for a target
    beyond 0 to 1."""
    _check(target)
    aim = _target(runs, target)
    return terminal.one_run(runs[0], aim) if len(runs) == 1 else terminal.several_runs(runs, aim)


def _check(target: float | None) -> None:
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"target = {target}: an accuracy is above 0 and at most 1, as in 0.9")


def _target(runs: Sequence[Run], target: float | None) -> float | None:
    return series.default_target(runs) if target is None else target


def _title(runs: Sequence[Run]) -> str:
    sources = dict.fromkeys(run.config.get("data.source") for run in runs)
    data = " and ".join(str(source) for source in sources if source)
    what = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    return f"{what} on {data}" if data else what
