"""What the terminal says of a run on Flower's engines, and what goes to the results folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shlex import quote
from typing import Any

import flwr
import grpc
import pytest
import torch

from fl_common.config import resolve
from fl_common.fingerprint import code_sha256, installed
from fl_flatness.stored import Stored
from fl_server import federation, flower_run
from fl_server.certificates import CA, SERVER, SERVER_KEY, make_certificates
from fl_server.cli import main
from fl_server.flower_run import FlowerStatus, _plain
from fl_server.progress import Screen
from fl_server.recorder import ended, folder_error, read_summary
from fl_server.run_commands import (
    FLOWER_LOG,
    _broken_off,
    _continued,
    _outcome,
    _run_grpc,
    _run_ray,
    _Told,
)

FAILED = FlowerStatus(1, "finished:failed", "ServerApp failed with exception: roll call: 2 of 3")
REASON = "roll call: clients.number = 3, but 2 can take part after 8 s (clients.deadline-s)"
TRACEBACK = (
    "ERROR: ServerApp raised an exception",
    "Traceback (most recent call last):",
    '  File "run_serverapp.py", line 221, in run_serverapp',
    f"fl_server.exchange.RunFailed: {REASON}",
    "ERROR: Exit Code: 201",
    "",
    "An unhandled exception occurred in the ServerApp.",
)


def test_a_relative_python_path_holds_in_other_folders(tmp_path: Path, monkeypatch, capsys):
    """Flower's processes start in an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f".{os.pathsep}mine{os.pathsep}/theirs")
    assert main(["config"]) == 0
    assert os.environ["PYTHONPATH"] == os.pathsep.join(
        [str(tmp_path), f"{tmp_path}/mine", "/theirs"]
    )


def told(*lines: str) -> _Told:
    with Screen(3) as screen:
        told = _Told(screen)
        for line in lines:
            told(line)
    return told


def write_summary(folder: Path, **values: Any) -> None:
    (folder / "summary.json").write_text(json.dumps(values))


