"""What a run left after each round: the model, what the server keeps, what every client remembers.

Read where a crash would leave it: in the checkpoint that was just written, in the clients' state
directory, and in the server's ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fl_server.checkpoint import Checkpoints

if TYPE_CHECKING:
    from tests.conftest import Result

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Moment:
    """One round's checkpoint (round 0: before the first), and the memories that it names."""

    round: int
    model: Arrays
    kept: Arrays
    facts: dict[str, Any]
    clients: dict[int, Arrays]
    """By partition, only those that took part: what lies in the state directory."""
    ledger: dict[int, Arrays]


@dataclass
class Trace:
    """All rounds of a run; arrays have time as their first axis, T + 1 with the beginning."""

    number: int
    """N."""
    moments: list[Moment] = field(default_factory=list)
    result: Result | None = None

    @property
    def cohorts(self) -> list[list[int]]:
        """Who took part in rounds 1, 2, ..."""
        return [row["cohort"] for row in self.result.history]

    @property
    def w(self) -> np.ndarray:
        """(T + 1, d), or (T + 1,) for the toy with its single parameter."""
        return _squeezed(np.stack([moment.model["params"] for moment in self.moments]))

    def kept(self, name: str) -> np.ndarray:
        """What the server keeps under this name, like `w`; zero before the first round."""
        zero = np.zeros_like(self.moments[0].model["params"])
        return _squeezed(np.stack([moment.kept.get(name, zero) for moment in self.moments]))

    def memory(self, name: str) -> np.ndarray:
        """What the clients' strategy rules remember, (T + 1, N, d) or (T + 1, N); zero before a
        client first took part.  What the server's ledger holds is asserted to be the same bits."""
        zero = np.zeros_like(self.moments[0].model["params"])
        rows = []
        for moment in self.moments:
            assert moment.clients.keys() == moment.ledger.keys()
            for i, own in moment.clients.items():
                copy = moment.ledger[i]
                assert set(own) == set(copy)
                for key, array in own.items():
                    assert array.dtype == copy[key].dtype == zero.dtype
                    assert array.tobytes() == copy[key].tobytes(), (moment.round, i, key)
            key = f"strategy.{name}"
            rows.append([moment.clients.get(i, {}).get(key, zero) for i in range(self.number)])
        return _squeezed(np.array(rows))

    def settled(self, value: float, within: float = 1e-8) -> int:
        """The round from which on `w` stays `within` a distance of `value`."""
        outside = np.flatnonzero(np.abs(self.w - value) >= within)
        assert outside[-1] + 1 < len(self.moments), f"{self.w[-1]} is not {value} yet"
        return self.moments[outside[-1] + 1].round


def follow(patch: pytest.MonkeyPatch, trace: Trace, state_dir: Path) -> None:
    """From now on every checkpoint that a run writes is added to `trace`."""
    write = Checkpoints.write

    def writing(self, checkpoint):
        write(self, checkpoint)
        counted = {int(name): r for name, r in checkpoint.facts["clients"].items()}
        places = {
            "clients": state_dir / checkpoint.facts["experiment"],
            "ledger": self.folder.parent / "ledger",
        }
        memories = {
            side: {i: memory for i, r in counted.items() if (memory := _version(place, i, r))}
            for side, place in places.items()
        }
        tensors = {
            owner: {name: vector.numpy().copy() for name, vector in vectors.items()}
            for owner, vectors in checkpoint.tensors.items()
        }
        trace.moments.append(
            Moment(
                checkpoint.round,
                tensors["model"],
                tensors["strategy"],
                checkpoint.facts,
                **memories,
            )
        )

    patch.setattr(Checkpoints, "write", writing)


def _version(place: Path, client: int, server_round: int) -> Arrays | None:
    """What a client remembers of the last round that counted, from one file."""
    found = list((place / f"{client:06d}").glob(f"{server_round:06d}-*.safetensors"))
    assert len(found) <= 1, found
    return load_file(found[0]) if found else None


def _squeezed(array: np.ndarray) -> np.ndarray:
    return array[..., 0] if array.shape[-1] == 1 else array
