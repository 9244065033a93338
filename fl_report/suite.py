"""Suites: a paper's table as data.  One TOML file holds a base configuration, a matrix of methods,
settings and seeds, the metrics, and the published numbers; docs/suites.md describes the format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from fl_common.config import ConfigError, Scalar, flatten, resolve
from fl_common.files import read_toml
from fl_report.suite_metrics import Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

T = TypeVar("T")
OWN = ("run.seed", "run.name", "run.output-dir", "run.resume")
"""Settings that a suite sets itself, cell by cell."""
NUMBER = re.compile(r"\s*(-?\d*\.?\d+)\s*(?:±\s*(\d*\.?\d+))?\s*")
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
"""The name of a method or setting: it becomes part of a folder's name."""

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


def _once(values: list[T]) -> list[T]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is given twice; give each once")
    return values


Seeds = Annotated[list[Seed], AfterValidator(_once)]
Names = Annotated[list[Name], AfterValidator(_once)]
Metrics = Annotated[list[str], AfterValidator(_once)]


class SuiteError(ValueError):
    """Every mistake of a suite's file; one line each: file, key, what is wrong, the remedy."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(errors))


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Published(_Part):
    """Numbers of a paper's table, as printed."""

    table: str = Field(min_length=1)
    metric: str
    settings: list[Name] = []
    """The columns of `values`; empty for a suite without settings."""
    values: dict[Name, list[float | int | str]]
    """By method, one per column: 52.9, "57.7 ± .5", or "" where there is none."""
    differs: str = ""
    """Why ours cannot be compared with them, if so; then no difference is given."""
    note: str = ""

    @field_validator("values")
    @classmethod
    def _printed(cls, values: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for value in (v for row in values.values() for v in row):
            if isinstance(value, str) and value and not NUMBER.fullmatch(value):
                raise ValueError(f'"{value}" is not a number; write 52.9, "57.7 ± .5", or ""')
        return values


class Reduced(_Part):
    """What makes it fit a CPU: fewer seeds, methods and settings, other metrics, and settings
    over those of all cells."""

    about: str = ""
    seeds: Seeds = []
    methods: Names = []
    settings: Names = []
    metrics: Metrics = []
    base: dict[str, Any] = {}


class Suite(_Part):
    title: str = Field(min_length=1)
    source: str = ""
    """The paper."""
    about: str = ""
    config: str = ""
    """A file of settings beside this one, under `base`."""
    seeds: Seeds = Field(min_length=1)
    metrics: Metrics = Field(min_length=1)
    base: dict[str, Any] = {}
    methods: dict[Name, dict[str, Any]] = Field(min_length=1)
    settings: dict[Name, dict[str, Any]] = {}
    only: dict[Name, Names] = {}
    """Methods that run in some of the settings alone."""
    against: dict[Name, Name] = {}
    """The method of which each is a variant: the table has their differences, seed by seed."""
    cells: dict[str, dict[str, Any]] = {}
    """Settings of single pairs, SETTING_METHOD."""
    reduced: Reduced | None = None
    published: list[Published] = []


@dataclass(frozen=True)
class Cell:
    """One run of a suite."""

    method: str
    setting: str
    """Empty in a suite without settings."""
    seed: int
    values: dict[str, Scalar]
    """Its settings, those of place excepted."""

    @property
    def name(self) -> str:
        """Of its results folder; no method's or setting's name has an underscore."""
        return "_".join(filter(None, (self.setting, self.method, f"seed{self.seed}")))


@dataclass(frozen=True)
class Plan:
    """What is to run, and what to tell of it."""

    name: str
    suite: Suite
    metrics: list[Metric]
    cells: list[Cell]
    reduced: bool = False
    overrides: dict[str, Scalar] = field(default_factory=dict)
    """Settings of the command line, part of every cell."""

    @property
    def folder_name(self) -> str:
        return f"{self.name}-reduced" if self.reduced else self.name


def placeholder(source: str) -> str:
    """What stands for the folder of a data source in a command that is shown."""
    return f"{source.replace('-', '_').upper()}_DIR"


def load(
    path: Path, *, reduced: bool = False, overrides: Mapping[str, Scalar] | None = None
) -> Plan:
    """The cells of a suite's file, every configuration checked.  Raises SuiteError with every
    mistake."""
    suite = parse(path)
    cut = suite.reduced or Reduced()
    errors = _names(suite, cut)
    if reduced and suite.reduced is None:
        errors.append("[reduced]: there is none; leave out --reduced")
    chosen = (cut.metrics if reduced else []) or suite.metrics
    known = _metrics([*suite.metrics, *cut.metrics, *(p.metric for p in suite.published)], errors)
    if errors:
        raise SuiteError([f"{path}: {error}" for error in errors])
    over = dict(overrides or {})
    cells = cells_of(path, suite, cut if reduced else Reduced(), over)
    if not cells:
        raise SuiteError([f"{path}: [reduced] and [only] leave no run"])
    _check(path, cells)
    _check_data(path, cells)
    cells = [replace(cell, values=cell.values | {"run.seed": cell.seed}) for cell in cells]
    return Plan(path.stem, suite, [known[name] for name in chosen], cells, reduced, over)


def parse(path: Path) -> Suite:
    table = _toml(path)
    if "methods" not in table and not {"title", "metrics", "seeds"} & table.keys():
        raise SuiteError(
            [f"{path}: no suite (it has no [methods]); run a plain configuration with "
             f"flatfed run --config {path}"]
        )  # fmt: skip
    try:
        return Suite.model_validate(table)
    except ValidationError as invalid:
        raise SuiteError([f"{path}: {_explain(error)}" for error in invalid.errors()]) from None


def _toml(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except OSError as error:
        raise SuiteError([f"{path}: {error.strerror}"]) from None
    except ValueError as error:
        raise SuiteError([f"{path}: not a TOML file: {error}"]) from None


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "missing":
        return f"{key}: is missing; docs/suites.md tells what it holds"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; docs/suites.md lists those of a suite"
    if error["type"] == "string_pattern_mismatch":
        return f"{key}: a name has small letters, digits, dots and dashes only"
    return f"{key}: {error['msg'].removeprefix('Value error, ')}"


def _names(suite: Suite, cut: Reduced) -> list[str]:
    """Methods and settings that are named but not there, and rows of the wrong length."""
    errors = []

    def known(where: str, names: Iterable[str], there: Mapping[str, Any], kind: str) -> None:
        errors.extend(
            f"{where}: no {kind} {name}; this suite has {', '.join(there) or 'none'}"
            for name in names
            if name not in there
        )

    known("reduced.methods", cut.methods, suite.methods, "method")
    known("reduced.settings", cut.settings, suite.settings, "setting")
    known("only", suite.only, suite.methods, "method")
    known("against", [*suite.against, *suite.against.values()], suite.methods, "method")
    errors += [f"against: {m} is its own base" for m, base in suite.against.items() if m == base]
    for method, names in suite.only.items():
        known(f"only.{method}", names, suite.settings, "setting")
    pairs = {f"{setting}_{method}" for setting in suite.settings for method in suite.methods}
    errors += [
        f"cells: no {name}; write SETTING_METHOD of settings and methods that are there"
        for name in suite.cells
        if name not in pairs
    ]
    for block in suite.published:
        where = f"published, {block.table}"
        known(where, block.settings, suite.settings, "setting")
        known(where, block.values, suite.methods, "method")
        width = len(block.settings) or 1
        errors.extend(
            f'{where}: {method} has {len(row)} values for {width} settings; write "" for none'
            for method, row in block.values.items()
            if len(row) != width
        )
        if suite.settings and not block.settings:
            errors.append(f"{where}: settings is missing; name its columns")
    return errors + _never_shown(suite)


def _never_shown(suite: Suite) -> list[str]:
    """Published numbers that no line of the table would have, a line each."""
    errors, first = [], {}  # the table of each that was seen
    for block in suite.published:
        where = f"published, {block.table}"
        if block.metric not in suite.metrics:
            errors.append(f"{where}: {block.metric} is not among metrics; add it there")
        for method, row in block.values.items():
            for setting, value in zip(block.settings or [""], row, strict=False):
                if value == "":
                    continue
                its = f"{where}: {method}" + (f" in {setting}" if setting else "")
                if setting not in suite.only.get(method, [setting]):
                    errors.append(f'{its} does not run, as [only] says; write ""')
                place = block.metric, method, setting
                if place in first:
                    errors.append(f'{its} has its {block.metric} in {first[place]}; write "" there')
                first[place] = block.table
    return errors


def _metrics(names: Iterable[str], errors: list[str]) -> dict[str, Metric]:
    found = {}
    for name in dict.fromkeys(names):
        try:
            found[name] = Metric.of(name)
        except ValueError as error:
            errors.append(f"metrics: {error}")
    return found


def cells_of(path: Path, suite: Suite, cut: Reduced, over: Mapping[str, Scalar]) -> list[Cell]:
    """The cells with all their settings but the seed."""
    base = {**_under(path, suite), **flatten(suite.base)}
    columns = [s for s in suite.settings or [""] if not cut.settings or s in cut.settings]
    rows = [m for m in suite.methods if not cut.methods or m in cut.methods]
    return [
        Cell(
            method,
            setting,
            seed,
            {
                **base,
                **flatten(suite.settings.get(setting, {})),
                **flatten(suite.methods[method]),
                **flatten(suite.cells.get(f"{setting}_{method}", {})),
                **flatten(cut.base),
                **over,
            },
        )
        for seed in cut.seeds or suite.seeds
        for setting in columns
        for method in rows
        if not setting or setting in suite.only.get(method, [setting])
    ]


def _under(path: Path, suite: Suite) -> dict[str, Scalar]:
    """The settings of the file beside this one."""
    try:
        return flatten(_toml(path.parent / suite.config)) if suite.config else {}
    except SuiteError as error:
        raise SuiteError([f"{path}: config: {line}" for line in error.errors]) from None


def _check(path: Path, cells: Sequence[Cell]) -> None:
    """Every mistake of every configuration, each told once, with the first cell that has it."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell.seed != cells[0].seed:
            continue  # its configuration is that of a cell before it
        errors = [f"{key}: a suite sets it itself; leave it out" for key in OWN if key in
                  cell.values]  # fmt: skip
        try:
            resolve(cell.values, absolute_paths=False, also=errors)
        except ConfigError as error:
            for line in error.errors:
                found.setdefault(line, []).append(cell.name)
    if found:
        raise SuiteError(
            [
                f"{path}: {names[0]}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                + f": {line}"
                for line, names in found.items()
            ]
        )


def _check_data(path: Path, cells: Sequence[Cell]) -> None:
    """The lines of one setting stand below each other, so that they must be of the same data."""
    defaults, first = resolve({}).flat(), {}
    for cell in cells:
        before = first.setdefault(cell.setting, cell)
        for key in ("data.source", "data.path"):
            here, there = (c.values.get(key, defaults[key]) for c in (cell, before))
            if here != there:
                raise SuiteError(
                    [f'{path}: {cell.name}: {key} = "{here}" here and "{there}" in {before.name}; '
                     "the methods of a setting need the same data: make them [settings]"]
                )  # fmt: skip
