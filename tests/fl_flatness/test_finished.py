"""`flatfed flatness`: finished runs, put together again from their folders and measured."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_nets import exact_hessian
from torch import nn

from fl_flatness import report
from fl_flatness.diagonals import subsample
from fl_flatness.finished import Options
from fl_flatness.stored import Stored
from fl_server.cli import main
from fl_server.console import show

HERE = "tests.fl_flatness.test_finished"
PNG = b"\x89PNG"


def three_classes(path: str, seed: int):
    """60 + 24 samples of 5 features; scaled by what the file in `path` says, if one is named."""
    scale = float((Path(path) / "scale").read_text()) if path else 1.0
    rng = np.random.default_rng(0)
    x = rng.normal(size=(84, 5)).astype(np.float32)
    y = (scale * x @ rng.normal(size=(5, 3))).argmax(1)
    return (x[:60], y[:60]), (x[60:], y[60:]), ("a", "b", "c")


def tanh(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes))


class Tied(nn.Module):
    """Two names for one weight, which is stored once; and BatchNorm's buffers."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.two.weight = self.one.weight
        self.norm, self.fc = nn.BatchNorm1d(5), nn.Linear(5, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.two(self.one(x).relu())).relu())


BASE = (
    f"data.source={HERE}:three_classes", "train.device=cpu", "clients.number=3", "run.rounds=2",
)  # fmt: skip
QUIET = "run.pictures=false"
IID, TANH = "data.partition=iid", f"model.name={HERE}:tanh"
DURING = (
    "flatness.every=2", "flatness.samples=15", "flatness.probes=8", "flatness.layers=true",
    "flatness.match=paper", "flatness.match-probes=60",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, which nobody writes into: `watched` and `plain` came to the same
    model, and only one recorded its flatness; `tied` has another."""
    base = tmp_path_factory.mktemp("finished")
    place = [f"run.output-dir={base}", *BASE, QUIET, IID]
    assert main(["run", *place, TANH, "run.name=watched", *DURING]) == 0
    assert main(["run", *place, TANH, "run.name=plain"]) == 0
    assert main(["run", *place, f"model.name={HERE}:Tied", "run.name=tied"]) == 0
    return base


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """Copies, to measure or to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def flatness(folder: Path, *options: str) -> dict:
    assert main(["flatness", str(folder), *options]) == 0
    return json.loads((folder / "flatness.json").read_text())


FEW = ("--top", "1", "--probes", "2")


def test_a_finished_run_has_the_numbers_of_its_last_round(runs: Path):
    """With the settings and the seed of the run, to the last bit."""
    found = flatness(
        runs / "watched", "--samples=15", "--top=1", "--probes=8", "--layers", "--match",
        "--match-probes=60",
    )  # fmt: skip
    row = [json.loads(line) for line in (runs / "watched" / "history.jsonl").open()][-1]
    summary = json.loads((runs / "watched" / "summary.json").read_text())
    for key in ("lambda_max", "lambda_max_residual", "trace", "trace_error", "layers", "accuracy"):
        assert found[key] == row[key], key
    assert found["match"]["paper"] == {"h_n": row["h_n"], "h_d": row["h_d"]}
    assert found["model_sha256"] == summary["model_sha256"]
    assert found["samples"] == 15


def test_they_are_those_of_the_exact_hessian(runs: Path):
    """Of the model in the folder, over the samples that the seed draws."""
    found = flatness(runs / "plain", "--samples", "20", "--top", "3", "--seed", "4")
    net = tanh((5,), 3)
    net.load_state_dict(load_file(runs / "plain" / "model.safetensors"))
    chosen = subsample(24, 20, 4)
    x, y = (torch.from_numpy(a)[chosen] for a in three_classes("", 0)[1])
    h = exact_hessian(net, x, y)
    top = torch.linalg.eigvalsh(h)[-3:].flip(0).tolist()
    assert found["eigenvalues"] == pytest.approx(top, rel=1e-3)
    assert found["trace"] == pytest.approx(h.trace().item(), abs=4 * found["trace_error"] + 1e-4)


def test_the_code_variant_comes_from_the_same_diagonals(runs: Path, runner):
    """As a run with flatness.match=fedalign-code has it, to the last bit."""
    during = [item.replace("=paper", "=fedalign-code") for item in DURING]
    row = runner(*BASE, IID, TANH, *during).history[-1]
    pair = flatness(runs / "plain", *FEW, "--samples=15", "--match", "--match-probes=60")["match"]
    assert pair["fedalign-code"] == {"h_n": row["h_n"], "h_d": row["h_d"]}


def test_equal_seeds_give_equal_files(runs: Path):
    """The runs beside it make no difference either."""
    file, options = (
        runs / "plain" / "flatness.json",
        ("--match", "--match-probes=60", "--samples=9"),
    )
    flatness(runs / "plain", *options)
    first = file.read_bytes()
    file.unlink()
    assert main(["flatness", str(runs / "tied"), *options, str(runs / "plain")]) == 0
    assert file.read_bytes() == first
    other = flatness(runs / "plain", *options, "--seed", "1")
    assert other["trace"] != json.loads(first)["trace"]
    assert other["match"] != json.loads(first)["match"]


def test_what_was_measured_and_how_is_in_the_file(runs: Path):
    found = flatness(runs / "tied", *FEW, "--density", "--landscape", "--seed", "2")
    assert found["settings"] == {
        "samples": 1024, "top": 1, "probes": 2, "density": True, "layers": False,
        "landscape": True, "line": False, "directions": "random", "match": False,
        "match_probes": 200, "engine": "own", "seed": 2,
    }  # fmt: skip
    assert found["samples"] == 24  # all there are
    assert sum(found["density"]["weights"]) == pytest.approx(1)
    steps, losses = found["landscape"]["steps"], found["landscape"]["losses"]
    assert (len(steps), len(losses), {len(row) for row in losses}) == (21, 21, {21})
    assert (steps[0], steps[10], steps[20]) == (-1, 0, 1)
    # The middle is the model itself, over all samples: the loss of the evaluation.
    assert losses[10][10] == pytest.approx(found["loss"], rel=1e-6)
    assert "match" not in found and "layers" not in found


def test_losses_along_the_top_eigenvector(runs: Path):
    """Their second difference at a smooth model, over all samples, is lambda_max; the plane's row
    through the model has them too."""
    few, folder = ("--top=1", "--probes=2", "--line"), runs / "watched"
    found = flatness(folder, *few, "--landscape", "--directions=eigenvectors")
    steps, losses = found["line"]["steps"], found["line"]["losses"]
    assert (len(steps), steps[0], steps[20], steps[40]) == (41, -1, 0, 1)
    assert losses[20] == pytest.approx(found["loss"], rel=1e-6)
    assert losses[::2] == found["landscape"]["losses"][10]
    curvature = (losses[21] - 2 * losses[20] + losses[19]) / 0.05**2
    assert curvature == pytest.approx(found["lambda_max"], rel=0.01)
    assert flatness(folder, *few)["line"]["losses"] != losses


def test_runs_side_by_side(runs: Path, capsys: pytest.CaptureFixture[str]):
    """A table of both, one of each one's layers, and the pictures of both in one folder."""
    folders, pictures = [str(runs / "watched"), str(runs / "tied")], runs / "made" / "here"
    options = ("--density", "--layers", "--landscape", "--line", "--match", "--match-probes=40",
               "--top=3")  # fmt: skip
    capsys.readouterr()
    assert main(["flatness", *folders, *options, "--pictures", str(pictures)]) == 0
    said = capsys.readouterr().out
    for run in ("watched", "tied"):
        found = json.loads((runs / run / "flatness.json").read_text())
        (line,) = (line for line in said.splitlines() if line.startswith(f" {run} "))
        cells = line.split()
        assert cells[1:4] == [f"{found['accuracy']:.3f}", f"{found['lambda_max']:.4g}", "±"]
        assert f"{found['trace']:.4g} ± {found['trace_error']:.1g}" in line
        assert "  " + " ".join(f"{a:.3g}" for a in found["eigenvalues"][1:]) + "  " in line
        pair = found["match"]["paper"]
        assert cells[-4:-2] == [f"{pair['h_n']:.4g}", f"{pair['h_d']:.4f}"]
        assert f"{run}: diagonal of client 2, 20 samples" in said
        assert str(runs / run / "flatness.json") in said
        assert f"{found['layers'][0]['input_per_sample']:.4g}" in said
    names = ["landscape-tied", "landscape-watched", "layers-tied", "layers-watched", "rounds"]
    names = sorted([*names, "line", "spectrum"])
    assert sorted(p.name for p in pictures.iterdir()) == [f"flatness-{name}.png" for name in names]
    assert all(p.read_bytes().startswith(PNG) for p in pictures.iterdir())
    assert not list((runs / "tied").glob("flatness-*.png"))


def test_many_eigenvalues_leave_the_other_columns_their_room(capsys: pytest.CaptureFixture[str]):
    numbers = {"accuracy": 0.25, "lambda_max": 12.25, "lambda_max_residual": 0.0}
    found = numbers | {"trace": 123.4, "trace_error": 3.0, "eigenvalues": [12.25] * 100}
    show(report.table([report.Measured("fedavg+man", Path(), [], found)]))
    said = capsys.readouterr().out
    assert "\n fedavg+man      0.250    12.25 ± 0   123.4 ± 3   12.2 12.2 " in said
    assert said.split().count("12.2") == 99


def test_pictures_go_into_each_folder_unless_told(runs: Path):
    """Over rounds only where the run recorded them."""
    assert main(["flatness", *FEW, "--density", str(runs / "watched"), str(runs / "tied")]) == 0
    made = {run: sorted(p.stem for p in (runs / run).glob("*.png")) for run in ("watched", "tied")}
    assert made == {
        "watched": ["flatness-rounds", "flatness-spectrum"],
        "tied": ["flatness-spectrum"],
    }


def test_runs_of_one_name_are_told_apart(runs: Path, capsys: pytest.CaptureFixture[str]):
    other = shutil.copytree(runs / "tied", runs / "elsewhere" / "tied")
    assert main(["flatness", *FEW, str(runs / "tied"), str(other)]) == 0
    said = capsys.readouterr().out
    assert f"{other}: eigenvalues" in said and f"{runs / 'tied'}: eigenvalues" in said


def test_data_that_have_moved(runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "scale").write_text("1")
    folder = runner(*BASE, IID, TANH, f"data.path={old}").folder
    before = flatness(folder, *FEW)
    old.rename(new)
    capsys.readouterr()
    assert main(["flatness", str(folder)]) == 2
    assert f"{old}" in capsys.readouterr().err
    assert flatness(folder, *FEW, "--data-path", str(new)) == before
    (new / "scale").write_text("-1")
    capsys.readouterr()
    assert main(["flatness", str(folder), "--data-path", str(new)]) == 2
    assert "the data here are not those of the run" in capsys.readouterr().err


def without_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    model = folder / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-8])


