"""Runs whose every round can be looked at."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_client.app import release
from fl_server.recorder import Recorder
from tests import toy
from tests.trace import Trace, follow


@pytest.fixture
def traced(runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Trace]:
    """`traced(4, "key=value", ...)` runs with so many clients and these settings, of which the
    last of a key wins, and traces all rounds."""

    def play(number: int, *settings: str) -> Trace:
        trace = Trace(number)
        state_dir = tmp_path / f"state{runner.count}"
        given = [f"client.state-dir={state_dir}", *settings, f"clients.number={number}"]
        last = {setting.partition("=")[0]: setting for setting in given}
        with monkeypatch.context() as patch:
            follow(patch, trace, state_dir)
            patch.setattr(os, "fsync", lambda descriptor: None)  # nobody pulls the plug here
            patch.setattr(Recorder, "_draw", lambda self, *args: None)
            trace.result = runner(*last.values())
        assert trace.result.code == 0
        return trace

    return play


@pytest.fixture
def on_toy(traced, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trace]:
    """`on_toy(3, "key=value", ..., n=(3, 1))` traces so many rounds on the quadratic toy."""

    def play(rounds: int, *settings: str, n: tuple[int, int] = (1, 1)) -> Trace:
        release()
        toy.install(monkeypatch, n)
        return traced(2, *toy.SETTINGS, f"run.rounds={rounds}", *settings)

    return play
