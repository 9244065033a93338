"""Flatness during a run: numbers at their rounds, diagonals by query, and nothing of it in what is
trained."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

import fl_flatness.diagonals
from fl_common import assembly
from fl_common.config import resolve
from fl_common.determinism import seed_of
from fl_flatness.diagonals import subsample
from fl_flatness.match import match
from fl_flatness.measure import Settings, measure
from fl_server.cli import main
from tests.fl_flatness.small_nets import exact_hessian

HERE = "tests.fl_server.test_flatness_of_runs"
TEST, D = 24, 39
"""Test samples; parameters of `tanh`."""


def three_classes(path: str, seed: int):
    """60 + 24 samples of 5 features."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60 + TEST, 5)).astype(np.float32)
    y = (x @ rng.normal(size=(5, 3))).argmax(1)
    return (x[:60], y[:60]), (x[60:], y[60:]), ("a", "b", "c")


def alike(path: str, seed: int):
    """Of one and the same sample, so that every client has the same as every other one."""
    (x, y), test, classes = three_classes(path, seed)
    return (x[:1].repeat(60, 0), y[:1].repeat(60)), test, classes


def tanh(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes))


def delicate(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Measuring must leave its statistics, its mode and its draws alone."""
    norm = nn.BatchNorm1d(6)
    return nn.Sequential(nn.Linear(5, 6), norm, nn.ReLU(), nn.Dropout(), nn.Linear(6, classes))


def partly(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Its first layer does not learn."""
    first = nn.Linear(5, 4).requires_grad_(False)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, classes))


