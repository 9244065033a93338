"""What the person at the terminal sees of a run."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from typing import Any

from fl_report.series import loss_told, sized

BEAT_S = 30.0
"""The longest silence where there is no bar [s], so that a reader knows that the run goes on."""

_ROUND = re.compile(r"round +(\d+)/(\d+)  (.*)  (ETA .*)")
_RESUMED = re.compile(r"resumed after round (\d+) of (\d+)")
_WAITING = re.compile(r"waiting: (.* replies(?:, the server computes)?) after .*")


class Progress:
    """A bar with the last round's numbers on a terminal.  Elsewhere one line per round, and in long
    ones a line every half minute that tells how many replies there are."""

    def __init__(self, rounds: int, bar: bool) -> None:
        self.rounds, self.done = rounds, 0
        self._played, self._seconds = 0, 0.0
        """Rounds, and their seconds, of this process alone: an earlier one may have been slower."""
        self._phase, self._asked, self._replies = "", 0, 0
        self._began = self._told = time.monotonic()
        self._ended = threading.Event()
        self.bar = Bar(rounds) if bar and sys.stdout.isatty() else None
        if not self.bar:
            threading.Thread(target=self._beat, daemon=True).start()

    def note(self, text: str) -> None:
        if self.bar:
            self.bar.note(text)
        else:
            self._print(text)

    def resumed(self, done: int) -> None:
        """Rounds that were played before."""
        self.done = done
        self.note(f"resumed after round {done} of {self.rounds}")
        if self.bar:
            self.bar.at(done)

    def asked(self, phase: str, number: int) -> None:
        """The run waits for `number` replies."""
        self._phase, self._asked, self._replies = "", number, 0
        self._began = time.monotonic()
        self._phase = phase  # last: another thread reads them
        self._show_waiting()

    def reply(self) -> None:
        """One of them has come."""
        self._replies += 1
        self._show_waiting()

    def row(self, row: dict[str, Any]) -> None:
        self.done = row["round"]
        self._played, self._seconds = self._played + 1, self._seconds + row["seconds"]
        self._phase, text = "", _numbers(row)
        if self.bar:
            self.bar.at(self.done, text, self._eta())
        else:
            width = len(str(self.rounds))
            self._print(f"round {self.done:>{width}}/{self.rounds}  {text}  {self._eta()}")

    def stop(self) -> None:
        """Leave the bar as it stands; notes are plain lines from now on."""
        self._ended.set()
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _eta(self) -> str:
        """How long the rest takes, from the rounds played here; empty before the first."""
        if not self._played:
            return ""
        return f"ETA {duration(self._seconds / self._played * (self.rounds - self.done))}"

    def _waiting(self) -> str:
        told = f"{self._phase}: {self._replies} of {self._asked} replies"
        return f"{told}, the server computes" if self._replies == self._asked else told

    def _show_waiting(self) -> None:
        if self.bar:
            self.bar.waiting(self._waiting())

    def _beat(self) -> None:
        while not self._ended.wait(max(self._told + BEAT_S - time.monotonic(), 0.0)):
            silent = time.monotonic() - self._told >= BEAT_S
            if silent and self._phase:
                after = duration(time.monotonic() - self._began)
                self._print(f"waiting: {self._waiting()} after {after}  {self._eta()}".rstrip())
            elif silent:
                self._told = time.monotonic()

    def _print(self, text: str) -> None:
        """A line for whoever still listens: a run does not end because its reader has gone."""
        self._told = time.monotonic()
        try:
            sys.stdout.write(f"{text}\n")  # at once: there are two threads
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader would choose."""
    for unit, length in (("s", 1), ("min", 60)):
        if seconds < 100 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _numbers(row: dict[str, Any]) -> str:
    parts = []
    if "loss" in row:
        parts.append(f"accuracy {row['accuracy']:.4f}  loss {loss_told(row['loss'])}")
    if row["client_loss"] is not None:
        parts.append(f"client loss {loss_told(row['client_loss'])}")
    parts.append(f"{len(row['replies'])}/{len(row['cohort'])} clients  {row['seconds']:.2f} s")
    parts.append(f"up {sized(row['bytes_up'])}  down {sized(row['bytes_down'])}")
    return "  ".join(parts)


class Bar:
    """A bar of rounds on a terminal; notes scroll by above it."""

    def __init__(self, rounds: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.table import Column
        from rich.text import Text

        class Numbers(ProgressColumn):
            """On a narrow terminal only these are cut off."""

            def render(self, task: Any) -> Text:
                return Text(task.fields["numbers"], no_wrap=True, overflow="ellipsis")

        def whole() -> Column:
            return Column(no_wrap=True)

        # Not rich's own estimate: it forgets rounds that are longer than half a minute.
        self._progress = RichProgress(
            TextColumn("round"),
            MofNCompleteColumn(table_column=whole()),
            BarColumn(bar_width=20, table_column=whole()),
            TimeElapsedColumn(table_column=whole()),
            TextColumn("{task.fields[eta]}", markup=False),
            TextColumn("{task.fields[waiting]}", markup=False),
            Numbers(),
            console=Console(emoji=False),
        )
        self._task = self._progress.add_task("rounds", total=rounds, numbers="", eta="", waiting="")
        self._progress.start()

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def at(self, done: int, numbers: str = "", eta: str = "") -> None:
        """So many rounds are over; what the last one came to."""
        self._progress.update(self._task, completed=done, numbers=numbers, eta=eta, waiting="")

    def waiting(self, text: str) -> None:
        """What the round that is on waits for."""
        self._progress.update(self._task, waiting=text)

    def stop(self) -> None:
        self._progress.stop()


class Screen:
    """Shows the lines that `Progress` writes in another process: as a bar on a terminal, elsewhere
    as they are."""

    def __init__(self, rounds: int) -> None:
        self._bar = Bar(rounds) if sys.stdout.isatty() else None
        self._rounds = rounds

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, line: str) -> None:
        if not self._bar:
            print(line, flush=True)
        elif found := _ROUND.fullmatch(line):
            self._bar.at(int(found[1]), found[3], found[4])
            if found[1] == found[2]:
                self._stop()
        elif found := _WAITING.fullmatch(line):
            self._bar.waiting(found[1])
        else:
            if found := _RESUMED.fullmatch(line):
                self._bar.at(int(found[1]))
            self._bar.note(line)

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
