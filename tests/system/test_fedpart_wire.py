"""What FedPart saves, counted in the TCP connection of a real node."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from test_grpc import FLATFED, Place, federation, summary

DATA = """
import numpy as np

def few(path, seed):
    made = np.random.default_rng(seed)
    x = made.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    y = np.arange(40) % 10
    return (x, y), (x[:10], y[:10]), [str(k) for k in range(10)]
"""
MODEL = 4 * (1_235_274 + 2_688) + 8 * 9  # resnet8: parameters, statistics, counters [bytes]
CYCLE = 5 + 2 * 10  # rounds


class CountingProxy:
    """Passes a node's connections on to the SuperLink and counts their bytes."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.up, self.down = target, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                node = self.listener.accept()[0]
            except OSError:
                return
            link = socket.create_connection(self.target)
            for one, other, way in ((node, link, "up"), (link, node, "down")):
                threading.Thread(target=self._pump, args=(one, other, way), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket, way: str) -> None:
        try:
            while data := one.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                other.sendall(data)
        except OSError:
            pass
        finally:
            one.close()
            other.close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory):
    """A federation of one node, and a second one behind a proxy."""
    for place in federation(tmp_path_factory.mktemp("watched"), "--clients", "1", "--insecure"):
        (place.modules / "few.py").write_text(DATA)
        state = json.loads((place.folder / "home" / "up" / "state.json").read_text())
        host, port = state["fleet"].rsplit(":", 1)
        proxy = CountingProxy((host, int(port)))
        command = [FLATFED, "node", "--partition", "1", "--superlink", proxy.address, "--insecure"]
        with (place.folder / "node.log").open("wb") as log:
            node = subprocess.Popen(
                command, cwd=place.folder, env=place.env, stdout=log, stderr=log
            )
            try:
                yield place, proxy
            finally:
                node.terminate()
                node.wait(60)
                proxy.listener.close()


def play(watched: tuple[Place, CountingProxy], name: str, *settings: str) -> tuple[int, int, Path]:
    """Bytes up and down in the proxy during a run, and its folder."""
    place, proxy = watched
    up, down = proxy.up, proxy.down
    folder = place.run(
        name,
        "grpc",
        "strategy.name=fedpart",
        "data.source=few:few",
        "data.partition=iid",
        "data.augment=none",
        "model.name=resnet8",
        "clients.number=2",
        "train.device=cpu",
        "train.batch-size=20",
        "eval.every=1000",
        *settings,
    )
    return proxy.up - up, proxy.down - down, folder


@pytest.mark.long
def test_bytes_of_full_and_partial_updates(watched: tuple[Place, CountingProxy]):
    # Flower sends its bundle of our code once a run: no part of any message.
    bundle = play(watched, "short", "run.rounds=1")[1] - MODEL
    assert bundle < 1e6
    full = play(watched, "full", f"run.rounds={CYCLE}", f"fedpart.warm-up={CYCLE}")
    one = play(watched, "one", f"run.rounds={CYCLE}")
    two = play(watched, "two", f"run.rounds={2 * CYCLE}")
    later = two[0] - one[0], two[1] - one[1]

    assert one[0] / full[0] <= 0.285
    assert (one[1] - bundle) / (full[1] - bundle) <= 0.325
    assert later[0] / full[0] <= 0.285
    assert later[1] / (full[1] - bundle) <= 0.285

    for up, down, folder in (full, one, two):
        rows = [json.loads(line) for line in (folder / "history.jsonl").open()]
        assert all(row["replies"] == [0, 1] for row in rows)
        assert "memory_given_back" not in summary(folder)
        # Both clients send and get the same; besides a round's message there are the roll call's.
        # At most 12 arrays a message: ten groups, statistics, counters.
        slack = (len(rows) + 2) * (16_384 + 12 * 4_096)
        for way, counted in (("bytes_up", up), ("bytes_down", down - bundle)):
            logical = sum(row[way] for row in rows) / 2
            assert logical <= counted <= 1.01 * logical + slack
    rows = [json.loads(line) for line in (full[2] / "history.jsonl").open()]
    assert {row["bytes_up"] for row in rows} == {2 * MODEL}
    print("up, down [MB]:", *(f"{u / 1e6:.2f} {d / 1e6:.2f}" for u, d, _ in (full, one, two)))
    print(f"bundle [MB]: {bundle / 1e6:.2f}")


@pytest.mark.long
def test_without_versions_everything_comes_again(watched: tuple[Place, CountingProxy]):
    rounds = ("run.rounds=6", "fedpart.warm-up=1", "fedpart.rounds-per-group=1")
    slim = play(watched, "slim", *rounds)
    full = play(watched, "whole", "sync.mode=full", *rounds)
    assert summary(slim[2])["model_sha256"] == summary(full[2])["model_sha256"]
    assert full[1] > 5.5 * MODEL > slim[1]
