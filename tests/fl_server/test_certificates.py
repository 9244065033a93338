"""`flatfed certs`: what it writes, what it keeps, and what it says of wrong calls."""

from __future__ import annotations

import errno
import json
import os
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fl_client.node_checks import Node, NodeError, _check_key, _check_server
from fl_server.certificates import CA, CA_KEY, KEYS, SERVER, SERVER_KEY, issue, make_certificates
from fl_server.cli import main
from fl_server.keys import read_keys


@pytest.fixture
def folder(tmp_path: Path, capsys) -> Path:
    """A CA, a server that is reached as 127.0.0.1, and two nodes' keys."""
    place = tmp_path / "keys"
    assert certs(place, "--host", "127.0.0.1", "--nodes", "2") == 0
    capsys.readouterr()
    return place


def certs(*arguments: object) -> int:
    return main(["certs", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_and_for_whom(folder: Path):
    assert {str(p.relative_to(folder)): oct(p.stat().st_mode)[-3:] for p in folder.rglob("*")} == {
        "ca.crt": "644",
        "ca.key": "600",
        "server.pem": "644",
        "server.key": "600",
        "keys.json": "644",
        "nodes": "700",
        **{"nodes/0": "600", "nodes/0.pub": "644", "nodes/1": "600", "nodes/1.pub": "644"},
    }
    assert folder.stat().st_mode & 0o777 == 0o700
    for i in (0, 1):
        _check_key(folder / "nodes" / str(i))
        assert read_keys(folder / KEYS)[i] == (folder / f"nodes/{i}.pub").read_text()
    assert json.loads((folder / KEYS).read_text())["0"].startswith("ecdsa-sha2-nistp384 AAAA")


def handshake(folder: Path, root: Path) -> None:
    """A node's check against a server with this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / SERVER, folder / SERVER_KEY)
    context.set_alpn_protocols(["h2"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            connection, _ = server.accept()
            try:
                with context.wrap_socket(connection, server_side=True) as secure:
                    secure.recv(1)
            except OSError:
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            given = Node(f"127.0.0.1:{port}", root_certificates=root, wait=0)
            _check_server(given, "127.0.0.1", port)
        finally:
            thread.join()


def test_the_server_is_trusted_by_its_ca_alone(folder: Path, tmp_path: Path):
    handshake(folder, folder / CA)
    make_certificates(tmp_path / "other", ["127.0.0.1"])
    with pytest.raises(NodeError, match="is not signed by"):
        handshake(folder, tmp_path / "other" / CA)


def test_called_again_it_keeps_everything_and_adds_nodes(folder: Path, capsys):
    before = contents(folder)
    assert certs(folder, "--nodes", "3") == 0
    after = contents(folder)
    assert set(after) - set(before) == {"nodes/2", "nodes/2.pub"}
    assert [n for n in before if before[n] != after[n]] == [KEYS]
    assert sorted(read_keys(folder / KEYS)) == [0, 1, 2]
    out = capsys.readouterr().out
    assert "old ca.crt " in out
    assert "new nodes      3 nodes' keys" in out
    assert certs(folder) == 0
    assert contents(folder) == after


def test_renewal_keeps_the_ca(folder: Path, capsys):
    before = contents(folder)
    assert certs(folder, "--host", "127.0.0.1", "--host", "fl.example.org", "--days", "9") == 0
    changed = {name for name, data in contents(folder).items() if data != before[name]}
    assert changed == {SERVER, SERVER_KEY}
    handshake(folder, folder / CA)
    end = datetime.now(UTC) + timedelta(days=9)
    assert f"until {end:%Y-%m-%d}" in capsys.readouterr().out
    certificate = x509.load_pem_x509_certificate((folder / SERVER).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["127.0.0.1", "fl.example.org", "localhost"]
    assert abs(certificate.not_valid_after_utc - end) < timedelta(minutes=5)


def test_the_server_does_not_outlive_the_ca(folder: Path):
    ends = issue(folder, ["h"], days=99999).ends
    assert ends[SERVER] == ends[CA]


@pytest.mark.parametrize("wanted", [("--nodes", "3"), ("--host", "fl.example.org")])
def test_a_full_disk_leaves_what_was(folder: Path, monkeypatch, capsys, wanted: tuple[str, str]):
    """No key that is empty or half there, which the next call would take for one."""
    before = contents(folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert certs(folder, *wanted) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert contents(folder) == before
    assert certs(folder, *wanted) == 0


def test_keys_made_elsewhere_and_keys_taken_away(folder: Path, tmp_path: Path):
    """A hospital sends its public key only; a client that left has its files removed."""
    issue(tmp_path / "hospital", ["h"], nodes=1)
    theirs = (tmp_path / "hospital/nodes/0.pub").read_text()
    (folder / "nodes/2.pub").write_text(f"{theirs} root@hospital\n")
    for name in ("0", "0.pub"):
        (folder / "nodes" / name).unlink()
    (folder / "nodes/1").unlink()  # it lies on its node now
    first = (folder / "nodes/1.pub").read_text()
    assert certs(folder) == 0
    assert read_keys(folder / KEYS) == {1: first, 2: theirs}
    assert certs(folder, "--nodes", "3") == 0
    assert not (folder / "nodes/1").exists()
    assert sorted(read_keys(folder / KEYS)) == [0, 1, 2]


def test_the_ca_key_may_be_elsewhere_until_it_is_needed(folder: Path, capsys):
    (folder / CA_KEY).unlink()
    (folder / SERVER_KEY).unlink()
    capsys.readouterr()
    assert certs(folder, "--nodes", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "not here" in line] == [
        ["---", CA_KEY],
        ["---", SERVER_KEY],
    ]
    refused(capsys, "is not there; --host needs it", folder, "--host", "h")


def refused(capsys, reason: str, *arguments: object) -> None:
    capsys.readouterr()
    assert certs(*arguments) == 2
    out, line = capsys.readouterr()
    assert out == ""
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert reason in line


def test_wrong_calls_change_nothing(folder: Path, tmp_path: Path, capsys):
    new = tmp_path / "new"
    refused(capsys, "give --host NAME", new, "--nodes", "2")
    wrong = ("fl.example.org:9092", "https://fl.example.org", "", "a b", "a..b", "a-", "é")
    for host in (*wrong, f"{'a' * 64}.org", ".".join(["a" * 60] * 5)):
        refused(capsys, f"--host {host}: must be a name or an IP address", new, "--host", host)
    refused(capsys, "--nodes -1: must be", new, "--host", "h", "--nodes", "-1")
    for days in ("0", "nan", "inf"):
        refused(capsys, f"--days {days}: must be", new, "--host", "h", "--days", days)
    assert not new.exists()
    refused(capsys, "--days 10: is for a new server certificate", folder, "--days", "10")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("")
    refused(capsys, "holds other files; give a folder of its own", tmp_path / "home", "--host", "h")
    (tmp_path / "file").write_text("")
    refused(capsys, "Not a directory", tmp_path / "file", "--host", "h")
    refused(capsys, "Not a directory", tmp_path / "file" / "keys", "--host", "h")

    for name, text, reason, more in (
        (CA_KEY, "x", "not a private key; restore it", ["--host", "h"]),
        (CA, "x", "not a PEM certificate; restore it", []),
        (SERVER, "x", "not a PEM certificate; restore it", []),
        ("nodes/1.pub", "x", "1.pub: not a public key", []),
        ("nodes/b.pub", "x", "name it for its partition", []),
        ("nodes/7", "x", "its public key is gone", []),
    ):
        path = folder / name
        was = path.read_bytes() if path.exists() else None
        path.write_text(text)
        before = contents(folder)
        refused(capsys, reason, folder, "--nodes", "9", *more)
        assert contents(folder) == before
        path.unlink() if was is None else path.write_bytes(was)
    (folder / CA).rename(tmp_path / CA)
    refused(capsys, "ca.crt: is gone; restore it", folder, "--host", "h")


@pytest.mark.parametrize(
    "call",
    [
        ["certs", "keys", "--host", "a.example", "b.example"],
        ["register", "keys.json", "lab", "other"],
        ["worker", "--socket", "socket", "key=value"],
    ],
)
def test_a_word_too_many_is_refused(call: list[str], tmp_path: Path, monkeypatch, capsys):
    """As a second name behind one --host, which would be in no certificate."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(call)
    assert f"unrecognized arguments: {call[-1]}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_setting_written_as_an_option_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--run.rounds=3"])
    assert "arguments: --run.rounds=3; settings are written key=value" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["report", "results/A", "--traget"])
    assert capsys.readouterr().err.endswith("arguments: --traget\n"), "it has no settings"


def test_a_ca_that_has_expired_or_has_another_key(folder: Path, tmp_path: Path, capsys):
    make_certificates(tmp_path / "old", ["h"], days=-1)
    mine = (folder / CA).read_bytes()
    (folder / CA).write_bytes((tmp_path / "old" / CA).read_bytes())
    refused(capsys, "ca.crt: expired on", folder, "--host", "h")
    make_certificates(tmp_path / "else", ["h"])
    (folder / CA).write_bytes((tmp_path / "else" / CA).read_bytes())
    refused(capsys, "ca.key: is not the key of", folder, "--host", "h")
    (folder / CA).write_bytes(mine)
    assert certs(folder, "--host", "h") == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys):
    tmp_path.chmod(0o500)
    refused(capsys, "Permission denied", tmp_path / "keys", "--host", "h")
