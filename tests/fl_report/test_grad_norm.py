"""The jump of the gradient's norm at aggregations."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from fl_report.compare import Run, read
from fl_report.grad_norm import jumps, split
from fl_server.cli import main

SMALL = ("clients.number=4", "run.rounds=5", "eval.grad-norm=true", "eval.every=5")


def rows(*norms: dict[str, list[float]]) -> Run:
    return Run("x", {}, [{"round": 1 + t, "grad_norm": n} for t, n in enumerate(norms)])


def test_jumps_by_hand():
    both = {"all": [3.0, 5.0], "a": [2.0, 4.0], "b": [1.0, 3.0]}
    later = {"all": [10.0, 1.0], "a": [6.0, 1.0], "b": [2.0, 1.0]}
    partial = {"all": [7.0, 8.0], "a": [7.0, 8.0]}
    run = rows(both, later, partial, {"all": [4.0, 2.0], "a": [4.0, 2.0]})
    assert jumps(run, "all") == [10 / 5, 4 / 8]  # not from a full round to a partial one
    assert jumps(run, "a") == [6 / 4, 4 / 8]
    assert jumps(run, "b") == [2 / 3]
    full, some = split(run)
    assert (jumps(full, "all"), jumps(some, "all")) == ([2.0], [0.5])
    # Of nine steps the first and last two, of which there are two in a quarter.
    nine = [[1.0] * 7 + [2.0, 4.0], [6.0, 9.0] + [1.0] * 7]
    assert jumps(rows(*({"all": norms} for norms in nine)), "all") == [7.5 / 3.0]
    # Full rounds of two cycles do not follow each other.
    assert jumps(split(rows(both, partial, both))[0], "all") == []


@pytest.mark.parametrize("strategy", ["fedavg", "fedpart"])
def test_a_run_records_every_local_step(runner, strategy):
    more = ["fedpart.warm-up=1", "fedpart.rounds-per-group=1"] if strategy == "fedpart" else []
    done = runner(f"strategy.name={strategy}", *more, *SMALL)
    active = ["conv1", "conv2", "fc"]
    for t, row in enumerate(done.history):
        norms = row["grad_norm"]
        one = [active[(t - 1) % 4]] if strategy == "fedpart" and t % 4 else active
        assert set(norms) == {"all", *one}
        steps = {len(series) for series in norms.values()}
        assert len(steps) == 1
        for k in range(steps.pop()):
            parts = sum(norms[name][k] ** 2 for name in one) ** 0.5
            # a mean over clients of norms: at most the norm of the means of parts
            assert norms["all"][k] >= parts * (1 - 1e-5)
            assert norms["all"][k] <= sum(norms[name][k] for name in one) * (1 + 1e-5)


def test_recording_changes_no_bit(runner):
    plain = runner("clients.number=4", "run.rounds=2")
    watched = runner("clients.number=4", "run.rounds=2", "eval.grad-norm=true")
    assert plain.summary["model_sha256"] == watched.summary["model_sha256"]
    assert "grad_norm" not in plain.history[0]


def test_the_norms_are_those_of_the_loss(runner, tmp_path, monkeypatch):
    """One client, one step a round, plain SGD: ||g|| = ||w_before - w_after|| / lr."""
    import torch

    from fl_client.client import Clients

    seen = []
    install = Clients._install

    def watching(self, received):
        seen.append(received["params"].clone())
        install(self, received)

    monkeypatch.setattr(Clients, "_install", watching)
    done = runner(
        "clients.number=1",
        "run.rounds=3",
        "train.batch-size=2000",
        "train.lr=0.05",
        "eval.grad-norm=true",
    )
    moved = [torch.linalg.vector_norm(b - a).item() / 0.05 for a, b in pairwise(seen)]
    recorded = [row["grad_norm"]["all"][0] for row in done.history]
    assert recorded[:2] == pytest.approx(moved, rel=1e-3)


def test_the_command(runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    full = runner(*SMALL).folder
    part = runner("strategy.name=fedpart", "fedpart.warm-up=2", *SMALL).folder
    picture = tmp_path / "norms.png"
    assert main(["grad-norm", str(full), str(part), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    for name in ("all", "conv1", "fedavg", "partial"):
        assert name in printed
    assert "(4)" in printed  # four aggregations of the full run
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(read([full, part])) == 2


def test_a_run_without_norms(runner, capsys: pytest.CaptureFixture[str]):
    folder = runner("clients.number=2", "run.rounds=1").folder
    assert main(["grad-norm", str(folder)]) == 2
    assert "eval.grad-norm=true" in capsys.readouterr().err