def test_the_versions_are_those_that_a_run_records(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    recorded = ", ".join(f"{name} {version}" for name, version in installed().items())
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{recorded}, code {code_sha256()[:12]}\n"
    assert f"flwr {flwr.__version__}, torch {torch.__version__.partition('+')[0]}" in recorded


def test_a_failure_is_one_line_and_its_traceback_a_file(tmp_path: Path, capsys):
    write_summary(tmp_path, status="failed", error=REASON)
    lines = ("results: /r", f"run failed: {REASON}", "continue it with: flatfed resume /r")
    assert _outcome(FAILED, 1, tmp_path, told(*lines, *TRACEBACK)) == 3
    out, err = capsys.readouterr()
    assert err == f"error: the run failed: {REASON}\n"
    log = tmp_path / FLOWER_LOG
    assert out.splitlines() == [lines[0], lines[2], f"errors that Flower reported: {log}"]
    assert log.read_text().splitlines() == list(TRACEBACK)


def test_a_run_goes_on_after_an_error_of_a_client(tmp_path: Path, capsys):
    write_summary(tmp_path, status="completed")
    shown = ("round 1, client 0: no memory", "round 1/1  1/2 clients", "a table")
    completed = FlowerStatus(1, "finished:completed", "")
    assert _outcome(completed, 1, tmp_path, told(*TRACEBACK, *shown)) == 0
    assert capsys.readouterr().out.splitlines()[:3] == list(shown)


@pytest.mark.parametrize("said", [True, False])
def test_the_server_is_asked_for_the_reason_first(tmp_path: Path, capsys, said: bool):
    """By its line, where its folder is on another machine; then by its summary."""
    if not said:
        write_summary(tmp_path, status="failed", error=REASON)
    lines = [f"run failed: {REASON}"] * said
    folder = tmp_path / "elsewhere" if said else tmp_path
    assert _outcome(FAILED, 1, folder, told(*lines, *TRACEBACK), elsewhere=said) == 3
    assert capsys.readouterr().err == f"error: the run failed: {REASON}\n"


def test_a_server_that_said_nothing(tmp_path: Path, capsys):
    """What Flower knows is all that there is."""
    assert _outcome(FAILED, 1, tmp_path / "none", told(*TRACEBACK)) == 3
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines == list(TRACEBACK)
    assert last == f"error: the run failed: no summary; Flower says {FAILED.status} " + (
        FAILED.details
    )


def test_a_completed_run_that_was_not_extended(tmp_path: Path, capsys):
    write_summary(tmp_path, status="completed", accuracy=0.5, rounds=20)
    assert _outcome(FAILED, 50, tmp_path, told()) == 3
    told_of = "error: the run failed: it did not go on after round 20; Flower says finished:failed"
    assert capsys.readouterr().err.startswith(told_of)


def test_a_server_that_was_ended_after_its_last_round(tmp_path: Path, capsys):
    write_summary(tmp_path, status="completed", accuracy=0.5, rounds=20)
    assert _outcome(FAILED, 20, tmp_path, told()) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the run failed: its results are complete, but its process ended")
    assert line.endswith(f"draw them with: flatfed report {tmp_path}")
    assert read_summary(tmp_path)["status"] == "completed"


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_run_whose_superlink_died_can_go_on(tmp_path: Path, capsys, checkpoint: bool):
    folder = tmp_path / "my runs"
    (folder / "checkpoints").mkdir(parents=True)
    write_summary(folder, status="running", rounds=3)
    if checkpoint:
        (folder / "checkpoints" / "round-1.safetensors").touch()
    assert _broken_off("the SuperLink does not answer", folder, told()) == 3
    error = "the SuperLink does not answer"
    assert read_summary(folder) == {"status": "failed", "rounds": 3, "error": error}
    hint = f"continue it with: flatfed resume {quote(str(folder))}\n" * checkpoint
    why = "error: the run failed: the SuperLink does not answer\n"
    assert capsys.readouterr().err == why + hint


def test_a_run_whose_first_checkpoint_is_half_written_is_not_to_be_resumed(tmp_path: Path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / ".000000-0.safetensors.1").touch()
    (folder / "config.json").write_text("{}")

    def told() -> list[str]:
        with pytest.raises(ValueError, match="holds no model") as error:
            Stored.load(folder)
        return [_continued(folder), folder_error(folder), str(error.value)]

    assert [line for line in told() if "flatfed resume" in line] == []
    (folder / "checkpoints" / "000000-0.safetensors").touch()
    assert len([line for line in told() if f"flatfed resume {folder}" in line]) == 3


def test_what_was_said_before_the_superlink_died_is_told(tmp_path: Path, capsys):
    """The reason that the server gave; else what Flower wrote, where no folder can have it."""
    gone = "the SuperLink does not answer"
    assert _broken_off(gone, tmp_path / "none", told(*TRACEBACK)) == 3
    assert capsys.readouterr().err.splitlines() == [*TRACEBACK, f"error: the run failed: {gone}"]
    lines = (f"run failed: {REASON}", *TRACEBACK)
    assert _broken_off(gone, tmp_path / "none", told(*lines)) == 3
    assert capsys.readouterr().err == f"error: the run failed: {REASON}\n"


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_run_that_is_interrupted_can_go_on(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, checkpoint: bool
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(flower_run, "run_simulation", interrupted)
    write_summary(tmp_path, status="running")
    if checkpoint:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "000001-a.safetensors").touch()
    with pytest.raises(KeyboardInterrupt):
        _run_ray(resolve({"engine.name": "ray"}), tmp_path)
    hint = f"continue it with: flatfed resume {tmp_path}\n" * checkpoint
    assert capsys.readouterr().out == hint
    assert read_summary(tmp_path) == {"status": "failed", "error": "interrupted"}
    write_summary(tmp_path, status="completed")
    with pytest.raises(KeyboardInterrupt):
        _run_ray(resolve({"engine.name": "ray"}), tmp_path)
    assert capsys.readouterr().out == "", "a completed run has nothing to continue"


def test_a_run_that_goes_on_or_has_ended_is_not_told_to_have_ended(tmp_path: Path):
    write_summary(tmp_path, status="completed")
    ended(tmp_path, "interrupted")
    assert read_summary(tmp_path) == {"status": "completed"}
    write_summary(tmp_path, status="running")
    with (tmp_path / ".lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ended(tmp_path, "interrupted")
        assert read_summary(tmp_path) == {"status": "running"}
    ended(tmp_path, "interrupted")
    assert read_summary(tmp_path)["error"] == "interrupted"
    ended(tmp_path / "elsewhere", "interrupted")
    assert not (tmp_path / "elsewhere").exists()


def test_the_class_of_an_error_is_not_its_reason():
    line = "roll call: refused node 9: <class 'fl_common.data.errors.DataError'>:<'/nope is not"
    assert _plain(f"{line} there\n") == "roll call: refused node 9: /nope is not there"


@pytest.mark.parametrize("repeated", ["", " [repeated 3x across cluster]"])
def test_the_end_of_an_actor_is_no_warning(repeated: str):
    """On a busy machine Ray hands on what its actors say at the end, after the run's last line."""
    actor = "\x1b[36m(ClientAppActor pid=14306)\x1b[0m \x1b[93mWARNING \x1b[0m:   "
    assert _plain(f"{actor}Manually terminating ClientAppActor{repeated}\n") is None
    assert _plain(f"{actor}a client's own warning\n")


@pytest.mark.parametrize(
    ("connection", "keys", "warned"), [("lab", "", 1), ("lab", "/keys.json", 0), ("", "", 0)]
)
def test_nodes_that_may_take_any_place(
    tmp_path: Path, monkeypatch, capsys, connection: str, keys: str, warned: int
):
    link = federation.Connection("lab", "127.0.0.1:1", tmp_path)
    monkeypatch.setattr(federation, "connection", lambda name: link)
    completed = FlowerStatus(1, "finished:completed", "")
    monkeypatch.setattr(flower_run, "run_on_connection", lambda *_, **__: completed)
    write_summary(tmp_path, status="completed")
    settings = {"engine.name": "grpc", "engine.connection": connection, "clients.keys": keys}
    assert _run_grpc(resolve(settings), tmp_path) == 0
    assert capsys.readouterr().out.count("warning: clients.keys is not set: ") == warned


def test_what_flwr_says_of_a_superlink_that_is_gone_is_told_without_its_json():
    message = "Using SuperLink: up (127.0.0.1:9093)\n...\n\nConnection to it is unavailable."
    listing = json.dumps({"success": False, "error-message": message}, indent=2)
    with pytest.raises(ValueError, match=r"^Connection to it is unavailable\.$"):
        flower_run._status(listing)
    with pytest.raises(ValueError, match=r"^no JSON at all$"):
        flower_run._status("no JSON\n  at all\n")


def test_a_run_that_cannot_be_submitted_says_why(tmp_path: Path, monkeypatch, capsys):
    """Flower knows only that the SuperLink is "unavailable"."""
    for name in ("its", "ours"):
        make_certificates(tmp_path / name, ["localhost"])
    pair = [(tmp_path / "its" / name).read_bytes() for name in (SERVER_KEY, SERVER)]
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([tuple(pair)])
    address = f"localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    ca = tmp_path / "ours" / CA
    text = f'[superlink.lab]\naddress = "{address}"\nroot-certificates = "{ca}"\n'
    (tmp_path / "config.toml").write_text(text)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    settings = {"engine.name": "grpc", "engine.connection": "lab", "clients.keys": "/keys.json"}
    try:
        assert _run_grpc(resolve(settings), tmp_path / "run") == 3
    finally:
        server.stop(0)
    (line,) = capsys.readouterr().err.splitlines()
    why = f"its certificate is not signed by {ca}; give the ca.crt of that server as root-cert"
    assert line.startswith(f"error: the run failed: SuperLink {address}: {why}")


def test_why_a_folder_cannot_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name that is too long is not a folder into which one may not look."""
    name = "a" * 300
    assert folder_error(tmp_path / name) == (
        f"run.name: {name[:40]}...: File name too long; give a shorter one"
    )
    there = Path.exists

    def exists(path: Path) -> bool:  # as for another user than root
        if tmp_path in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return there(path)

    monkeypatch.setattr(Path, "exists", exists)
    assert folder_error(tmp_path / "closed" / "run") == (
        f"run.output-dir: {tmp_path}/closed cannot be written to (Permission denied); choose "
        "another folder"
    )
