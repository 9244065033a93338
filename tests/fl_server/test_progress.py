"""What the terminal shows of a run: lines or a bar, the time that is left, life in long rounds."""

from __future__ import annotations

import io
import re
import sys
import time
from typing import Any

import pytest

from fl_server import progress
from fl_server.progress import Progress, Screen, duration


def row(server_round: int, seconds: float, **more: Any) -> dict[str, Any]:
    found = {"cohort": [0, 1], "replies": [0], "bytes_up": 1500, "bytes_down": 20}
    return found | {"round": server_round, "seconds": seconds, "client_loss": None} | more


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> str:
        """Without colours and the cursor's moves."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From now on in the place of the standard output."""
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "150"), ("LINES", "40")):
        monkeypatch.setenv(name, value)
    return made


def test_lines_with_the_time_that_is_left(capsys: pytest.CaptureFixture[str]):
    shown = Progress(10, bar=False)
    shown.row(row(1, 5.0, accuracy=0.25, loss=2.0, client_loss=1.5))
    shown.row(row(2, 7.0, accuracy=0.5, loss=None))
    shown.stop()
    assert capsys.readouterr().out.splitlines() == [
        "round  1/10  accuracy 0.2500  loss 2.0000  client loss 1.5000  1/2 clients  5.00 s  "
        "up 1.5 kB  down 20 B  ETA 45 s",  # 9 rounds of 5 s
        "round  2/10  accuracy 0.5000  loss not finite  1/2 clients  7.00 s  "
        "up 1.5 kB  down 20 B  ETA 48 s",  # 8 rounds of (5 + 7) / 2 s
    ]


def test_sizes_at_the_ends_of_units(capsys: pytest.CaptureFixture[str]):
    shown = Progress(10, bar=False)
    shown.row(row(1, 5.0, bytes_up=999_600, bytes_down=1234 * 10**9))
    shown.stop()
    assert "up 1 MB  down 1234 GB" in capsys.readouterr().out


def test_after_a_resume_only_rounds_since_then_count(capsys: pytest.CaptureFixture[str]):
    shown = Progress(10, bar=False)
    shown.resumed(6)
    shown.row(row(7, 5.0))
    shown.row(row(8, 7.0))
    shown.stop()
    first, *rounds = capsys.readouterr().out.splitlines()
    assert first == "resumed after round 6 of 10"
    assert [line.rsplit("  ", 1)[1] for line in rounds] == ["ETA 15 s", "ETA 12 s"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (5400, "90 min"), (6000, "1.7 h")],
)
def test_a_duration(seconds: float, shown: str):
    assert duration(seconds) == shown


def lines_of(capsys: pytest.CaptureFixture[str], number: int) -> list[str]:
    """The next lines, when there are as many."""
    text, end = "", time.monotonic() + 60
    while text.count("\n") < number and time.monotonic() < end:
        time.sleep(0.01)
        text += capsys.readouterr().out
    return text.splitlines()


def line_of(capsys: pytest.CaptureFixture[str], pattern: str) -> str:
    """The first whole line that matches."""
    text, end = "", time.monotonic() + 60
    while not (found := re.search(rf"(?m)^{pattern}\n", text)) and time.monotonic() < end:
        time.sleep(0.01)
        text += capsys.readouterr().out
    assert found, text
    return found[0]


def test_a_long_round_shows_that_it_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(progress, "BEAT_S", 0.05)
    shown = Progress(10, bar=False)
    began = time.monotonic()
    time.sleep(0.2)
    assert capsys.readouterr().out == ""  # nothing is waited for
    shown.asked("round 1", 4)
    shown.reply()
    first, *others = lines_of(capsys, 2)
    assert re.fullmatch(r"waiting: round 1: 1 of 4 replies after \d+ s", first)
    assert len(others) < (time.monotonic() - began) / 0.05
    for _ in range(3):
        shown.reply()
    line_of(capsys, r"waiting: round 1: 4 of 4 replies, the server computes after \d+ s")
    shown.row(row(1, 20.0))
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().out == ""  # again
    shown.asked("evaluation of round 2", 3)
    waiting = r"waiting: evaluation of round 2: 0 of 3 replies after \d+ s"
    line_of(capsys, rf"{waiting}  ETA 3 min")  # 9 rounds of 20 s
    shown.stop()
    time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.15)
    assert capsys.readouterr().out == ""