class Square(torch.autograd.Function):
    """Its gradient has none, as that of some of torch's operations."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return SquareBackward.apply(grad, *ctx.saved_tensors)


class SquareBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x):
        return 2 * grad * x

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("derivative for square_backward is not implemented")


def once(shape: tuple[int, ...], classes: int) -> nn.Module:
    net = nn.Linear(5, classes)
    net.register_forward_hook(lambda module, args, output: Square.apply(output))
    return net


BASE = (
    f"data.source={HERE}:three_classes", "data.partition=iid", f"model.name={HERE}:tanh",
    "train.device=cpu", "clients.number=3", "run.rounds=2",
)  # fmt: skip
ALWAYS = "flatness.every=1"


def over(*settings: str) -> list[str]:
    """BASE with these settings instead of, or besides, its own."""
    values = dict(item.split("=", 1) for item in (*BASE, *settings))
    return [f"{key}={value}" for key, value in values.items()]


def test_rows_have_the_numbers_at_their_rounds(runner):
    """After every second round, and the last; equal, to the last bit, to those of `measure` at the
    final model, and near those of the exact Hessian."""
    done = runner(
        *over("run.rounds=5", "run.seed=3", "flatness.every=2", "flatness.probes=8"),
        "flatness.layers=true",
    )
    assert done.code == 0
    keys = {"lambda_max", "lambda_max_residual", "trace", "trace_error", "layers"}
    present = {row["round"]: keys & set(row) for row in done.history}
    assert present == {1: set(), 2: keys, 3: set(), 4: keys, 5: keys}

    net = tanh((5,), 3)
    net.load_state_dict(done.model)
    x, y = map(torch.from_numpy, three_classes("", 3)[1])
    row = done.history[-1]
    found = measure(net, x, y, Settings(probes=8, layers=True), seed=3)
    assert {key: row[key] for key in keys} == {key: found[key] for key in keys}
    exact = exact_hessian(net, x, y)
    assert row["lambda_max"] == pytest.approx(torch.linalg.eigvalsh(exact)[-1].item(), rel=1e-3)
    assert abs(row["trace"] - exact.trace().item()) < 4 * row["trace_error"] + 1e-4
    # float32: the blocks of layers have 4 x 5 and 3 x 4 weights.
    first = torch.linalg.eigvalsh(exact[:20, :20])[-1].item()
    assert [layer["layer"] for layer in row["layers"]] == ["0", "2"]
    assert row["layers"][0]["lambda_max"] == pytest.approx(first, rel=1e-2)


def test_as_many_samples_as_were_asked_for(runner):
    done = runner(*BASE, ALWAYS, "flatness.samples=7", "flatness.probes=2")
    net = tanh((5,), 3)
    net.load_state_dict(done.model)
    chosen = subsample(TEST, 7, 0)
    assert len(set(chosen.tolist())) == 7
    x, y = (torch.from_numpy(a)[chosen] for a in three_classes("", 0)[1])
    found = measure(net, x, y, Settings(probes=2), seed=0)
    assert done.history[-1]["lambda_max"] == found["lambda_max"]
    assert done.history[-1]["trace"] == found["trace"]


def test_a_second_run_gives_the_same_bits(runner):
    settings = over(
        f"model.name={HERE}:delicate", ALWAYS, "flatness.match=paper", "flatness.match-probes=50"
    )
    first, second = runner(*settings), runner(*settings)
    assert first.code == second.code == 0
    assert "h_n" in first.history[-1]
    assert json.dumps(first.history_less_times) == json.dumps(second.history_less_times)


@pytest.mark.parametrize(
    "method",
    [
        ["strategy.name=fedavg", "clients.per-round=2"],
        ["strategy.name=scaffold", "regularizers=man", "clients.per-round=2"],
        ["strategy.name=fedpart", "fedpart.warm-up=1", "fedpart.rounds-per-group=1"],
    ],
    ids=["fedavg", "scaffold+man", "fedpart"],
)
def test_measuring_changes_nothing_that_is_trained(runner, method):
    settings = over(f"model.name={HERE}:delicate", "run.rounds=4", *method)
    plain = runner(*settings)
    watched = runner(
        *settings, ALWAYS, "flatness.layers=true", "flatness.match=fedalign-code",
        "flatness.match-probes=20", "flatness.probes=2",
    )  # fmt: skip
    assert plain.code == watched.code == 0
    assert all("h_d" in row for row in watched.history)
    assert watched.summary["model_sha256"] == plain.summary["model_sha256"]
    for before, after in zip(plain.history_less_times, watched.history_less_times, strict=True):
        # With partial updates a client that was asked has the new model already.
        already = before["bytes_down"] - after["bytes_down"]
        assert already >= 0 if "strategy.name=fedpart" in method else already == 0
        less = {"bytes_down": after["bytes_down"]}
        assert {key: after[key] for key in before} == before | less


@pytest.mark.parametrize(("mode", "entries"), [("paper", D), ("fedalign-code", 4)])
def test_match_is_that_of_the_clients_exact_products(runner, mode, entries):
    """H_k by torch.func at the global model, the same signs v, and the formulas written out.

    H_N of the paper is the mean of (|D_k|^2 - |D_j|^2)^2 over the pairs; the code's that of
    (|D_k| - |D_j|)^2 over all nine, with sums per tensor for D.
    """
    done = runner(
        *BASE, "train.dtype=float64", "run.seed=5", "flatness.every=2", f"flatness.match={mode}",
        "flatness.match-probes=60", "flatness.samples=15",
    )  # fmt: skip
    net = tanh((5,), 3).double()
    net.load_state_dict(done.model)
    config = resolve(json.loads((done.folder / "config.json").read_text()))
    dataset = assembly.load_data(config)
    partitions = assembly.split_data(config, dataset)
    seed, signs = seed_of("match", 5, 2), []
    for probe in range(60):
        generator = torch.Generator().manual_seed(seed_of("flatness-probe", seed, probe))
        signs.append(torch.randint(2, (D,), generator=generator) * 2.0 - 1)
    v = torch.stack(signs).double()
    halves = []
    for k in range(3):
        indices = assembly.share_of(config, dataset, partitions, k).train
        chosen = indices[subsample(len(indices), 15, 5).numpy()]
        assert (len(indices), len(chosen)) == (20, 15)
        x, y = (torch.from_numpy(a[chosen]) for a in (dataset.train.x, dataset.train.y))
        terms = v * (v @ exact_hessian(net, x.double(), y))
        if mode == "fedalign-code":
            terms = torch.stack([part.sum(1) for part in terms.split([20, 4, 12, 3], 1)], 1)
        halves.append((terms[::2].mean(0), terms[1::2].mean(0)))
        assert halves[-1][0].shape == (entries,)
    if mode == "paper":
        dots = [[float(a @ d + b @ c) / 2 for c, d in halves] for a, b in halves]
        pairs, power = [(0, 1), (0, 2), (1, 2)], 1
    else:
        means = [(a + b) / 2 for a, b in halves]
        dots = [[float(a @ b) for b in means] for a in means]
        pairs, power = [(k, j) for k in range(3) for j in range(3)], 0.5
    h_n = [(dots[k][k] ** power - dots[j][j] ** power) ** 2 for k, j in pairs]
    h_d = [dots[k][j] / (dots[k][k] * dots[j][j]) ** 0.5 for k, j in pairs]
    row = done.history[-1]
    # The diagonals travel in float32.
    assert row["h_n"] == pytest.approx(sum(h_n) / len(pairs), rel=1e-5)
    assert row["h_d"] == pytest.approx(sum(h_d) / len(pairs), rel=1e-6)
    assert 0 < row["h_d"] < 0.999
    assert row["flatness_failed"] == {}
    # At least two vectors of `entries` float32 up from each client, and nothing like its data.
    assert 3 * 2 * entries * 4 <= done.summary["flatness_bytes_up"] <= 3 * 2 * entries * 4 + 600


@pytest.mark.parametrize("mode", ["paper", "fedalign-code"])
def test_like_clients_give_exactly_0_and_1(runner, mode):
    mode = f"flatness.match={mode}"
    done = runner(*over(f"data.source={HERE}:alike", ALWAYS, mode, "flatness.match-probes=20"))
    assert [(row["h_n"], row["h_d"]) for row in done.history] == [(0, 1), (0, 1)]


def test_a_frozen_layer_has_no_part_in_it(runner):
    done = runner(*over(f"model.name={HERE}:partly", ALWAYS, "flatness.match=paper"))
    assert done.code == 0
    assert [row["flatness_failed"] for row in done.history] == [{}, {}]
    assert all(0 < row["h_d"] <= 1 for row in done.history)


SPOILT = {
    "too few": (lambda halves: halves[:, :-1], "float32 [2, 38] instead of float32 [2, 39]"),
    "one row": (lambda halves: halves[:1], "float32 [1, 39] instead of float32 [2, 39]"),
    "float64": (lambda halves: halves.double(), "float64 [2, 39] instead of float32 [2, 39]"),
    "NaN": (lambda halves: halves * torch.nan, "78 of 78 elements are NaN or infinite"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_wrong_diagonal_is_refused(runner, monkeypatch, spoilt):
    """Client 1's; the others' count, as if there were no client 1."""
    change, reason = SPOILT[spoilt]
    right, answers = fl_flatness.diagonals.as_sent, []

    def wrong(*args):
        answers.append(right(*args))
        return change(answers[-1]) if len(answers) % 3 == 2 else answers[-1]

    monkeypatch.setattr(fl_flatness.diagonals, "as_sent", wrong)
    done = runner(*BASE, ALWAYS, "flatness.match=paper", "flatness.match-probes=60")
    assert done.code == 0
    for row, own in zip(done.history, (answers[:3], answers[3:]), strict=True):
        assert list(row["flatness_failed"]) == ["1"]
        assert reason in row["flatness_failed"]["1"]
        expected = match([own[0], own[2]])
        assert (row["h_n"], row["h_d"]) == (expected.h_n, expected.h_d)


def test_a_diagonal_lost_in_noise_is_named_after_its_client(runner, monkeypatch):
    """Client 0 gives no answer, so that client 1's comes first."""

    def estimate(net, x, y, *args):
        found = torch.ones(2, D)
        found[1] *= {0: torch.nan, 1: -1.0}.get(asked.pop(0), 1.0)
        return found

    asked = [0, 1, 2]
    monkeypatch.setattr(fl_flatness.diagonals, "estimate", estimate)
    done = runner(*over("run.rounds=1"), ALWAYS, "flatness.match=paper")
    (row,) = done.history
    assert list(row["flatness_failed"]) == ["0"]
    assert row["flatness_error"].startswith("client 1: ||diag H||^2 is estimated at -39")


