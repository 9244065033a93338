"""Sockets of this machine."""

from __future__ import annotations

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
