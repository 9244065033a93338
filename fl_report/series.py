"""What the rows of a history say: curves over rounds, bytes and seconds, when a target was
reached, who took part, what was refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fl_common.results import FLATNESS
from fl_report.compare import parsed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_report.compare import Run

Axis = Literal["rounds", "bytes", "seconds"]
AXES: tuple[Axis, ...] = ("rounds", "bytes", "seconds")
SHARE_OF_BEST = 0.9
"""The target if none is given, as a share of the best accuracy of all runs."""
FAILURES = {
    "failed": "no answer",
    "rejected": "rejected",
    "evaluation_failed": "evaluation",
    "flatness_failed": "flatness",
}
"""Columns of a history that name clients and reasons, and what they tell."""
OF_CLIENTS = {
    "client_accuracy_mean": "mean over clients",
    "client_accuracy_worst_decile": "worst tenth of clients",
}
"""Columns of a history that were made from all clients' accuracies."""
OF_UPDATES = {
    "update_norm": "mean length of an update",
    "update_norm_max": "longest update",
    "update_alignment": "alignment of updates",
}
"""Columns of a history that tell how far a round's clients moved, and whether alike."""
OF_FLATNESS = ("lambda_max", "trace", "h_n", "h_d", "flatness_error")
"""Columns that a row has, one or more of them, where flatness was measured in its round."""
NOT_DRAWN, ANSWERED, FAILED, REJECTED = range(4)


def positions(run: Run, axis: Axis) -> dict[int, float]:
    """Where each round ends: its number, or the bytes (up and down) or seconds until then."""
    total, found = 0.0, {}
    for row in run.rows:
        if axis == "bytes":
            total += row.get("bytes_up", 0) + row.get("bytes_down", 0)
        elif axis == "seconds":
            total += row.get("seconds") or 0.0
        else:
            total = row["round"]
        found[row["round"]] = total
    return found


def curve(run: Run, key: str, axis: Axis = "rounds") -> tuple[list[float], list[float]]:
    """x and y of a column, at the rounds that have it."""
    places = positions(run, axis)
    rows = [row for row in run.rows if row.get(key) is not None]
    return [places[row["round"]] for row in rows], [row[key] for row in rows]


def last(run: Run, key: str) -> Any:
    """The value of a column in the last round that has it; None if none has."""
    return next((row[key] for row in reversed(run.rows) if row.get(key) is not None), None)


def evaluated(run: Run) -> list[dict[str, Any]]:
    """The rows of rounds that were evaluated."""
    return [row for row in run.rows if row.get("accuracy") is not None]


def final_loss(run: Run) -> float | None:
    """The loss of the last evaluation; None without one, and where it was not finite."""
    return next((row.get("loss") for row in reversed(evaluated(run))), None)


def sized(count: float) -> str:
    """Bytes, as three digits and a unit of powers of ten."""
    scaled = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if scaled < 999.5 or unit == "GB":
            break
        scaled /= 1000
    return f"{scaled:.3g} {unit}" if scaled < 999.5 else f"{scaled:.0f} {unit}"


def loss_told(value: float | None) -> str:
    """A measured loss as text; None, in a history, is one that JSON cannot hold: not finite."""
    if value is None:
        return "not finite"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"


def sent(run: Run) -> tuple[int, int]:
    """Bytes up and down, of all rounds."""
    up, down = (sum(row.get(f"bytes_{way}", 0) for row in run.rows) for way in ("up", "down"))
    return up, down


@dataclass(frozen=True)
class Reached:
    """The first evaluation at or above a target."""

    round: int
    bytes: int
    """Up and down until the end of this round."""
    seconds: float


def default_target(runs: Sequence[Run]) -> float | None:
    """A share of the best accuracy; None if nothing was evaluated."""
    best = [max(accuracies) for run in runs if (accuracies := curve(run, "accuracy")[1])]
    return SHARE_OF_BEST * max(best) if best else None


def reached(run: Run, target: float) -> Reached | None:
    """When the global model's accuracy reached the target; None if it never did."""
    for row in evaluated(run):
        if row["accuracy"] >= target:
            t = row["round"]
            spent = positions(run, "bytes")[t], positions(run, "seconds")[t]
            return Reached(t, int(spent[0]), spent[1])
    return None


def states_of(run: Run) -> np.ndarray:
    """(clients, rounds) int8: NOT_DRAWN, ANSWERED, FAILED or REJECTED."""
    told = max((k for row in run.rows for k in row.get("cohort", ())), default=-1) + 1
    number = max(len(run.clients.get("samples", ())), told)
    states = np.full((number, len(run.rows)), NOT_DRAWN, dtype=np.int8)
    for t, row in enumerate(run.rows):
        states[row.get("replies", []), t] = ANSWERED
        states[[int(k) for k in row.get("failed", ())], t] = FAILED
        states[[int(k) for k in row.get("rejected", ())], t] = REJECTED
    return states


@dataclass(frozen=True)
class Refusal:
    """A client whose answer did not come or did not count."""

    round: int
    client: int
    what: str
    reason: str


def refusals(run: Run) -> list[Refusal]:
    """In the order of rounds and clients."""
    return [
        Refusal(row["round"], int(client), what, str(reason))
        for row in run.rows
        for key, what in FAILURES.items()
        for client, reason in row.get(key, {}).items()
    ]


def refusal_counts(run: Run) -> Counter[str]:
    """How many there are of each kind."""
    return Counter(refusal.what for refusal in refusals(run))


def before_and_after(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """The mean accuracy of the received model and of the locally trained one, each on the held-out
    samples of the clients that trained it; None in a round without."""
    pair = row.get("client_accuracy_before"), row.get("client_accuracy_after")
    if not all(pair):
        return None
    before, after = (sum(p.values()) / len(p) for p in pair)
    return before, after


def gain_of(row: Mapping[str, Any]) -> float | None:
    """What local training adds to the accuracy on the clients' own samples."""
    pair = before_and_after(row)
    return pair[1] - pair[0] if pair else None


def local_gain(run: Run) -> list[tuple[int, float, float]]:
    """Rounds with their `before_and_after`."""
    pairs = [(row["round"], before_and_after(row)) for row in run.rows]
    return [(t, *pair) for t, pair in pairs if pair]


def measured(row: Mapping[str, Any]) -> bool:
    """Whether flatness was measured in this round, in its seconds."""
    return any(key in row for key in OF_FLATNESS)


def measurements(run: Run) -> list[tuple[int | str, dict[str, Any]]]:
    """How flat the loss is: round and row of the history, for every round that measured it; at last
    what `flatfed flatness` found of the final model."""
    found: list[Any] = [(row["round"], row) for row in run.rows if measured(row)]
    path = run.folder / FLATNESS if run.folder else None
    if path and path.exists():
        afterwards = parsed(path.read_bytes(), path)
        match = afterwards.get("match", {}).get("paper", {})
        final = f"final model, {afterwards.get('samples', '?')} samples"
        found.append((final, {**match, **afterwards}))
    return found
