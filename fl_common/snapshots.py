"""A client's memory from round to round, in versions, so that either side may crash.

A version is named by the round that made it.  The server says which version a round starts from,
its base: the one of the last reply that it accepted.  What a client remembers of a round whose
reply was lost, late or refused is thereby forgotten, and a server that starts again from an older
checkpoint finds the version of that time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flwr.app import ArrayRecord, RecordDict
from safetensors.torch import load, save

from fl_common import wire
from fl_common.failures import harmless
from fl_common.files import read_checked, remove_unfinished, write_checked

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fl_common.layout import Flat


class Snapshots(Protocol):
    """The versions of one client."""

    def load(self, server_round: int) -> Flat | None:
        """The version that this round made; None if it is missing or damaged."""

    def save(self, server_round: int, memory: Flat, base: int, checkpoints: Sequence[int]) -> None:
        """Add a version that was made from `base`; remove those that are not `needed`."""


def needed(
    versions: Iterable[int], server_round: int, base: int, checkpoints: Sequence[int]
) -> set[int]:
    """The newest version, its base, and what was the newest at each of the server's checkpoints.

    A version between base and newest belongs to a reply that did not count.
    """
    counted = [made for made in versions if made <= base]
    kept = {server_round, base}
    for checkpoint in checkpoints:
        kept |= {max((made for made in counted if made <= checkpoint), default=base)}
    return kept


def folder_of(state_dir: str, partition: int, content: RecordDict) -> Path:
    """Where a client keeps what it remembers of the run that a message belongs to.

    The run's name comes from the server.  Raises ValueError for one that could lead out of
    `state_dir`.
    """
    experiment = str(content[wire.CONFIG][wire.EXPERIMENT])
    if not experiment.isalnum():
        raise ValueError(f"{wire.EXPERIMENT} = {harmless(experiment)}: is not letters and digits")
    return Path(state_dir) / experiment / f"{partition:06d}"


@dataclass(frozen=True)
class OnDisk:
    """One file per version: "<round>-<checksum>.safetensors"."""

    folder: Path

    def load(self, server_round: int) -> Flat | None:
        for path in self.folder.glob(f"{server_round:06d}-*.safetensors"):
            data = read_checked(path)
            if data is not None:
                return load(data)
        return None

    def save(self, server_round: int, memory: Flat, base: int, checkpoints: Sequence[int]) -> None:
        if self.folder.exists():
            remove_unfinished(self.folder)
        data = save({name: vector.contiguous() for name, vector in memory.items()})
        written = write_checked(self.folder, f"{server_round:06d}", data)
        found = {path: _round(path.stem) for path in self.folder.glob("*.safetensors")}
        kept = needed(found.values(), server_round, base, checkpoints)
        for path, made in found.items():
            if made not in kept or (made == server_round and path != written):
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class InContext:
    """One record per version in the state that Flower keeps of a node, in memory."""

    state: RecordDict
    experiment: str

    def load(self, server_round: int) -> Flat | None:
        record = self.state.get(f"{self._prefix}{server_round:06d}")
        return wire.unpack(record) if isinstance(record, ArrayRecord) else None

    def save(self, server_round: int, memory: Flat, base: int, checkpoints: Sequence[int]) -> None:
        self.state[f"{self._prefix}{server_round:06d}"] = wire.pack(memory)
        mine = {key: _round(key.removeprefix(self._prefix)) for key in self._keys(self._prefix)}
        kept = needed(mine.values(), server_round, base, checkpoints)
        for key in self._keys("memory-"):  # another experiment's are not needed any more
            if mine.get(key) not in kept:
                del self.state[key]

    @property
    def _prefix(self) -> str:
        return f"memory-{self.experiment}-"

    def _keys(self, prefix: str) -> list[str]:
        return [key for key in self.state if key.startswith(prefix)]


def _round(stem: str) -> int:
    return int(stem.partition("-")[0])
