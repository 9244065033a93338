"""State files of `flatfed up` that no longer say the truth."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fl_common import processes
from fl_server import federation


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATFED_HOME", str(tmp_path))
    (tmp_path / "up").mkdir()
    return tmp_path / "up" / "state.json"


def test_the_machine_was_started_anew(up: Path):
    """Ids and start times may then be those of others; here they are this process's own."""
    me = {os.getpid(): processes.identify(os.getpid())}
    boot = processes.boot()
    state = {"boot": boot, "mark": "none", "clients": 1, "address": "h:1", "processes": me}
    up.write_text(json.dumps(state))
    assert federation._present(federation._state()) == me

    up.write_text(json.dumps({**state, "boot": "another"}))
    assert federation._present(federation._state()) == {}
    with pytest.raises(federation.UsageError, match="what it had started ended by itself"):
        federation.down()
    assert not up.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"boot": 1}'])
def test_a_broken_state_file(up: Path, text: str):
    up.write_text(text)
    with pytest.raises(federation.UsageError, match="no federation is up"):
        federation.connection("")


def test_wrong_calls(up: Path):
    with pytest.raises(federation.UsageError, match="--clients 0"):
        federation.up(0)
    with pytest.raises(federation.UsageError, match="give it once, or 3"):
        federation.up(3, data_paths=["a", "b"])
