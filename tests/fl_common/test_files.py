"""A file is whole or not there, whatever fails on the way."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_common.files import (
    read_checked,
    read_or_empty,
    read_toml,
    remove_unfinished,
    write_atomically,
    write_checked,
    write_object,
)

NEW = bytes(range(256)) * 40
FULL = errno.ENOSPC, os.strerror(errno.ENOSPC)


class FullDisk(io.FileIO):
    """Takes half of the first write, and nothing more."""

    taken = False

    def write(self, data) -> int:
        if self.taken:
            raise OSError(*FULL)
        self.taken = True
        return super().write(bytes(data)[: len(data) // 2])


def opening(self: Path, mode: str = "r", *rest, **more):
    return io.BufferedWriter(FullDisk(self, "w")) if mode == "wb" else open(self, mode)


def raising(*args, **kwargs) -> None:
    raise OSError(*FULL)


FAILURES = {
    "open": (Path, "open", raising),
    "write": (Path, "open", opening),
    "fsync": (os, "fsync", raising),
    "rename": (Path, "replace", raising),
}


@pytest.mark.parametrize("old", [b"what was there", None])
@pytest.mark.parametrize("where", FAILURES)
def test_a_write_that_fails_leaves_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, old: bytes | None
):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[where])
        with pytest.raises(OSError, match="No space left") as caught:
            write_atomically(path, NEW)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert os.listdir(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


def test_the_name_is_given_only_to_data_that_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a power cut after the rename could leave the name with no data; and the folder is
    synced after it, else the name could be lost."""
    done: list[tuple[str, object]] = []

    def recorded(name: str, function: Callable) -> Callable:
        def call(first, *rest):
            what = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else str(first)
            size = Path(what).stat().st_size if Path(what).is_file() else "folder"
            done.append((name, size))
            return function(first, *rest)

        return call

    monkeypatch.setattr(os, "fsync", recorded("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", recorded("replace", Path.replace))
    write_atomically(tmp_path / "file", NEW)
    assert done == [("fsync", len(NEW)), ("replace", len(NEW)), ("fsync", "folder")]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch):
    """At the moment of every system call that the write makes."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []
    for owner, name in ((os, "fsync"), (Path, "replace")):
        function = getattr(owner, name)

        def call(*args, function=function):
            seen.append(path.read_bytes())
            result = function(*args)
            seen.append(path.read_bytes())
            return result

        monkeypatch.setattr(owner, name, call)
    write_atomically(path, NEW)
    assert seen == [b"old", b"old", b"old", NEW, NEW, NEW]


def test_a_checked_file_is_named_by_what_it_holds(tmp_path: Path):
    path = write_checked(tmp_path / "made" / "here", "7-3", NEW)
    digest = hashlib.sha256(NEW).hexdigest()
    assert path.name == f"7-3-{digest[:32]}.safetensors"
    assert read_checked(path) == NEW


def test_damage_anywhere_is_seen(tmp_path: Path):
    """Every single bit of a small file, every truncation, and more at its end."""
    data = NEW[:40]
    path = write_checked(tmp_path, "1", data)
    for i in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        assert read_checked(path) is None
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert read_checked(path) is None
    path.write_bytes(data + b"\0")
    assert read_checked(path) is None
    path.write_bytes(data)
    assert read_checked(path) == data


def test_a_file_that_cannot_be_read_is_no_file(tmp_path: Path):
    assert read_checked(tmp_path / "absent-0.safetensors") is None
    (tmp_path / "folder-0.safetensors").mkdir()
    assert read_checked(tmp_path / "folder-0.safetensors") is None
    # A right checksum under a name that only looks like one.
    path = write_checked(tmp_path, "1", NEW)
    path = path.rename(path.with_name("000001.safetensors"))
    assert read_checked(path) is None


def test_what_a_crash_left_of_a_write_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "checkpoints"
    good = write_checked(folder, "1", NEW)
    (tmp_path / ".lock").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok: None)  # the process is gone
        patch.setattr(os, "fsync", raising)
        with pytest.raises(OSError, match="No space"):
            write_checked(folder, "2", NEW)
    assert len(os.listdir(folder)) == 2
    remove_unfinished(tmp_path)
    assert os.listdir(folder) == [good.name]
    assert (tmp_path / ".lock").exists()


def test_a_toml_file_may_begin_with_an_editors_mark(tmp_path: Path):
    path = tmp_path / "my.toml"
    path.write_text('[run]\nname = "Größe"\n', encoding="utf-8-sig")
    assert read_toml(path) == {"run": {"name": "Größe"}}


def test_what_is_no_object_is_read_as_an_empty_one(tmp_path: Path):
    path = tmp_path / "told.json"
    assert read_or_empty(path) == {}
    for text in ("", "[1]", '{"a": 1', "\xff"):
        path.write_text(text, "latin-1")
        assert read_or_empty(path) == {}
    write_object(path, {"a": [1, "ä"]})
    assert read_or_empty(path) == {"a": [1, "ä"]}
    assert path.read_bytes().endswith(b"}\n")