def test_one_round_is_one_round(runner, capsys):
    assert runner("clients.number=2", "run.rounds=1", "train.device=cpu").code == 0
    assert " after 1 round in " in capsys.readouterr().out


def test_replies_of_a_run_are_counted(runner, monkeypatch, capsys):
    monkeypatch.setattr(progress, "BEAT_S", 0.02)
    small = ("clients.number=4", "run.rounds=2", "train.device=cpu", "train.epochs=4")
    assert runner(*small, "eval.on=both").code == 0
    out = capsys.readouterr().out
    counts = re.findall(r"(?m)^waiting: round 1: (\d) of 4 replies after \d+ s", out)
    assert {"1", "2", "3"} & {*counts} and {*counts} <= {*"01234"}
    assert sorted(counts) == counts
    assert len(re.findall(r"(?m)^round [12]/2 .* ETA \d+ s$", out)) == 2


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    terminal = terminal_of(monkeypatch)
    shown = Progress(3, bar=True)
    shown.note("results: [red]/there[/red]")
    shown.asked("round 1", 4)
    shown.reply()
    shown.bar._progress.refresh()
    assert "round 0/3" in terminal.shown and "round 1: 1 of 4 replies" in terminal.shown
    shown.row(row(1, 120.0, accuracy=0.25, loss=2.0))
    shown.stop()
    assert "results: [red]/there[/red]\n" in terminal.shown
    assert re.search(
        r"round 1/3 .* \d:\d\d:\d\d ETA 4 min +accuracy 0.2500  loss 2", terminal.shown
    )
    assert "replies" not in terminal.shown.rsplit("ETA", 1)[1]
    shown.note("afterwards")
    assert terminal.getvalue().endswith("afterwards\n")


def test_a_narrow_terminal_cuts_off_the_numbers_alone(monkeypatch: pytest.MonkeyPatch):
    terminal = terminal_of(monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    shown = Progress(3, bar=True)
    shown.row(row(1, 120.0, accuracy=0.25, loss=2.0))
    shown.asked("round 2", 4)
    shown.stop()
    last = [line for line in terminal.shown.splitlines() if "replies" in line][-1]
    assert "round 1/3" in last
    assert re.search(r" \d:\d\d:\d\d ETA 4 min round 2: 0 of 4 replies", last)
    assert last.rstrip().endswith("…") and len(last) <= 80


def test_the_lines_of_another_process_as_a_bar(capsys, monkeypatch):
    """Those that `Progress` writes there: each kind is understood."""
    monkeypatch.setattr(progress, "BEAT_S", 0.05)
    there = Progress(5, bar=False)
    there.note("results: /there")
    there.resumed(2)
    there.asked("round 3", 8)
    lines = lines_of(capsys, 3)
    for _ in range(8):
        there.reply()
    lines.append(line_of(capsys, r"waiting: round 3: 8 of 8 .*").rstrip())
    there.row(row(3, 60.0))
    there.stop()
    lines += capsys.readouterr().out.splitlines()
    terminal = terminal_of(monkeypatch)
    with Screen(5) as screen:
        for line in lines:
            screen(line)
            screen._bar._progress.refresh()
    shown = terminal.shown
    assert "results: /there\n" in shown and "resumed after round 2 of 5\n" in shown
    assert "round 2/5" in shown and "round 3: 0 of 8 replies" in shown
    assert "round 3: 8 of 8 replies, the server computes" in shown
    assert re.search(r"round 3/5 .* ETA 2 min +1/2 clients  60.00 s", shown)
    assert "waiting:" not in shown


def test_lines_of_another_process_stay_lines_elsewhere(capsys: pytest.CaptureFixture[str]):
    with Screen(2) as screen:
        screen("round 1/2  1/2 clients  1.00 s  ETA 1 s")
        screen("anything")
    assert capsys.readouterr().out == "round 1/2  1/2 clients  1.00 s  ETA 1 s\nanything\n"


def test_after_the_last_round_what_follows_is_plain(monkeypatch: pytest.MonkeyPatch):
    terminal = terminal_of(monkeypatch)
    with Screen(1) as screen:
        screen("round 1/1  1/2 clients  1.00 s  ETA 0 s")
        screen("model_sha256 ab")
    assert terminal.getvalue().endswith("model_sha256 ab\n")
