"""Arrays that are made once, stored, and memory-mapped by every process afterwards.

An entry is a folder of .npy files and a meta.json with their shapes, dtypes, sizes and sha256.
It is written beside its place and renamed into it, so that it is there as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fl_common.data.errors import DataError
from fl_common.files import absolute_path, sync_folder

_log = logging.getLogger(__name__)
_META = "meta.json"
_DAMAGE = (OSError, ValueError, KeyError, TypeError)


def default_cache_dir() -> Path:
    """`$FLATFED_CACHE`, or `~/.cache/flatfed`."""
    return absolute_path(os.environ.get("FLATFED_CACHE") or "~/.cache/flatfed")


@dataclass(frozen=True, eq=False)
class Entry:
    """Stored arrays by name, the sha256 of each, and the JSON facts that were stored with them.

    The arrays are mapped copy-on-write: processes share their pages, and a write stays private.
    """

    arrays: dict[str, np.ndarray]
    sha256: dict[str, str]
    facts: dict[str, Any]


class Writer:
    """Writes the arrays of a new entry, block by block.

    scratch: a folder for temporary files, removed when the entry is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir(parents=True)
        self._folder = folder
        self._meta: dict[str, dict[str, Any]] = {}

    def add(self, name: str, blocks: Iterable[np.ndarray], n: int) -> None:
        """Store the concatenation of `blocks` along their first axis; it must have length `n`."""
        digest, rows, shape = hashlib.sha256(), 0, ()
        with (self._folder / f"{name}.npy").open("wb") as file:
            for block in map(np.ascontiguousarray, blocks):
                if not shape:
                    dtype, shape = np.lib.format.dtype_to_descr(block.dtype), (n, *block.shape[1:])
                    header = {"descr": dtype, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(block.data)
                digest.update(block.data)
                rows += len(block)
            if rows != n:
                raise ValueError(f"{name} has {rows} rows, {n} were announced")
            size = file.tell()
            _sync(file)
        self._meta[name] = {
            "shape": shape,
            "dtype": dtype,
            "bytes": size,
            "sha256": digest.hexdigest(),
        }

    def close(self, facts: dict[str, Any]) -> None:
        shutil.rmtree(self.scratch)
        with (self._folder / _META).open("w") as file:
            json.dump({"arrays": self._meta, "facts": facts}, file, indent=1)
            _sync(file)
        sync_folder(self._folder)


def fetch(root: Path, name: str, make: Callable[[Writer], dict[str, Any]]) -> Entry:
    """The entry `root/name`; where there is none, or a damaged one, `make` writes it.

    `make` adds the arrays and returns the facts. Of several processes that ask at once, one
    makes the entry while the others wait. Raises DataError if the cache cannot be written.
    """
    folder = root / name
    try:
        return _open(folder)
    except _DAMAGE:
        pass
    from filelock import FileLock

    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            try:
                return _open(folder)
            except _DAMAGE as damage:
                if folder.exists():
                    _log.warning("cache entry %s is damaged and is made again: %s", folder, damage)
            _make(folder, make)
        return _open(folder)
    except OSError as error:
        raise DataError(
            f"cannot make the cache entry {folder}: {error}; check permissions and free space, or "
            "set data.cache-dir or FLATFED_CACHE to another folder"
        ) from error


def _open(folder: Path) -> Entry:
    """Raises one of _DAMAGE for what is not there or not whole."""
    meta = json.loads((folder / _META).read_text())
    arrays = {}
    for name, expected in meta["arrays"].items():
        file = folder / f"{name}.npy"
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"{file.name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
            )
        array = np.load(file, mmap_mode="c", allow_pickle=False)
        if [*array.shape] != expected["shape"] or array.dtype.str != expected["dtype"]:
            raise ValueError(f"{file.name} is {array.shape} {array.dtype}, expected {expected}")
        arrays[name] = array.view(np.ndarray)
    digests = {name: expected["sha256"] for name, expected in meta["arrays"].items()}
    return Entry(arrays, digests, meta["facts"])


def _make(folder: Path, make: Callable[[Writer], dict[str, Any]]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        writer = Writer(partial)
        writer.close(make(writer))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
