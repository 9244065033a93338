"""Which processes of a test live: they carry a mark in their environment (Linux)."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MARK = "FLATFED_TEST_MARK"


def mark() -> dict[str, str]:
    """Environment that tells a test's processes (with SPT_NOENV, Ray keeps it readable)."""
    return {MARK: uuid.uuid4().hex, "SPT_NOENV": "1"}


def living(env: Mapping[str, str]) -> list[str]:
    """Command lines of the processes that carry the mark."""
    entry, found = f"{MARK}={env[MARK]}\0".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if entry in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came to hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def open_files() -> set[tuple[str, str]]:
    """Descriptors of this process, each with what it is of.  Others may go at any time, as those of
    a gRPC server that has ended do: what matters is what is there later and was not before."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # of the listing itself
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
    return found
