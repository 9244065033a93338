"""What clients remember, as it lies on a disk, and whether two runs left the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load

from fl_common.files import read_checked

TIMES = ("seconds", "client_cpu_s")

Newest = dict[int, tuple[int, str]]
"""By partition: the round of the newest version, and the digest of its arrays."""


def memories(place: Path) -> Newest:
    """The newest memory of every client in an experiment's folder, or in a server's ledger.

    Each file is held against the checksum in its name.
    """
    found: Newest = {}
    for folder in sorted(place.iterdir()) if place.exists() else []:
        path = max(folder.glob("*.safetensors"), key=lambda path: path.name)
        data = read_checked(path)
        assert data is not None, f"{path} is damaged"
        digest = hashlib.sha256()
        for name, array in sorted(load(data).items()):
            digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode() + array.tobytes())
        found[int(folder.name)] = int(path.name[:6]), digest.hexdigest()
    return found


def in_state_dir(state_dir: Path) -> Newest:
    """Of the one experiment that used this state directory."""
    (experiment,) = state_dir.iterdir()
    return memories(experiment)


def history(folder: Path) -> list[dict[str, Any]]:
    """Less the times."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").open()]
    return [{key: v for key, v in row.items() if key not in TIMES} for row in rows]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def reached(folder: Path) -> dict[str, Any]:
    """All that a crash must not change in the results of a completed run."""
    told = summary(folder)
    assert told["status"] == "completed"
    assert not leftovers(folder)
    return {
        "model": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "model_sha256": told["model_sha256"],
        "history": history(folder),
        "ledger": memories(folder / "ledger"),
        **{key: told[key] for key in ("rounds", "accuracy", "loss", "bytes_up", "bytes_down")},
    }


def leftovers(folder: Path) -> list[Path]:
    """Temporary files."""
    return [path for path in folder.rglob(".*") if path.name != ".lock"]
