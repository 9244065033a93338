"""docs/tutorial.md does what it says: its files and commands, as printed, on a copy of the tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
ROOMS = ("fl_*", "strategies", "regularizers", "pyproject.toml")

DRIVER = """
import contextlib, io, json, shlex, sys
from fl_common import determinism
from fl_server.cli import main

for line in json.load(sys.stdin):
    told = io.StringIO()
    arguments = shlex.split(line)[1:]
    quick = ["run.pictures=false"] if arguments[0] == "run" else []
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main(arguments + quick)
    print(json.dumps([line, code, told.getvalue()]))

import torch
from fl_common.local import Work
from regularizers.confidence import Confidence
from strategies.base import Reply
from strategies.fedavgm import FedAvgM

strategy = FedAvgM()
strategy.w, strategy.kept = {"params": torch.tensor([1.0, 0.0])}, {"m": torch.tensor([0.5, 1.0])}
strategy.begin(strategy.w["params"])
for samples, theta in ((1, [2.0, 0.0]), (3, [1.0, 4.0])):
    strategy.add(Reply(samples, steps=1, model={"params": torch.tensor(theta)}))
w = strategy.step()
penalty = Confidence(Confidence.Params(), Work(1.0, 1, 0.1, 1, 0.1))
term = penalty.data_term(None, torch.tensor([[0.0, 0.0], [100.0, 0.0]]), None)
print(json.dumps({"w": w.tolist(), "m": strategy.kept["m"].tolist(), "term": float(term)}))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line != "export PYTHONPATH=."]


def copied(folder: Path) -> Path:
    """The packages and the page's files, as in a checkout."""
    for pattern in ROOMS:
        for found in ROOT.glob(pattern):
            if found.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(found, folder / found.name, ignore=ignored)
            else:
                shutil.copy(found, folder)
    for block in blocks("python"):
        file = folder / block.splitlines()[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(block)
    return folder


def python(folder: Path, *arguments: str, given: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        input=given,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Played:
    folder: Path
    commands: dict[str, tuple[int, str]]
    """By command: exit code, and all that it printed."""
    by_hand: dict

    def summary(self, name: str) -> dict:
        return json.loads((self.folder / "results" / name / "summary.json").read_text())

    def history(self, name: str) -> list[dict]:
        text = (self.folder / "results" / name / "history.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def model(self, name: str) -> dict:
        return load_file(self.folder / "results" / name / "model.safetensors")


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> Played:
    folder = copied(tmp_path_factory.mktemp("checkout"))
    printed = python(folder, "-c", DRIVER, given=json.dumps(commands())).splitlines()
    *told, by_hand = map(json.loads, printed)
    return Played(folder, {line: (code, text) for line, code, text in told}, by_hand)


def test_the_files_are_short():
    assert len(blocks("python")) == 4
    assert all(len(block.splitlines()) <= 40 for block in blocks("python"))


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", PAGE)
    assert len(links) >= 2
    assert all((ROOT / "docs" / link).exists() for link in links)


def test_every_command_ends_as_the_page_says(played):
    """Success, but where the page shows the error of the block's last command."""
    failing = {}
    for block, error in re.findall(r"^```sh\n(.*?)^```$(?:(?!```).)*?^```text\n(.*?)^```$",
                                   PAGE, re.DOTALL | re.MULTILINE):  # fmt: skip
        failing[block.splitlines()[-1]] = error.strip()
    assert len(failing) == 2
    assert len(played.commands) == len(set(commands()))
    for line, (code, text) in played.commands.items():
        if line in failing:
            assert code in (2, 3) and failing[line] in text, text
        else:
            assert code == 0, f"{line}: {text}"


def test_keys_are_in_pyproject(played):
    text = (played.folder / "pyproject.toml").read_text()
    before = (ROOT / "pyproject.toml").read_text()
    for section in ("[tool.flwr.app.config.fedavgm]", "[tool.flwr.app.config.confidence]"):
        assert section in text and section not in before


def test_fedavgm(played):
    """p = (1/4, 3/4) and Delta = (1, 0), (0, 4): m = 0.9 (0.5, 1) + (0.25, 3); w = (1, 0) + m."""
    assert played.by_hand["m"] == pytest.approx([0.7, 3.9])
    assert played.by_hand["w"] == pytest.approx([1.7, 3.9])
    plain, still, moved = (played.model(n) for n in ("fedavg", "fedavgm-0", "fedavgm"))
    apart = {key: float((still[key] - plain[key]).abs().max()) for key in plain}
    assert max(apart.values()) < 1e-3
    assert max(float((moved[key] - plain[key]).abs().max()) for key in plain) > 1e-2
    assert played.summary("fedavgm")["accuracy"] > 0.5


def test_confidence_penalty(played):
    """p = (1/2, 1/2) has -H = -ln 2, p = (1, 0) has 0; their mean, times 0.1."""
    assert played.by_hand["term"] == pytest.approx(-0.1 * 0.6931472 / 2)
    sha = {n: played.summary(n)["model_sha256"] for n in ("fedavg", "confidence", "confidence-0")}
    assert sha["confidence-0"] == sha["fedavg"] != sha["confidence"]
    assert played.summary("together")["status"] == "completed"


def test_own_data_and_model(played):
    for name in ("wine", "wine-fedpart-man"):
        assert played.summary(name)["accuracy"] * 36 > 30
        shapes = {key: tuple(vector.shape) for key, vector in played.model(name).items()}
        layers = {"0.weight": (32, 13), "0.bias": (32,), "2.weight": (3, 32), "2.bias": (3,)}
        assert shapes == layers
    # Of 4 clients, 4 bytes a number: 32 x 13 + 32 of the first layer, 3 x 32 + 3 of the second.
    first, second = 4 * 4 * 448, 4 * 4 * 99
    cycle = [first + second] * 2 + [first] * 2 + [second] * 2
    up = [row["bytes_up"] for row in played.history("wine-fedpart-man")]
    assert up == [*cycle, *cycle[:4]]


@pytest.mark.long
def test_the_strategy_has_the_same_bits_on_ray(tmp_path):
    folder = copied(tmp_path)
    short = ("strategy.name=fedavgm", "run.rounds=2", "clients.number=3", "run.pictures=false")
    flatfed = ("-c", "import sys; from fl_server.cli import main; sys.exit(main(sys.argv[1:]))")
    python(folder, *flatfed, "config", "--write-pyproject")
    found = []
    for engine in ("inprocess", "ray"):
        python(folder, *flatfed, "run", *short, f"engine.name={engine}", f"run.name={engine}")
        summary = json.loads((folder / "results" / engine / "summary.json").read_text())
        found.append(summary["model_sha256"])
    assert found[0] == found[1]
