"""Models of 45 and 500 MB between real processes, and the memory that they take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from living import MARK, wait_for
from test_grpc import FLATFED, Place, federation, summary

from fl_common import processes

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

CLIENTS = 3
MODELS = 5
"""The most that the ServerApp may grow by, in models."""
NEEDED = {45: 4e9, 500: 14e9}
"""Memory of all processes together, by MB of the model [bytes]."""
WIDE = """
import torch

class Wide(torch.nn.Module):
    '''One linear layer of 10 x {width} weights, of which 10 x 64 see the image.'''

    def __init__(self, shape, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(classes, {width}))

    def forward(self, x):
        return torch.nn.functional.linear(x.flatten(1), self.weight[:, :64])
"""


def available() -> float:
    """Bytes that new processes could have."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1])


class Peaks:
    """The most that processes of each command had in memory [bytes], and all together at once."""

    def __init__(self, place: Place) -> None:
        self.mark, self.of, self.together = place.env[MARK], {}, 0

    def look(self) -> None:
        now = 0
        for pid in processes.marked(MARK, self.mark):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                status = Path(f"/proc/{pid}/status").read_text()
                most, present = (
                    1024 * int(re.search(rf"{key}:\s+(\d+)", status)[1])
                    for key in ("VmHWM", "VmRSS")
                )
            except (OSError, TypeError):  # it has ended
                continue
            name = next(
                (os.path.basename(w) for w in words if b"flwr-" in w or b"flower-" in w), b""
            )
            self.of[name] = max(most, self.of.get(name, 0))
            now += present
        self.together = max(self.together, now)


def play(place: Place, name: str, *settings: str) -> tuple[Peaks, list[dict]]:
    """A run that completes, watched."""
    command = [FLATFED, "run", "engine.name=grpc", f"run.output-dir={place.folder}"]
    fixed = [f"clients.number={CLIENTS}", "run.rounds=2", "train.device=cpu", "data.partition=iid"]
    log, peaks = place.folder / f"{name}.log", Peaks(place)
    with log.open("wb") as out:
        run = subprocess.Popen(
            [*command, f"run.name={name}", *fixed, "data.max-samples=4", *settings],
            cwd=place.folder, env=place.env, stdout=out, stderr=out,
        )  # fmt: skip

    def over() -> bool:
        peaks.look()
        return run.poll() is not None

    try:
        assert wait_for(over, 1500), log.read_text()
    finally:
        run.kill()
    assert run.returncode == 0, log.read_text()
    rows = [json.loads(line) for line in (place.folder / name / "history.jsonl").open()]
    return peaks, rows


@pytest.mark.parametrize("megabytes", [45, 500])
def test_a_large_model_passes(tmp_path: Path, megabytes: int):
    if available() < NEEDED[megabytes]:
        pytest.skip(f"less than {NEEDED[megabytes] / 1e9:.0f} GB of memory is free")
    size = megabytes * 1_000_000
    for place in federation(tmp_path, "--clients", str(CLIENTS), "--insecure"):
        (place.modules / "wide.py").write_text(WIDE.format(width=size // 40))
        few, _ = play(place, "few", "model.name=mlp")  # what the processes take in any case
        many, rows = play(place, "many", "model.name=wide:Wide")
        assert [row["replies"] for row in rows] == [[0, 1, 2]] * 2
        assert {row["bytes_up"] for row in rows} == {CLIENTS * size}
        assert summary(place.folder / "many")["status"] == "completed"
        grown = {
            name.decode(): (many.of[name] - few.of[name]) / size
            for name in (b"flwr-serverapp", b"flower-superlink")
        }
        print(f"{megabytes} MB:", {name: f"{x:.1f} models" for name, x in grown.items()})
        print(f"all processes at once: {many.together / 1e9:.1f} GB")
        assert grown["flwr-serverapp"] <= MODELS
