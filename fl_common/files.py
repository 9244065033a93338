"""Files that are whole or not there: atomic writes, and names that carry a checksum."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import tomllib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

DIGITS = 32
"""Hex digits of SHA-256 in a file's name."""
LOCK = ".lock"


def absolute_path(path: str | Path) -> Path:
    """An absolute path, from the current folder; `~` is the home folder, and `~user` of an unknown
    user a name like any other, as in a shell."""
    return Path(os.path.expanduser(path)).absolute()


def home() -> Path:
    """Where FlatFed keeps what belongs to no run: `$FLATFED_HOME`, or `~/.flatfed`."""
    return absolute_path(os.environ.get("FLATFED_HOME") or "~/.flatfed")


def flower_home() -> Path:
    """Flower's home of this user, with its configuration and the apps that it has unpacked."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace `path` by a file that holds all of `data`, synced to disk, or leave it as it was; no
    temporary file stays.  `mode`: its permissions from the start, less the umask.  Raises
    OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch(mode)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk's error names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)  # the new name too


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk.  Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.  Raises OSError, ValueError."""
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def read_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if nothing can be read."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def write_object(path: Path, value: Mapping[str, Any], mode: int = 0o666) -> None:
    """Replace `path` by this value as JSON, as `write_atomically` does.  Raises OSError."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode(), mode)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, read as UTF-8 in every locale; a byte order mark is allowed.
    Raises OSError, ValueError."""
    return tomllib.loads(path.read_text("utf-8-sig"))


def lock(folder: Path) -> IO[bytes] | None:
    """Lock a folder against other processes until the returned file is closed, if only by a crash;
    None if another process holds it.  Raises OSError."""
    file = (folder / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def remove_unfinished(folder: Path) -> None:
    """Remove temporary files that crashes left below `folder`; nobody may be writing there."""
    for path in folder.rglob(".*"):
        if path.suffix[1:].isdecimal():
            path.unlink(missing_ok=True)


def checksum(data: bytes) -> str:
    """The first `DIGITS` hex digits of the data's SHA-256."""
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def write_checked(folder: Path, stem: str, data: bytes) -> Path:
    """Write "stem-<checksum>.safetensors"; returns its path.  Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-{checksum(data)}.safetensors"
    write_atomically(path, data)
    return path


def read_checked(path: Path) -> bytes | None:
    """The bytes of a file of `write_checked`; None if it cannot be read, or is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if path.stem.endswith(f"-{checksum(data)}") else None


def unwritable(folder: Path) -> str:
    """Why files cannot be written to a folder, which need not be there yet; empty if they can."""
    there = folder
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        # Permissions alone do not tell of /proc, or of root.
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there} cannot be written to ({error.strerror})"