def test_training_goes_on_without_a_match(runner, monkeypatch, capsys):
    """No diagonal is good: the row says so, and still has what the server measured."""
    zeros = torch.zeros(2, D)
    monkeypatch.setattr(fl_flatness.diagonals, "estimate", lambda *args: zeros)
    done = runner(*BASE, ALWAYS, "flatness.match=paper")
    assert done.code == 0
    for row in done.history:
        assert "use more probes" in row["flatness_error"]
        assert "h_n" not in row and row["lambda_max"] > 0
    assert "round 1: flatness: client 0" in capsys.readouterr().out


def test_training_goes_on_without_a_second_gradient(runner, capsys):
    """During the run, and afterwards in one line."""
    done = runner(*over(f"model.name={HERE}:once", ALWAYS))
    assert done.code == 0
    why = "torch cannot compute the curvature: derivative for square_backward is not implemented"
    assert [row["flatness_error"] for row in done.history] == [why, why]
    assert main(["flatness", str(done.folder)]) == 3
    assert capsys.readouterr().err == f"error: {done.folder}: {why}\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["flatness.every=-1"], "flatness.every = -1: must be at least 0"),
        ([ALWAYS, "flatness.samples=0"], "flatness.samples = 0: must be at least 1"),
        ([ALWAYS, "flatness.samples=many"], 'flatness.samples = "many": '),
        ([ALWAYS, "flatness.tolerance=0"], "flatness.tolerance = 0.0: must be greater than 0"),
        ([ALWAYS, "flatness.tolerance=1"], "flatness.tolerance = 1.0: must be less than 1"),
        ([ALWAYS, "flatness.probes=1"], "flatness.probes = 1: must be at least 2"),
        ([ALWAYS, "flatness.match-probes=0"], "flatness.match-probes = 0: must be at least 2"),
        ([ALWAYS, "flatness.match-probes=3"], "flatness.match-probes = 3: "),
        ([ALWAYS, "flatness.match=papers"], 'flatness.match = "papers": unknown; did you mean pap'),
        ([ALWAYS, "flatness.engine=hessian"], 'flatness.engine = "hessian": unknown; did you mean'),
        ([ALWAYS, "eval.on=clients"], "flatness.every = 1: needs the server's test set"),
        (["flatness.layers=true"], "flatness.layers = true: has no effect without flatness.every"),
        (["flatness.match=paper"], 'flatness.match = "paper": has no effect without flatness.eve'),
        ([ALWAYS, "flatness.sample=3"], "flatness.sample: unknown key; did you mean flatness.sam"),
    ],
)
def test_mistakes_are_told_before_anything_starts(runner, capsys, settings, message):
    done = runner(*BASE, *settings)
    assert done.code == 2
    assert not done.folder.exists()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"error: {message}")


def test_pyhessian_must_be_there(monkeypatch, capsys):
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *a: None if name == "pyhessian" else find_spec(name),
    )
    assert main(["run", *BASE, ALWAYS, "flatness.engine=pyhessian"]) == 2
    assert 'pip install "flatfed[pyhessian]"' in capsys.readouterr().err
    # On nodes, and where a run for a server elsewhere is submitted, nobody uses it.
    assert resolve({"flatness.engine": "pyhessian", "flatness.every": 1, "engine.name": "grpc"})
