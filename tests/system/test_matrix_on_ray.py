"""Methods together, on Flower's simulation: the same bits as in one process.

A run has a Ray session of its own; here all of them join one that the test starts.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from living import MARK, mark, wait_for

from fl_common import processes, sockets
from fl_server import flower_run

RAY = Path(sys.executable).with_name("ray")
CELLS = {
    "scaffold, man": ["strategy.name=scaffold", "regularizers=man"],
    "feddyn, fedalign": ["strategy.name=feddyn", "regularizers=fedalign", "model.name=cnn"],
    "feddc, moon": ["strategy.name=feddc", "regularizers=moon", "model.head=moon"],
    "fedspeed, mixup": ["strategy.name=fedspeed", "regularizers=mixup"],
    "fedsam, proximal": ["strategy.name=fedsam", "regularizers=proximal"],
    "fedasam, man, mixup": ["strategy.name=fedasam", "regularizers=man,mixup"],
    "mofedsam, stochastic depth": [
        "strategy.name=mofedsam",
        "regularizers=stochastic-depth",
        "model.name=resnet8",
    ],
    "fednova, gradaug": ["strategy.name=fednova", "regularizers=gradaug", "model.name=resnet8"],
}


def listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.fixture(scope="module")
def session():
    """The address of a Ray session that outlives the runs."""
    env, port = mark(), sockets.free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # for short socket paths
        command = [
            RAY,
            "start",
            "--head",
            "--block",
            f"--port={port}",
            "--node-ip-address=127.0.0.1",
        ]
        options = ["--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}"]
        with (Path(folder) / "log").open("w") as log:
            head = subprocess.Popen(
                [*command, *options, "--disable-usage-stats"],
                env={**os.environ, **env, "RAY_worker_niceness": "0"},
                stdout=log,
                stderr=log,
            )
        try:
            assert wait_for(lambda: listens(address), 120)
            yield address
        finally:
            assert not processes.end(processes.marked(MARK, env[MARK]), 5.0)
            head.wait(60)


@pytest.mark.long
@pytest.mark.parametrize("name", CELLS)
def test_a_cell_is_the_same_on_ray(name: str, runner, session, monkeypatch):
    monkeypatch.setitem(flower_run.ENVIRONMENT, "RAY_ADDRESS", session)
    settings = [
        "clients.number=4", "clients.per-round=2", "run.rounds=3", "train.device=cpu",
        "train.lr=0.02", *CELLS[name],
    ]  # fmt: skip
    here, there = (runner(*settings, f"engine.name={engine}") for engine in ("inprocess", "ray"))
    assert here.code == there.code == 0
    assert here.summary["model_sha256"] == there.summary["model_sha256"]
    assert here.history_less_times == there.history_less_times
