"""Which processes of a test live: they carry a mark in their environment (Linux)."""

from __future__ import annotations

import time
import uuid
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
