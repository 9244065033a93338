"""What a suite's table may tell of a run, each a number from its results folder.

A name is `accuracy`, or with an argument `accuracy-at:25`.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from fl_report import series

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fl_report.compare import Run

POSTER_GB = 1.024e9
"""Bytes of the FedPart poster's GB: 1,024 times 10^6."""


@dataclass(frozen=True)
class Kind:
    """A number that a table may tell of each run."""

    title: str
    """With {} for the argument."""
    digits: int
    """Behind the point."""
    read: Callable[[Run, float, Mapping[str, Any]], float | None]
    """Run, argument and what the suite measured itself (max_rss_bytes) to the number; None where
    the run has none."""
    argument: type | None = None
    """Its type, if it takes one."""
    of_machine: bool = False
    """Whether it depends on the machine, so that numbers of others do not compare."""


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _column(key: str) -> Callable[..., float | None]:
    return lambda run, _, __: series.last(run, key)


def _accuracy(key: str) -> Callable[..., float | None]:
    return lambda run, _, __: _percent(series.last(run, key))


def _accuracies(run: Run, model: str = "cloud") -> dict[int, float]:
    rounds, accuracies = run.series(model)
    return dict(zip(rounds, accuracies, strict=True))


def _of_last(run: Run, k: float, _: Any) -> float | None:
    last = list(_accuracies(run).values())[-int(k) :]
    return _percent(fmean(last)) if last else None


def _reached(what: str, scale: float) -> Callable[..., float | None]:
    def read(run: Run, target: float, _: Any) -> float | None:
        found = series.reached(run, target)
        return getattr(found, what) / scale if found else None

    return read


def _summed(key: str, scale: float) -> Callable[..., float | None]:
    return lambda run, _, __: run.summary[key] / scale if key in run.summary else None


def _up_until(run: Run, t: float, _: Any) -> float | None:
    """Of parameters alone: the poster does not count BatchNorm's statistics."""
    if len(run.rows) < t or not run.config:
        return None
    from fl_report.cost import plan_of

    if (plan := plan_of(run.config)) is None:
        return None
    buffers = plan.buffers
    sent = (row["bytes_up"] - len(row["replies"]) * buffers for row in run.rows[: int(t)])
    return sum(sent) / POSTER_GB


def _tmacs_until(run: Run, t: float, _: Any) -> float | None:
    samples = run.clients.get("samples")
    if len(run.rows) < t or not samples:
        return None
    from fl_report.cost import published_tmacs

    return published_tmacs(run.config, fmean(samples), int(t))


def _seconds(run: Run, _: float, __: Any) -> float | None:
    """Of rounds that did nothing else: measuring flatness can take longer than the round that it
    ends, and so can evaluating, unless every round is evaluated."""
    rows = [row for row in run.rows if not series.measured(row)]
    alone = [row for row in rows if row.get("accuracy") is None] or rows
    return fmean(row["seconds"] for row in alone) if alone else None


def _client_cpu(run: Run, _: float, __: Any) -> float | None:
    found = [row["client_cpu_s"] for row in run.rows if row.get("client_cpu_s") is not None]
    return median(found) if found else None


def _memory(_: Run, __: float, measured: Mapping[str, Any]) -> float | None:
    peak = measured.get("max_rss_bytes")
    return peak / 1e6 if peak else None


KINDS: dict[str, Kind] = {
    "accuracy": Kind("accuracy [%]", 1, _accuracy("accuracy")),
    "accuracy-best": Kind(
        "best accuracy [%]",
        1,
        lambda run, _, __: _percent(max(_accuracies(run).values(), default=None)),
    ),
    "accuracy-at": Kind(
        "accuracy after round {} [%]",
        1,
        lambda run, t, _: _percent(_accuracies(run).get(int(t))),
        int,
    ),
    "accuracy-mean": Kind("accuracy, mean of the last {} [%]", 1, _of_last, int),
    "accuracy-first-at": Kind(
        "accuracy after round {} with the first client's statistics [%]",
        1,
        lambda run, t, _: _percent(_accuracies(run, "first").get(int(t))),
        int,
    ),
    "accuracy-first": Kind(
        "accuracy with the first client's statistics [%]", 1, _accuracy("accuracy_first")
    ),
    "accuracy-sel": Kind("accuracy of the cohort's mean [%]", 1, _accuracy("accuracy_sel")),
    "accuracy-all": Kind("accuracy of all last models' mean [%]", 1, _accuracy("accuracy_all")),
    "loss": Kind("test loss", 3, lambda run, _, __: series.final_loss(run)),
    "lambda-max": Kind("lambda_max", 2, _column("lambda_max")),
    "trace": Kind("trace", 0, _column("trace")),
    "h-n": Kind("H_N", 1, _column("h_n")),
    "h-d": Kind("H_D", 2, _column("h_d")),
    "rounds-to": Kind("rounds to accuracy {}", 1, _reached("round", 1), float),
    "mb-to": Kind("MB to accuracy {}, up and down", 1, _reached("bytes", 1e6), float),
    "mb-up": Kind("MB up", 1, _summed("bytes_up", 1e6)),
    "mb-down": Kind("MB down", 1, _summed("bytes_down", 1e6)),
    "poster-gb-up": Kind("up until round {}, the poster's GB", 2, _up_until, int),
    "poster-tmacs": Kind(
        "computation of a client until round {}, the poster's TMACs", 2, _tmacs_until, int
    ),
    "seconds": Kind("wall time [s]", 1, _summed("wall_s", 1), of_machine=True),
    "cpu-seconds": Kind("processor time [s]", 1, _summed("cpu_s", 1), of_machine=True),
    "seconds-per-round": Kind("wall time per round [s], mean", 2, _seconds, of_machine=True),
    "client-cpu-per-round": Kind(
        "clients' processor time per round [s], median",
        2,
        _client_cpu,
        of_machine=True,
    ),
    "memory-mb": Kind("peak memory [MB]", 0, _memory, of_machine=True),
}


@dataclass(frozen=True)
class Metric:
    """A kind with its argument."""

    name: str
    kind: Kind
    argument: float = 0

    @classmethod
    def of(cls, name: str) -> Metric:
        """Raises ValueError with one line."""
        stem, colon, text = name.partition(":")
        kind = KINDS.get(stem)
        if kind is None:
            near = get_close_matches(stem, KINDS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{name} is unknown; {hint}known: {', '.join(KINDS)}")
        if kind.argument is None:
            if colon:
                raise ValueError(f"{name}: {stem} has no argument; leave out :{text}")
            return cls(name, kind)
        try:
            argument = kind.argument(text)
        except ValueError:
            argument = 0
        if not 0 < argument <= (1 if kind.argument is float else 10**9):
            example = "a target in (0, 1], as in" if kind.argument is float else "a count, as in"
            number = "0.5" if kind.argument is float else "25"
            raise ValueError(f"{name}: needs {example} {stem}:{number}")
        return cls(name, kind, argument)

    @property
    def title(self) -> str:
        return self.kind.title.format(f"{self.argument:g}")

    @property
    def may_fail(self) -> bool:
        """Whether a run without the number has not got there, rather than not measured it."""
        return self.kind.argument is float

    def value(self, run: Run, measured: Mapping[str, Any]) -> float | None:
        """The run's number; None where it has none."""
        found = self.kind.read(run, self.argument, measured)
        return None if found is None else float(found)
