"""Who holds which version of what, so that only what is missing goes down.

A client keeps the arrays it was last sent and names them by version; the server knows, from the
replies it accepted, what each client keeps, and leaves out of a message what is there already.  A
client that lacks something of a message says so and is asked once more, with all of it.

A version is a digest of the contents.  Equal versions are therefore equal bytes, whatever was
lost, repeated, late or rolled back: the server's picture of a client may be old, which costs bytes
or one more message, but no client starts from another model than the server's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from safetensors.torch import load, save

from fl_common import wire
from fl_common.files import read_checked, remove_unfinished, write_checked
from fl_common.layout import PARAMS
from fl_common.snapshots import folder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from fl_common.deferred import torch
    from fl_common.groups import Groups
    from fl_common.layout import Flat

VERSIONS = "versions"
"""The record of a message that names the version of every array of the model it refers to."""
CACHE = "cache"
"""Where a client keeps arrays: a record of Flower's state, or a folder of the state directory."""


def version_of(tensor: torch.Tensor) -> int:
    """The version of a tensor: 63 bits of the BLAKE2b digest of its contents."""
    array = tensor.contiguous().cpu().numpy()
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=8)
    digest.update(array.data if array.ndim else array.tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


@dataclass
class Holdings:
    """The server's side: what is current, and what each client has."""

    groups: Groups
    tracked: bool
    """Whether messages may leave arrays out.  If not, each is whole, and clients keep nothing."""
    held: dict[int, dict[str, int]] = field(default_factory=dict)
    """What each client has, by array: the versions in the last message that it answered well."""
    current: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    """Version and contents, by array, of the model that the next messages refer to."""

    def state(self) -> dict[str, dict[str, str]]:
        """For the checkpoint, as JSON keeps it exactly."""
        return {
            str(name): {array: str(version) for array, version in arrays.items()}
            for name, arrays in sorted(self.held.items())
        }

    def load_state(self, state: Mapping[str, Mapping[str, str]]) -> None:
        self.held = {
            int(name): {array: int(version) for array, version in arrays.items()}
            for name, arrays in state.items()
        }

    def offer(self, arrays: Flat) -> None:
        """Set the model that the next messages refer to.  A part that did not change stays the same
        tensor, which all clients of this process share; a new one is copied out of its vector."""
        parts = {**self.groups.split(arrays[PARAMS]), **arrays}
        if PARAMS not in self.groups.members:
            del parts[PARAMS]
        known, self.current = self.current, {}
        for name, tensor in parts.items():
            if not self.tracked:
                self.current[name] = (0, tensor)
                continue
            version = version_of(tensor)
            unchanged = known.get(name, (None,))[0] == version
            self.current[name] = known[name] if unchanged else (version, tensor.clone())

    def rest(self) -> None:
        """Called after the last reply: let go of what no later message refers to."""
        if not self.tracked:
            self.current = {}

    def content(self, name: int, content: RecordDict, *, whole: bool = False) -> RecordDict:
        """A message's content with only the arrays that client `name` lacks, or if `whole`, all."""
        held = {} if whole else self.held.get(name, {})
        missing = {a: tensor for a, (v, tensor) in self.current.items() if held.get(a) != v}
        made = RecordDict({**content, wire.ARRAYS: wire.pack(missing)})
        if self.tracked:
            made[VERSIONS] = MetricRecord({a: v for a, (v, _) in self.current.items()})
        return made

    def withholds(self, content: RecordDict) -> bool:
        """Whether a message leaves out arrays that it refers to."""
        return VERSIONS in content and set(content[wire.ARRAYS]) != set(content[VERSIONS])

    def answered(self, name: int) -> None:
        """The client's reply was good: it has all that the message referred to."""
        if self.tracked:
            self.held[name] = {array: version for array, (version, _) in self.current.items()}


class Incomplete(Exception):
    """Arrays that a message leaves out are not here."""

    def __init__(self, arrays: int) -> None:
        self.arrays = arrays
        super().__init__(f"{arrays} arrays of the model are not here")


@dataclass(frozen=True)
class Cache:
    """A client's side: the arrays of the last message, by version."""

    load: Callable[[int], torch.Tensor | None]
    store: Callable[[dict[int, torch.Tensor]], None]
    """Keep these arrays alone."""

    @classmethod
    def of(cls, state_dir: str, partition: int, content: RecordDict, state: RecordDict) -> Cache:
        """On the disk of the node if it has a state directory, else in Flower's state of it."""
        if VERSIONS not in content:
            return cls(lambda v: None, lambda arrays: None)
        if state_dir:
            folder = folder_of(state_dir, partition, content) / CACHE
            return cls(lambda v: _read(folder, v), lambda arrays: _write(folder, arrays))
        return cls(lambda v: _recall(state, v), lambda arrays: _remember(state, arrays))

    def complete(self, content: RecordDict) -> Flat:
        """All arrays that the message refers to, read-only.  Raises Incomplete."""
        arrays = wire.vectors(content)
        versions = content.get(VERSIONS, {})
        found = {name: arrays.get(name) for name in versions}
        for name, version in versions.items():
            if found[name] is None:
                found[name] = self.load(version)
        if lacking := sum(tensor is None for tensor in found.values()):
            raise Incomplete(lacking)
        return {**arrays, **found}

    def keep(self, content: RecordDict, arrays: Flat) -> None:
        """Called before the message is worked on, so that a repeat of it finds all it needs."""
        versions = content.get(VERSIONS, {})
        self.store({version: arrays[name] for name, version in versions.items()})


def _stem(version: int) -> str:
    return f"{version:016x}"


def _read(folder: Path, version: int) -> torch.Tensor | None:
    for path in folder.glob(f"{_stem(version)}-*.safetensors"):
        data = read_checked(path)
        if data is not None:
            return load(data)[CACHE]
        path.unlink(missing_ok=True)  # damaged; it will be written anew
    return None


def _write(folder: Path, arrays: dict[int, torch.Tensor]) -> None:
    """A file per array, so that only those that are new are written."""
    if folder.exists():
        remove_unfinished(folder)
    kept = {_stem(version) for version in arrays}
    here = set()
    for path in folder.glob("*.safetensors"):
        stem = path.stem.partition("-")[0]
        if stem in kept:
            here.add(stem)
        else:
            path.unlink(missing_ok=True)
    for version, tensor in arrays.items():
        if _stem(version) not in here:
            write_checked(folder, _stem(version), save({CACHE: tensor.contiguous()}))


def _recall(state: RecordDict, version: int) -> torch.Tensor | None:
    record = state.get(CACHE)
    if not isinstance(record, ArrayRecord) or _stem(version) not in record:
        return None
    return wire.unpack(ArrayRecord({CACHE: record[_stem(version)]}))[CACHE]


def _remember(state: RecordDict, arrays: dict[int, torch.Tensor]) -> None:
    state[CACHE] = wire.pack({_stem(version): tensor for version, tensor in arrays.items()})
