"""State files of `flatfed up` that no longer say the truth."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_common import processes
from fl_server import federation
from fl_server.cli import main


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
    with pytest.raises(federation.UsageError, match="the processes that it had started have ended"):
        federation.down()
    assert not up.exists()


def test_two_calls_do_not_start_and_end_at_once(up: Path):
    with federation._alone():
        for call in (federation.down, lambda: federation.up(1)):
            with pytest.raises(federation.UsageError, match="is running; wait for it to end"):
                call()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"boot": 1}'])
def test_a_broken_state_file(up: Path, text: str):
    up.write_text(text)
    with pytest.raises(federation.UsageError, match="no federation is up"):
        federation.connection("")


@pytest.fixture
def commands(up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put scripts in the place of Flower's commands and of `flatfed`; limits are short."""
    monkeypatch.setattr(federation, "BIN", tmp_path / "bin")
    for limit in ("START_TIMEOUT", "ONLINE_TIMEOUT"):
        monkeypatch.setattr(federation, limit, 2.0)
    monkeypatch.setattr(federation, "NODE_S", 0.0)
    (tmp_path / "bin").mkdir()

    def write(flwr: str, node: str = "echo SuperNode ID: 1") -> None:
        for name, text in (
            ("flower-superlink", "echo Uvicorn running on; exec sleep 60"),
            ("flwr", flwr),
            ("flatfed", f"{node}; exec sleep 60"),
        ):
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)

    return write


def failure(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """Why a federation of three does not start; nothing of it is left."""
    assert main(["up", "--clients", "3", *options]) == 3
    assert not federation._present(federation._state())
    return capsys.readouterr().err.splitlines()


TWO_OF_THREE = """echo '{"nodes": [{"status": "online"}, {"status": "online"}]}'"""


def test_the_node_that_is_not_online_is_named(commands, capsys: pytest.CaptureFixture[str]):
    late = 'case "$*" in *"--partition 2 "*) echo no way;; *) echo SuperNode ID: 1;; esac'
    commands(TWO_OF_THREE, late)
    first, *tail = failure(capsys, "--insecure")
    assert first == "error: the federation did not start: not online within 2 s: node-2"
    assert tail[0].endswith("node-2.log:")
    assert tail[1:] == ["no way"]


def test_a_node_that_the_superlink_does_not_have(commands, capsys: pytest.CaptureFixture[str]):
    commands(TWO_OF_THREE)
    first, *tail = failure(capsys, "--insecure")
    assert first.endswith("not online within 2 s: a node that says it is")
    assert tail[0].endswith("superlink.log:")


@pytest.mark.parametrize(("options", "call"), [([], "register"), (["--insecure"], "list")])
def test_a_superlink_that_does_not_answer(
    commands, capsys: pytest.CaptureFixture[str], options: list[str], call: str
):
    commands("exec sleep 60")
    assert failure(capsys, *options) == [
        f"error: the federation did not start: `flwr supernode {call}` gave no answer within 2 s"
    ]


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    for home in ("/proc/flatfed", str(tmp_path / "file")):
        monkeypatch.setenv("FLATFED_HOME", home)
        for call in (lambda: federation.up(1), federation.down):
            with pytest.raises(federation.UsageError, match=r"FLATFED_HOME: .* cannot be written"):
                call()


@pytest.mark.parametrize("text", ["", "superlink = 5\n", "[superlink]\nlab = 5\n"])
def test_a_flower_configuration_without_connections(tmp_path: Path, monkeypatch, text: str):
    (tmp_path / "config.toml").write_text(text)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(
        federation.UsageError, match=r"config\.toml has none; add \[superlink\.lab\]"
    ):
        federation.connection("lab")


def test_wrong_calls(up: Path):
    with pytest.raises(federation.UsageError, match="--clients 0"):
        federation.up(0)
    with pytest.raises(federation.UsageError, match="give it once, or 3"):
        federation.up(3, data_paths=["a", "b"])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--poll-interval", "nan"], "--poll-interval nan: must be greater than 0"),
        (["--device", "gpu"], "device gpu: must be auto, cpu, cuda or cuda:K"),
        (["--threads", "0"], "threads = 0: must be a whole number, at least 1"),
        (["dp-clip=-1"], "dp-clip = -1.0: must be a number greater than 0"),
        (["partition"], "partition: node-config keys are written key=value"),
        (["--data-path", "/", "--data-path", "/nope"], "data-path /nope: does not exist; give this "
         "node's folder or file of data"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_all_nodes_is_told_before_anything_starts(
    up: Path, options: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["up", "--clients", "2", *options]) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")
    assert list(up.parent.iterdir()) == []
