"""What a client keeps from one round to the next, and how it survives a crash.

In the state directory, when one is configured; else in the state that Flower holds for a node, in
memory.  The server says which version a round starts from (`fl_common.snapshots`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord

from fl_common import wire
from fl_common.snapshots import InContext, OnDisk, folder_of

if TYPE_CHECKING:
    from flwr.app import ConfigRecord, RecordDict

    from fl_common.layout import Flat
    from fl_common.snapshots import Snapshots


class MemoryLost(Exception):
    """The version that the server names is missing or damaged."""


@dataclass(frozen=True)
class Memory:
    """One client's versions, as one message to train sees them."""

    snapshots: Snapshots
    base: int
    """The round whose version this round starts from; 0: the client took part in none yet."""
    checkpoints: tuple[int, ...]
    """The rounds that the server may resume from."""
    given_back: Flat | None
    """The memory that the server sent because the client had lost it."""

    @classmethod
    def of(cls, state_dir: str, partition: int, content: RecordDict, state: RecordDict) -> Memory:
        settings: ConfigRecord = content[wire.CONFIG]
        record = content.get(wire.MEMORY)
        return cls(
            snapshots=OnDisk(folder_of(state_dir, partition, content))
            if state_dir
            else InContext(state, str(settings[wire.EXPERIMENT])),
            base=int(settings[wire.MEMORY_ROUND]),
            checkpoints=tuple(settings[wire.CHECKPOINTS]),
            given_back=wire.unpack(record) if isinstance(record, ArrayRecord) else None,
        )

    def load(self) -> Flat | None:
        """Vectors by "owner.name", read-only; None before the first round.  Raises MemoryLost."""
        if not self.base:
            return None
        found = self.snapshots.load(self.base)
        if found is None:
            found = self.given_back
        if found is None:
            raise MemoryLost
        return found

    def save(self, server_round: int, memory: Flat) -> None:
        self.snapshots.save(server_round, memory, self.base, self.checkpoints)