def respelled(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configured(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "settings",
    [
        {"engine.name": "grpc", "engine.connection": "lab", "clients.keys": "/server/keys.json"},
        {"engine.name": "ray", "engine.client-gpus": 0.25},
        {"engine.workers": "2", "engine.cohort": "5"},
        {"flatness.engine": "pyhessian"},
    ],
)
def test_it_does_not_matter_who_ran_it(runs: Path, settings: dict, monkeypatch: pytest.MonkeyPatch):
    found = flatness(runs / "plain", *FEW)
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, known=find_spec: None if name == "pyhessian" else known(name),
    )
    configured(runs / "plain", **settings)
    assert flatness(runs / "plain", *FEW) == found


SPOILT = {
    "no model": (without_model, "holds no model (model.safetensors): the run has not ended"),
    "half a model": (truncated, "model.safetensors: cannot be read: "),
    "another shape": (
        lambda f: respelled(f, lambda t: t.update({"0.bias": torch.zeros(3)})),
        "does not fit config.json: 0.bias is (3,) float32, and (4,) float32 in model.name = ",
    ),
    "another dtype": (
        lambda f: respelled(f, lambda t: t.update({"0.bias": t["0.bias"].double()})),
        "does not fit config.json: 0.bias is (4,) float64, and (4,) float32 in model.name = ",
    ),
    "one too few": (
        lambda f: respelled(f, lambda t: t.pop("2.weight")),
        "does not fit config.json: 2.weight is not there, and (3, 4) float32 in model.name = ",
    ),
    "one too many": (
        lambda f: respelled(f, lambda t: t.update({"odd": torch.zeros(2, 2)})),
        "does not fit config.json: odd is (2, 2) float32, and no tensor in model.name = ",
    ),
    "no such model": (
        lambda f: configured(f, **{"model.name": "mpl"}),
        'model.name = "mpl": unknown; did you mean mlp?',
    ),
    "a model that raises": (
        lambda f: configured(f, **{"model.name": f"{HERE}:nothing"}),
        "nothing",
    ),
    "another partition": (
        lambda f: configured(f, **{"run.seed": 1}),
        "the data here are not those of the run",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json, which"),
    "no clients": (lambda f: (f / "clients.json").unlink(), "holds no clients.json, which"),
    "no summary": (lambda f: (f / "summary.json").unlink(), "holds no run"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_folder_that_is_not_whole(runs: Path, capsys: pytest.CaptureFixture[str], how: str):
    """One line, before anything is measured: also of the good run before it."""
    spoil, message = SPOILT[how]
    spoil(runs / "plain")
    assert main(["flatness", *FEW, str(runs / "tied"), str(runs / "plain")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {runs / 'plain'}")
    assert message in line
    assert not (runs / "tied" / "flatness.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "--samples 0: must be at least 1"),
        (["--top", "0"], "--top 0: must be from 1 to 100"),
        (["--top", "101"], "--top 101: must be from 1 to 100"),
        (["--probes", "1"], "--probes 1: must be at least 2"),
        (["--match", "--match-probes", "3"], "--match-probes 3: must be even, and at least 2"),
        (["--match-probes", "4"], "--match-probes 4: has no effect without --match"),
        (["--directions", "random"], "--directions random: has no effect without --landscape or"),
        (["no-such-folder"], "no-such-folder: holds no run"),
    ],
)
def test_mistakes_in_the_call(finished: Path, capsys, options, message):
    assert main(["flatness", str(finished / "plain"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_pyhessian_must_be_there(finished: Path, capsys, monkeypatch):
    def found(name, *args):
        return None if name == "pyhessian" else find_spec(name, *args)

    monkeypatch.setattr("fl_flatness.finished.find_spec", found)
    assert main(["flatness", str(finished / "plain"), "--engine", "pyhessian"]) == 2
    assert "pip install 'flatfed[pyhessian]'" in capsys.readouterr().err


def test_pyhessian_gives_the_same_eigenvalues(runs: Path):
    pytest.importorskip("pyhessian")
    own = flatness(runs / "plain", "--top=2", "--probes=2")["eigenvalues"]
    theirs = flatness(runs / "plain", "--top=2", "--probes=2", "--engine=pyhessian")
    assert theirs["eigenvalues"] == pytest.approx(own, rel=1e-3)
    assert theirs["settings"]["engine"] == "pyhessian"


def test_clients_whose_data_are_theirs_alone(runs: Path, capsys: pytest.CaptureFixture[str]):
    """With data.partition=local everything but the match can be measured from here."""
    configured(runs / "plain", **{"data.partition": "local"})
    assert main(["flatness", *FEW, str(runs / "plain"), "--match"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--match: data.partition = local" in line and "flatness.match" in line
    assert flatness(runs / "plain", *FEW)["samples"] == 24


def test_one_client_has_nobody_to_match(runner, capsys: pytest.CaptureFixture[str]):
    folder = runner(*BASE[:2], "clients.number=1", "run.rounds=1", IID, TANH).folder
    assert main(["flatness", str(folder), "--match"]) == 2
    assert "--match: the run has 1 client" in capsys.readouterr().err


def test_a_match_that_is_lost_in_noise_costs_nothing_else(runs: Path, monkeypatch, capsys):
    monkeypatch.setattr("fl_flatness.finished.estimate", lambda *args: torch.zeros(2, 39))
    found = flatness(runs / "plain", *FEW, "--match")
    assert "use more probes" in found["match_error"]
    assert "match" not in found and found["lambda_max"] > 0
    assert ": no H_N and H_D: client 0" in capsys.readouterr().out


def test_a_match_that_takes_too_much_memory_costs_nothing_else(runs: Path, monkeypatch, capsys):
    def estimate(*args):
        raise torch.OutOfMemoryError("not enough memory: 9 bytes\nframe #0")

    monkeypatch.setattr("fl_flatness.finished.estimate", estimate)
    found = flatness(runs / "plain", *FEW, "--match")
    assert found["match_error"] == "not enough memory: 9 bytes"
    assert "match" not in found and found["lambda_max"] > 0
    assert ": no H_N and H_D: not enough memory: 9 bytes\n" in capsys.readouterr().out


def test_curvature_that_is_not_finite(runs: Path, capsys: pytest.CaptureFixture[str]):
    respelled(runs / "plain", lambda t: t.update({"2.bias": torch.full((3,), torch.nan)}))
    assert main(["flatness", *FEW, str(runs / "plain")]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{runs / 'plain'}: the curvature of the loss is not finite" in line
    assert not (runs / "plain" / "flatness.json").exists()


def test_the_run_is_put_together_bit_for_bit(runs: Path):
    for run in ("watched", "tied"):
        net = Stored.load(runs / run).net
        saved = load_file(runs / run / "model.safetensors")
        own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        assert set(own) == set(saved)
        assert all(torch.equal(own[name], tensor) for name, tensor in saved.items())


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["flatness", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in said, name
    for name in ("--data-path", "--pictures"):
        assert name in said
