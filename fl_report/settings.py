"""The settings behind runs: what differs from the defaults, what differs between runs, and the
command that repeats one."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_common.config import Scalar
    from fl_report.compare import Run

PLACE = ("run.name", "run.output-dir", "run.resume")
"""Where results went: no part of what was run, and a folder that exists is not written again."""
DATA = ("data.source", "data.partition", "eval.on")
"""Settings that runs must share for their accuracies to be of the same data."""

READING = ("run.seed", "data.image-size")
"""Settings that change how a data set is read: a seed may draw what is held out."""


def as_argument(value: Scalar) -> str:
    """A value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def arguments(values: Mapping[str, Scalar]) -> list[str]:
    """Settings as words of a command line."""
    return [f"{key}={as_argument(value)}" for key, value in values.items()]


def meanings() -> dict[str, str]:
    """Every key's help text."""
    from fl_common.config import fields, meaning

    return {key: meaning(field) for key, field in fields()}


def changed(config: Mapping[str, Scalar]) -> dict[str, tuple[Scalar, Scalar | None]]:
    """Settings that are not this version's defaults, with the default; None where this version
    has no such key."""
    from fl_common.config import resolve

    known = resolve({}).flat()
    return {
        key: (value, known.get(key))
        for key, value in config.items()
        if key not in PLACE and (key not in known or _differ(known[key], value))
    }


def _differ(one: Scalar, other: Scalar) -> bool:
    """Whether values differ in more than type: versions may store a number or its text."""
    return one != other and as_argument(one) != as_argument(other)


def command(config: Mapping[str, Scalar]) -> str:
    """One line for a shell, with results in a new folder."""
    words = arguments({key: value for key, (value, _) in changed(config).items()})
    return shlex.join(["flatfed", "run", *words])


def differences(runs: Sequence[Run]) -> dict[str, list[Scalar | None]]:
    """Settings that are not the same in all runs: a value per run, None where it has none."""
    known = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in known for key in run.config if key not in PLACE)
    return {
        key: [run.config.get(key) for run in runs]
        for key in keys
        if len({run.config.get(key) for run in known}) > 1
    }


def different_data(runs: Sequence[Run]) -> str | None:
    """Why these runs cannot be compared, as one line with the remedy; None if they can."""
    first: dict[str, tuple[Any, str]] = {}
    for run in runs:
        for what, value in _data(run).items():
            before, label = first.setdefault(what, (value, run.label))
            if value != before:
                return _told(what, (before, label), (value, run.label))
        if differ := _other_samples(runs[0], run):
            what, before, value = differ
            return _told(what, (before, runs[0].label), (value, run.label))
    return None


def _told(what: str, one: tuple[Any, str], other: tuple[Any, str]) -> str:
    places = " and ".join(f"{value} in {label}" for value, label in (one, other))
    return f"runs of different data: {what} is {places}; give runs of the same data, or --anyway"


def _other_samples(one: Run, other: Run) -> tuple[str, Any, Any] | None:
    """What tells that two runs of one source read other samples, with their values.  Equal digests
    are equal samples, wherever they lay; the same folder gives others with other `READING`."""
    digests = [run.summary.get("data_sha256") for run in (one, other)]
    if all(digests):
        if digests[0] == digests[1]:
            return None
        if all(one.config.get(key) == other.config.get(key) for key in READING):
            return "the digest of the samples", digests[0][:12], digests[1][:12]
    paths = [run.config.get("data.path") for run in (one, other)]
    known = one.config and other.config
    if known and _path_decides(one.config) and paths[0] != paths[1]:
        return "data.path", paths[0], paths[1]
    return None


def _path_decides(config: Mapping[str, Scalar]) -> bool:
    """Whether data.path says which data set it is, rather than where a known one lies."""
    from fl_common.data.catalogue import SOURCES

    source = SOURCES.get(str(config.get("data.source")))
    return source is None or source.shape is None


def _data(run: Run) -> dict[str, Any]:
    """What tells data sets apart."""
    keys = (*DATA, *(["eval.holdout"] if run.config.get("eval.on") != "server" else []))
    found = {key: run.config[key] for key in keys if key in run.config}
    if run.clients:
        found["the list of classes"] = ", ".join(map(str, run.clients["classes"]))
        if run.config.get("eval.on") == "server":  # else some of each client's are held out
            found["the number of training samples"] = sum(run.clients["samples"])
    return found
