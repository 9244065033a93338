"""Sockets of this machine: where they lie, free ports, no proxy between.

Only the standard library is used.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import tempfile
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Of the ports that the system hands out."""
TAKEN = re.compile(rb"(?i)already in use|failed to bind")
"""In the log of a Flower process that found its port taken."""


def read(connection: socket.socket, length: int) -> bytearray:
    """Exactly `length` bytes.  Raises EOFError if the other side is gone, OSError."""
    data = bytearray(length)
    view, start = memoryview(data), 0
    while start < length:
        count = connection.recv_into(view[start:])
        if not count:
            raise EOFError
        start += count
    return data


def direct() -> dict[str, str]:
    """Environment variables with which this machine is reached without a proxy."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "localhost"
    named = dict.fromkeys([*hosts.split(","), "localhost", "127.0.0.1", "::1"])
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(named))


def root(longest: int) -> str:
    """The folder of temporary files, or /tmp if its path is longer than `longest` bytes: a socket's
    path may have about 100."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= longest else "/tmp"


def free_port() -> int:
    """A loopback port that nobody used a moment ago, and that the system gives to nobody by itself:
    whoever needs it may take seconds to begin."""
    try:
        first = int(RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):  # not Linux
        first = 32768
    low = max(1024, first // 2)
    for _ in range(1000 if first > low else 0):
        port = low + secrets.randbelow(first - low)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
