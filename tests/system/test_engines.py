"""One definition of an algorithm on every engine: the same model, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BATCH = 8

NET = '''
import time
from torch import nn

class Net(nn.Module):
    """BatchNorm and dropout; training takes 1 ms a sample, so that large clients answer late."""

    def __init__(self, shape, classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(shape[0], 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
            nn.Flatten(), nn.Linear(8 * (shape[1] - 2) * (shape[2] - 2), classes),
        )

    def forward(self, x):
        if self.training:
            time.sleep(0.001 * len(x))
        return self.body(x)
'''


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    """A folder of random images in four classes, a network, and the environment that finds it."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 200), ("test", 10)):
        for label in range(4):
            place = tmp_path / "images" / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
                pixels[:, :, label % 3] |= 128
                Image.fromarray(pixels).save(place / f"{i:03}.png")
    (tmp_path / "probe_net.py").write_text(NET)
    return {**os.environ, "PYTHONPATH": "."}


def flatfed(tmp_path: Path, env: dict[str, str], engine: str, *settings: str) -> Path:
    """`flatfed run` in a process of its own; the results folder."""
    command = [
        Path(sys.executable).with_name("flatfed"),
        "run",
        f"engine.name={engine}",
        f"run.output-dir={tmp_path}",
        f"run.name={engine}",
        "run.pictures=false",
        *settings,
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / engine


def less_times(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").open()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "client_cpu_s")} for r in rows]


def test_in_process_and_ray_give_the_same_bits(tmp_path: Path, own: dict[str, str]):
    settings = [
        "data.source=folder",
        f"data.path={tmp_path / 'images'}",
        "data.augment=crop-flip",
        "data.partition=dirichlet",
        "data.alpha=0.3",
        "run.seed=18",
        "run.rounds=4",
        "clients.number=4",
        "clients.per-round=2",
        "model.name=probe_net:Net",
        f"train.batch-size={BATCH}",
        "train.momentum=0.9",
        "train.lr=0.02",
        "train.keep-optimizer=true",
        "train.device=cpu",
    ]
    alone = flatfed(tmp_path, own, "inprocess", *settings)
    ray = flatfed(tmp_path, own, "ray", *settings)

    # The case has power: unequal clients, a last batch of one sample, and rounds in which the
    # first partition is by far the larger one, so that its reply comes last of the two.
    sizes = json.loads((alone / "clients.json").read_text())["samples"]
    rows = less_times(alone)
    used = {partition for row in rows for partition in row["cohort"]}
    assert len(set(sizes)) == 4
    assert any(sizes[i] % BATCH == 1 for i in used), sizes
    assert any(sizes[a] > sizes[b] + 200 for a, b in (row["cohort"] for row in rows)), sizes

    first, second = (json.loads((f / "summary.json").read_text()) for f in (alone, ray))
    assert first["engine"] == "inprocess"
    assert second["engine"] == "ray"
    assert first["model_sha256"] == second["model_sha256"]
    assert rows == less_times(ray)
    assert (alone / "model.safetensors").read_bytes() == (ray / "model.safetensors").read_bytes()
    assert {first[k] for k in ("bytes_up", "bytes_down")} == {
        second[k] for k in ("bytes_up", "bytes_down")
    }


def test_flwr_run_tells_the_same_mistakes(tmp_path: Path):
    """Plain `flwr run`: the ServerApp's first act is the check that `flatfed run` makes."""
    from fl_common.config import ConfigError, resolve
    from fl_server.flower_run import run_simulation

    wrong = {
        "train.lr": "fast",
        "model.name": "resnt8",
        "data.cache-dir": "here",
        "run.output-dir": "relative",
    }
    try:
        resolve(wrong)
        raise AssertionError("these settings are wrong")
    except ConfigError as error:
        expected = error.errors
    assert len(expected) == 4
    printed: list[str] = []
    root = Path(__file__).resolve().parents[2]
    started = time.monotonic()
    status = run_simulation(
        root, wrong, clients=2, on_line=printed.append, env={"FLATFED_RESULTS": str(tmp_path)}
    )
    print(f"{time.monotonic() - started:.1f} s")
    assert status.status == "finished:failed"
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["error"].splitlines() == expected
    for line in expected:
        assert any(line in text for text in printed), line
