"""What the person at the terminal sees of a run."""

from __future__ import annotations

import os
import sys
from typing import Any


class Progress:
    """A bar with the last round's numbers on a terminal, one line per round elsewhere."""

    def __init__(self, rounds: int, bar: bool) -> None:
        self.rounds, self.seconds = rounds, 0.0
        self.bar = _Bar(rounds) if bar and sys.stdout.isatty() else None

    def note(self, text: str) -> None:
        if self.bar:
            self.bar.note(text)
        else:
            _print(text)

    def row(self, row: dict[str, Any]) -> None:
        done = row["round"]
        self.seconds += row["seconds"]
        left = self.seconds / done * (self.rounds - done)
        text = _numbers(row)
        if self.bar:
            self.bar.advance(text)
        else:
            width = len(str(self.rounds))
            _print(f"round {done:>{width}}/{self.rounds}  {text}  ETA {left:.0f} s")

    def stop(self) -> None:
        """Leave the bar as it stands; notes are plain lines from now on."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def _print(text: str) -> None:
    """A line for whoever still listens: a run does not end because its reader has gone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _numbers(row: dict[str, Any]) -> str:
    parts = []
    if "loss" in row:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        parts.append(f"accuracy {row['accuracy']:.4f}  loss {loss}")
    if row["client_loss"] is not None:
        parts.append(f"client loss {row['client_loss']:.4f}")
    parts.append(f"{len(row['replies'])}/{len(row['cohort'])} clients  {row['seconds']:.2f} s")
    parts.append(f"up {_size(row['bytes_up'])}  down {_size(row['bytes_down'])}")
    return "  ".join(parts)


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


class _Bar:
    def __init__(self, rounds: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.progress = RichProgress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self.task = self.progress.add_task("rounds", total=rounds, numbers="")
        self.progress.start()

    def note(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)

    def advance(self, numbers: str) -> None:
        self.progress.update(self.task, advance=1, numbers=numbers)

    def stop(self) -> None:
        self.progress.stop()
