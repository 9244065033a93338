"""Checkpoints of a run: all that the next round depends on, the last two of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_common.files import read_checked, read_or_empty, write_checked
from fl_common.results import SUMMARY, checkpoints
from fl_server.exchange import Unresumable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fl_common.layout import Flat

KEPT = 2
FACTS = "facts"
"""Key of the JSON text in the file's metadata."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after some round."""

    round: int
    tensors: dict[str, Flat] = field(default_factory=dict)
    """Vectors by what they belong to: model, strategy, ..."""
    facts: dict[str, Any] = field(default_factory=dict)
    """All else, as JSON has it."""


class Checkpoints:
    """One safetensors file per checkpoint: "<round>-<checksum>.safetensors"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rounds: list[int] = []
        """The rounds of good checkpoints, ascending."""

    def write(self, checkpoint: Checkpoint) -> None:
        """Add one; once it is on the disk, all but the last two are removed.  Raises OSError."""
        from safetensors.torch import save

        flat = {
            f"{owner}/{name}": vector.contiguous()
            for owner, vectors in checkpoint.tensors.items()
            for name, vector in vectors.items()
        }
        data = save(flat, {FACTS: json.dumps(checkpoint.facts)})
        written = write_checked(self.folder, f"{checkpoint.round:06d}", data)
        earlier = [r for r in self.rounds if r < checkpoint.round]
        self.rounds = [*earlier, checkpoint.round][-KEPT:]
        for path in self._files():
            of = _round_of(path)
            if of not in self.rounds or (of == checkpoint.round and path != written):
                path.unlink(missing_ok=True)

    def newest(self, note: Callable[[str], None]) -> Checkpoint:
        """The newest good checkpoint; `note` tells of every one that is not.

        Raises Unresumable if there is none: never a silent fresh start.
        """
        good, damaged = {}, []
        for path in sorted(self._files(), reverse=True):
            data = read_checked(path)
            if data is None:
                damaged.append(path)
            else:
                good[_round_of(path)] = path
        for path in damaged:
            note(f"{path.name}: damaged (its checksum differs); not used")
        if not good:
            raise Unresumable(
                f"{self.folder}: no good checkpoint"
                + (f" ({len(damaged)} damaged)" if damaged else "")
                + "; this run cannot be resumed; start it again under another run.name"
            )
        self.rounds = sorted(good)[-KEPT:]
        return _read(good[self.rounds[-1]])

    def _files(self) -> list[Path]:
        return [p for p in self.folder.glob("*.safetensors") if re.match(r"\d{6,}-", p.name)]


def _read(path: Path) -> Checkpoint:
    from safetensors import safe_open

    tensors: dict[str, Flat] = {}
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[FACTS])
        for key in file.keys():  # noqa: SIM118  (it is no dictionary)
            owner, _, name = key.partition("/")
            tensors.setdefault(owner, {})[name] = file.get_tensor(key).clone()
    return Checkpoint(_round_of(path), tensors, facts)


def code_of(folder: Path) -> str:
    """The fingerprint of the code behind a run, from its newest checkpoint, or else its summary."""
    try:
        with max(checkpoints(folder)).open("rb") as file:  # the header, without the tensors
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return json.loads(header["__metadata__"][FACTS])["code"]
    except (OSError, ValueError, KeyError):
        return str(read_or_empty(folder / SUMMARY).get("code", "unknown"))


def _round_of(path: Path) -> int:
    return int(path.name.partition("-")[0])
