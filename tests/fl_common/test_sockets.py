"""Sockets of this machine."""

from __future__ import annotations

import secrets
import socket

import pytest

from fl_common import sockets


def test_this_machine_is_reached_without_a_proxy(monkeypatch: pytest.MonkeyPatch):
    """Whatever else is, and however often that is asked for."""
    for given, told in (
        ("", "localhost,127.0.0.1,::1"),
        (".hospital.example", ".hospital.example,localhost,127.0.0.1,::1"),
        ("a,127.0.0.1", "a,127.0.0.1,localhost,::1"),
    ):
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("NO_PROXY", given)
        for _ in range(2):
            assert sockets.direct() == {"no_proxy": told, "NO_PROXY": told}
            monkeypatch.setenv("no_proxy", told)


def test_a_free_port_is_not_one_that_the_system_hands_out(tmp_path, monkeypatch):
    """Nor one that is taken; where that is all there is, or nothing is known, any that is free."""
    (tmp_path / "range").write_text("22000\t60999\n")
    monkeypatch.setattr(sockets, "RANGE", tmp_path / "range")
    assert all(11000 <= sockets.free_port() < 22000 for _ in range(50))
    with socket.create_server(("127.0.0.1", sockets.free_port())) as taken:
        port = taken.getsockname()[1]
        real, drawn = secrets.randbelow, iter([port - 11000, port - 11000])
        monkeypatch.setattr(secrets, "randbelow", lambda n: next(drawn, None) or real(n))
        assert sockets.free_port() != port and next(drawn, None) is None
        monkeypatch.setattr(secrets, "randbelow", lambda below: port - 11000)
        assert sockets.free_port() != port
    monkeypatch.undo()
    (tmp_path / "range").write_text("1024\t65535\n")  # all that no privilege is needed for
    monkeypatch.setattr(sockets, "RANGE", tmp_path / "range")
    assert sockets.free_port() >= 1024
    monkeypatch.setattr(sockets, "RANGE", tmp_path / "none")
    assert 16384 <= sockets.free_port() < 32768
