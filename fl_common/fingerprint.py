"""Which code runs here; server and clients compare it at the roll call."""

from __future__ import annotations

import hashlib
import importlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOMS = ("fl_common", "fl_client", "fl_flatness", "strategies", "regularizers")
"""The packages whose code decides what a client answers."""


@cache
def code_sha256() -> str:
    """Hex digest over names and contents of all Python files of `ROOMS`."""
    digest = hashlib.sha256()
    for room in ROOMS:
        folder = Path(str(importlib.import_module(room).__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            name = f"{room}/{path.relative_to(folder).as_posix()}"
            content = path.read_bytes()
            digest.update(f"{name}:{len(content)};".encode() + content)
    return digest.hexdigest()


@cache
def versions() -> dict[str, str]:
    """The packages on which a result's bits depend."""
    return {name: version(name) for name in ("torch", "numpy", "flwr")}


def installed() -> dict[str, str]:
    """What else tells runs apart: Python's version, our own, and those of `versions`."""
    found = {"python": platform.python_version()}
    for name in ("flatfed", "flwr", "torch", "numpy"):
        try:
            found[name] = version(name)
        except ImportError:  # PackageNotFoundError: run from a bundle, not installed
            found[name] = "not installed"
    return found
