"""Runs that are alike but for their seed: one line each in a report, their mean and its spread."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from fl_report.compare import method_of
from fl_report.series import Axis, positions
from fl_report.settings import PLACE, as_argument, differences

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fl_report.compare import Run

    Row = Mapping[str, Any]

SEED = "run.seed"
ASIDE = (*PLACE, SEED, "run.pictures", "tracking.to")
"""Settings by which runs may differ and still be alike."""


@dataclass(frozen=True)
class Alike:
    """Runs that differ in their seed only; most often one."""

    label: str
    runs: tuple[Run, ...]

    @property
    def counted(self) -> list[Run]:
        """Those that a mean is of: the completed ones, or all if none is."""
        done = [run for run in self.runs if run.summary.get("status") == "completed"]
        return done or list(self.runs)


@dataclass(frozen=True)
class Line:
    """x and y of a curve, and the standard deviation of y over seeds; none of a single run."""

    x: list[float]
    y: list[float]
    spread: list[float] | None = None


def alike(runs: Sequence[Run]) -> list[Alike]:
    """The runs grouped by all settings but the seed, in the order of each group's first.  Runs that
    share the seed too are no sample of anything, and stay apart."""
    found: dict[object, list[Run]] = {}
    for run in runs:
        same = tuple(sorted((k, str(v)) for k, v in run.config.items() if k not in ASIDE))
        found.setdefault(same, []).append(run)
    groups: list[list[Run]] = []
    for group in found.values():
        distinct = len({run.config.get(SEED) for run in group}) == len(group)
        groups += [group] if distinct else [[run] for run in group]
    if len(groups) == len(runs):
        return [Alike(run.label, (run,)) for run in runs]
    return [
        Alike(label, tuple(group)) for label, group in zip(_labels(groups), groups, strict=True)
    ]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The names that a suite gave, without the seed; else the method, with the settings in which
    those of the same method differ."""
    cells = [
        {run.label.removesuffix(f"_seed{run.config.get(SEED)}") for run in group}
        for group in groups
    ]
    called = {name for cell in cells for name in cell}
    if all(len(cell) == 1 for cell in cells) and len(called) == len(groups):
        return [name for cell in cells for name in cell]
    first = [group[0] for group in groups]
    names = [method_of(run.config) or run.label for run in first]
    labels = []
    for i, name in enumerate(names):
        same = [j for j, other in enumerate(names) if other == name]
        own = [
            f"{key}={as_argument(values[i])}"
            for key, values in differences(first).items()
            if key not in ASIDE and any(values[j] != values[i] for j in same)
        ]
        labels.append(" ".join([name, *own]))
    return [
        f"{label}, {run.label}" if labels.count(label) > 1 else label
        for label, run in zip(labels, first, strict=True)
    ]


def repeated(groups: Sequence[Alike]) -> bool:
    """Whether there is any mean to tell."""
    return any(len(group.runs) > 1 for group in groups)


def line(group: Alike, key: str | Callable[[Row], float | None], axis: Axis = "rounds") -> Line:
    """A column, or what `key` makes of a row, averaged over the counted runs at the rounds in which
    all of them have it; x is the mean of their positions."""
    value = key if callable(key) else lambda row: row.get(key)
    columns, places = [], []
    for run in group.counted:
        column = {row["round"]: y for row in run.rows if (y := value(row)) is not None}
        if column:
            columns.append(column)
            places.append(positions(run, axis))
    if not columns:
        return Line([], [])
    rounds = sorted(set.intersection(*(set(column) for column in columns)))
    x = [mean(place[t] for place in places) for t in rounds]
    values = [[column[t] for column in columns] for t in rounds]
    spread = [stdev(v) for v in values] if len(columns) > 1 else None
    return Line(x, [mean(v) for v in values], spread)
