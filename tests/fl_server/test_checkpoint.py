"""Checkpoints are good or not used: the last two are kept, and damage anywhere is seen."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest
import torch

from fl_server.checkpoint import Checkpoint, Checkpoints
from fl_server.exchange import RunFailed

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def checkpoint(server_round: int) -> Checkpoint:
    return Checkpoint(
        round=server_round,
        tensors={
            "model": {
                "params": torch.tensor([0.1, -0.0, float("nan")]) * server_round,
                "counters": torch.tensor([server_round, 2**53 + 1]),
            },
            "strategy": {"c": torch.linspace(0, 1, 7, dtype=torch.bfloat16)},
            "ledger": {"params": torch.full((3,), 1 / 3, dtype=torch.float64)},
        },
        facts={"clients": {"0": server_round}, "wall_s": 0.1 + 0.2, "code": "ä"},
    )


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Equal in every bit."""

    def bits(c: Checkpoint):
        return {
            (owner, name): (v.dtype, v.shape, v.view(torch.uint8).tolist())
            for owner, vectors in c.tensors.items()
            for name, v in vectors.items()
        }

    return (one.round, one.facts, bits(one)) == (other.round, other.facts, bits(other))


class Told(list):
    """Collects notes."""

    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder after checkpoints of rounds 4, 5 and 6."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for server_round in (4, 5, 6):
        checkpoints.write(checkpoint(server_round))
    return checkpoints.folder


def file_of(folder: Path, server_round: int) -> Path:
    (path,) = folder.glob(f"{server_round:06d}-*")
    return path


def test_what_was_written_is_read(three: Path):
    told = Told()
    checkpoints = Checkpoints(three)
    assert same(checkpoints.newest(told), checkpoint(6))
    assert told == []
    assert checkpoints.rounds == [5, 6]


def test_the_last_two_are_kept(three: Path):
    assert sorted(path.name[:6] for path in three.iterdir()) == ["000005", "000006"]


def test_the_rounds_of_the_good_ones_are_told_while_writing(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    told = [checkpoints.rounds]
    for server_round in (0, 10, 20, 20):  # Ctrl-C may come after a write, which is then repeated
        checkpoints.write(checkpoint(server_round))
        told.append(checkpoints.rounds)
    assert told == [[], [0], [0, 10], [10, 20], [10, 20]]


def test_a_flipped_bit_anywhere_is_seen(three: Path):
    """In every byte of the file: the header's length, names and metadata, the data."""
    path = file_of(three, 6)
    data = path.read_bytes()
    assert 300 < len(data) < 3000
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 1 << i % 8
        path.write_bytes(damaged)
        told = Told()
        assert Checkpoints(three).newest(told).round == 5
        assert told == [f"{path.name}: damaged (its checksum differs); not used"]


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_not_used(three: Path, share: float):
    path = file_of(three, 6)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    told = Told()
    assert same(Checkpoints(three).newest(told), checkpoint(5))
    assert len(told) == 1


def test_a_checkpoint_of_another_round_under_this_name_is_not_used(three: Path):
    """The name's checksum is that of the file's own data."""
    file_of(three, 6).write_bytes(file_of(three, 5).read_bytes())
    assert Checkpoints(three).newest(Told()).round == 5


def test_no_good_checkpoint_is_an_error(three: Path):
    for path in three.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    told = Told()
    with pytest.raises(RunFailed, match=r"no good checkpoint \(2 damaged\); this run cannot be"):
        Checkpoints(three).newest(told)
    assert len(told) == 2
    with pytest.raises(RunFailed, match="no good checkpoint; this run cannot be resumed"):
        Checkpoints(three / "nowhere").newest(told)


def test_after_a_damaged_one_the_run_goes_on(three: Path):
    file_of(three, 6).write_bytes(b"")
    checkpoints = Checkpoints(three)
    checkpoints.newest(Told())
    checkpoints.write(checkpoint(6))
    assert same(Checkpoints(three).newest(Told()), checkpoint(6))
    assert len(list(three.iterdir())) == 2
    checkpoints.write(checkpoint(7))
    assert checkpoints.rounds == [6, 7]


def test_what_a_crash_left_beside_them_is_no_harm(three: Path):
    """A temporary file; and one checkpoint more, if the crash came before the oldest went."""
    (three / ".000007-00ff.safetensors.4242").write_bytes(b"half of a checkp")
    (three / "notes.txt").write_text("mine")
    third = file_of(three, 5)
    copy = third.read_bytes()
    checkpoints = Checkpoints(three)
    checkpoints.newest(Told())
    checkpoints.write(checkpoint(7))
    third.write_bytes(copy)
    again = Checkpoints(three)
    assert again.newest(Told()).round == 7
    assert again.rounds == [6, 7]
    again.write(checkpoint(8))
    assert sorted(p.name[:6] for p in three.glob("*.safetensors")) == ["000007", "000008"]
    assert (three / "notes.txt").exists()


def half_written(self: Path, mode: str = "r", *rest, **more):
    class Full(io.FileIO):
        def write(self, data) -> int:
            if self.tell():
                raise FULL
            return super().write(bytes(data)[:100])

    return io.BufferedWriter(Full(self, "w")) if mode == "wb" else open(self, mode)


def raising(*args, **kwargs) -> None:
    raise FULL


@pytest.mark.parametrize(
    "broken",
    [(Path, "open", half_written), (os, "fsync", raising), (Path, "replace", raising)],
    ids=["write", "fsync", "rename"],
)
def test_a_full_disk_leaves_the_old_ones(
    three: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple
):
    before = {path.name: path.read_bytes() for path in three.iterdir()}
    checkpoints = Checkpoints(three)
    checkpoints.newest(Told())
    with monkeypatch.context() as patch:
        patch.setattr(*broken)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.write(checkpoint(7))
    assert {path.name: path.read_bytes() for path in three.iterdir()} == before
    assert checkpoints.rounds == [5, 6]  # clients still keep what it needs
    checkpoints.write(checkpoint(7))
    assert checkpoints.rounds == [6, 7]
