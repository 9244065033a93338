"""The report: its numbers are those of the results folders, and it needs nothing but itself."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fl_client.app import release
from fl_common.config import from_text, resolve
from fl_common.pictures import new_figure
from fl_report import headlines, participants, plots, seeds
from fl_report.compare import Run, read
from fl_report.markup import Pictures
from fl_report.page import summary_table, write
from fl_report.seeds import alike
from fl_report.series import curve, local_gain, reached, sized, states_of
from fl_report.settings import command, different_data
from fl_report.suite_metrics import KINDS as METRICS
from fl_report.terminal import text
from fl_server.cli import main

CONFIG = {**resolve({}).flat(), "run.name": "one", "run.output-dir": "/there", "run.rounds": 3}
CLIENTS = {"classes": ["a", "b"], "samples": [5, 3], "label_counts": [[5, 0], [1, 2]]}
EVIL = "<script>alert('$x_{$')</script>"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Headings' tables as text, and every exact number; all tags must close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.title, self.words = "", []
        self.tables: dict[str, list[list[str]]] = {}
        """Rows of cells below each heading."""
        self.values: dict[str, list[list[float | None]]] = {}
        """The same cells as numbers, where they are."""
        self.boxes: dict[str, str] = {}
        self.exact: dict[str, float] = {}
        """Headline numbers by name: as shown, and with all digits."""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h2", "dt"):
            self.title = ""
        elif tag == "tr":
            self.tables.setdefault(self.title, []).append([])
            self.values.setdefault(self.title, []).append([])
        elif tag in ("th", "td"):
            self.tables[self.title][-1].append("")
            self.values[self.title][-1].append(None)
        elif tag == "data":
            value = float(dict(attrs)["value"])
            if "td" in self.open or "th" in self.open:
                self.values[self.title][-1][-1] = value
            else:
                self.exact[self.title] = value

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)
        if {"h2", "dt"} & {*self.open}:
            self.title += data
        elif "dd" in self.open:
            self.boxes[self.title] = self.boxes.get(self.title, "") + data
        elif {"th", "td"} & {*self.open}:
            self.tables[self.title][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def row(server_round: int, accuracy: float | None = None, **more: Any) -> dict[str, Any]:
    """10 bytes up, 20 down, `server_round` seconds; client 0 answers of 0 and 1."""
    found = {
        "round": server_round, "cohort": [0], "replies": [0], "failed": {}, "rejected": {},
        "bytes_up": 10, "bytes_down": 20, "client_cpu_s": 0.1, "client_loss": 0.5,
        "seconds": float(server_round),
    }  # fmt: skip
    return found | ({} if accuracy is None else {"accuracy": accuracy, "loss": 1.0}) | more


def folder_of(
    folder: Path, rows: list[dict[str, Any]], config: Any = CONFIG, clients: Any = CLIENTS,
    **summary: Any,
) -> Path:  # fmt: skip
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"status": "completed", **summary}))
    for name, content in (("config.json", config), ("clients.json", clients)):
        if content:
            (folder / name).write_text(json.dumps(content))
    if rows:
        (folder / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def run_of(*rows: dict[str, Any], label: str = "x") -> Run:
    return Run(label, {"status": "completed"}, list(rows), CONFIG, CLIENTS, Path("nowhere"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that records most of what there is."""
    base = tmp_path_factory.mktemp("real")
    settings = (
        "run.name=real", f"run.output-dir={base}", "run.pictures=false", "run.rounds=3",
        "clients.number=4", "clients.per-round=2", "train.device=cpu", "strategy.name=scaffold",
        "regularizers=man", "eval.every=2", "eval.on=both", "eval.models=cloud,sel",
        "eval.grad-norm=true", "flatness.every=2", "flatness.samples=32", "flatness.tolerance=0.1",
    )  # fmt: skip
    assert main(["run", *settings]) == 0
    release()
    return base / "real"


@pytest.fixture(scope="module")
def report(real: Path) -> Path:
    return write([real], real.parent / "report.html")


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999_499, "999 kB"), (999_500, "1 MB"), (1.5e12, "1500 GB")],
)
def test_bytes_have_three_digits(count, told):
    assert sized(count) == told


def test_the_numbers_are_those_of_the_run(real: Path, report: Path):
    page, summary = Page(report.read_text()), json.loads((real / "summary.json").read_text())
    history = [json.loads(line) for line in (real / "history.jsonl").open()]
    named = {
        "accuracy": "accuracy", "best accuracy": "best_accuracy", "loss": "loss",
        "rounds": "rounds", "up": "bytes_up", "down": "bytes_down", "time": "wall_s",
        "processor time": "cpu_s", "clients": "clients",
    }  # fmt: skip
    assert {name: page.exact[name] for name in named} == {
        name: summary[key] for name, key in named.items()
    }
    assert page.boxes["accuracy"] == f"{summary['accuracy']:.4f}round 3"
    assert page.boxes["model_sha256"] == summary["model_sha256"]
    assert "scaffold+man on digits completed" in page.text.replace(f"{real} ", "")
    keys = ("round", "accuracy", "loss", "client_loss", None, "bytes_up", "bytes_down", "seconds")
    head, *shown = page.values["Accuracy and loss"]
    assert len(head) == len(keys)
    for line, told in zip(shown, history, strict=True):
        for value, key in zip(line, keys, strict=True):
            assert key is None or value == told.get(key)
    assert [line[4] for line in page.tables["Accuracy and loss"][1:]] == ["2 of 2"] * 3
    last = history[-1]
    assert [line[1] for line in page.values["Accuracy on the clients"][1:]] == [
        last["client_accuracy_mean"], last["client_accuracy_worst_decile"],
        min(last["client_accuracy"].values()), max(last["client_accuracy"].values()),
    ]  # fmt: skip
    assert page.values["Flatness"][-1][1:] == [3, abs(last["lambda_max"]) * (
        last["lambda_max_residual"]), last["trace_error"]]  # fmt: skip
    assert page.text.count("Seconds include the measuring of flatness") == 2
    assert page.tables["Gradient norms"][1][0] == "all"
    assert page.tables["Gradient norms"][1][1].endswith(" (2)")  # aggregations between 3 rounds
    drawn = [sum(k in told["cohort"] for told in history) for k in range(4)]
    assert [line[2] for line in page.values["Participation"][1:]] == drawn


def test_the_page_needs_nothing_but_itself(report: Path):
    page = Page(report.read_text())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {"href", "srcset"} & names and not [n for n in names if n.startswith("on")]
    assert not re.search(r"url\(|@import", report.read_text())
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    beside = {path.read_bytes() for path in (report.parent / "report").iterdir()}
    inside = [base64.b64decode(a["src"].removeprefix("data:image/png;base64,")) for a in images]
    assert {*inside} == beside
    # accuracy and loss over three axes, labels, clients (2), drift (3), strip, norms, flatness (2)
    assert len(inside) == 16
    assert all(len(attributes["alt"]) > 40 for attributes in images)
    for png in inside:
        assert np.asarray(Image.open(BytesIO(png)).convert("L")).std() > 5


def test_the_command_makes_the_same_settings(tmp_path: Path):
    place = tmp_path / "it's $HOME"
    place.mkdir()
    values = CONFIG | {
        "train.lr": 1e-7, "train.nesterov": True, "train.momentum": 0.9, 
        "data.cache-dir": str(place), "server.ledger": False, "strategy.name": "feddyn",
    }  # fmt: skip
    program, what, *words = shlex.split(command(values))
    assert (program, what) == ("flatfed", "run")
    again = resolve(from_text(dict(word.split("=", 1) for word in words))).flat()
    assert again == values | {"run.name": "", "run.output-dir": ""}
    page = Page(headlines.commands([Run("x", {}, [], values, {}, tmp_path)]))
    assert page.text.endswith(command(values))


def test_the_target_by_hand():
    run = run_of(row(1), row(2, 0.5), row(3) | {"accuracy": None}, row(4, 0.8), row(5, 0.7))
    assert reached(run, 0.5).round == 2
    found = reached(run, 0.6)  # 4 rounds of 30 bytes; 1 + 2 + 3 + 4 seconds
    assert (found.round, found.bytes, found.seconds) == (4, 120, 10.0)
    assert reached(run, 0.81) is None
    assert reached(run_of(row(1), row(2, 0.0)), 0.0).round == 2  # 0.9 times a best of 0
    assert curve(run, "accuracy", "bytes") == ([60, 120, 150], [0.5, 0.8, 0.7])
    assert curve(run, "accuracy", "seconds")[0] == [3, 10, 15]
    low = run_of(row(1, 0.3), label="low")
    page = Page(headlines.target([run, low], 0.6, given=True))
    assert page.values["To a target accuracy"][1][1:] == [4, 120, 10.0]
    assert page.tables["To a target accuracy"][2][1] == "not reached; best 0.3000"


def test_without_a_target_it_is_a_share_of_the_best(tmp_path: Path):
    one = folder_of(tmp_path / "one", [row(1, 0.71), row(2, 0.73), row(3, 0.8)])
    # 0.9 * 0.8; two rounds of 30 bytes, of 1 and 2 seconds
    assert "to 0.7200  in round 2, after 60 B and 3.0 s\n" in text(summary_table(read([one])))
    assert "to 0.9000  never\n" in text(summary_table(read([one]), 0.9))


def test_one_run_in_lines(tmp_path: Path):
    rows = [row(1, 0.8, failed={"1": "gone"}), row(2, 0.7, rejected={"0": "NaN"}, loss=1e30)]
    one = folder_of(
        tmp_path / "one", rows, wall_s=7.25, cpu_s=3.0, model_sha256="ab" * 32, status="failed",
        error="broken",
    )  # fmt: skip
    assert text(summary_table(read([one]), 0.8)).splitlines() == [
        "method     fedavg on digits",
        "status     failed: broken",
        "accuracy   0.7000, best 0.8000 in round 1",
        "loss       1.000e+30",
        "rounds     2 of 3",
        "sent       20 B up, 40 B down",
        "time       7.2 s, processors 3.0 s",
        "to 0.8000  in round 1, after 30 B and 1.0 s",
        "refused    1 no answer, 1 rejected",
        f"model      {'ab' * 32}",
        f"folder     {one}",
    ]


def test_several_runs_in_a_table(tmp_path: Path):
    one = folder_of(tmp_path / "one", [row(1, 0.8)], wall_s=7.25, model_sha256="ab" * 32)
    other = CONFIG | {"strategy.name": "feddyn"}
    two = folder_of(tmp_path / "two", [row(1, 0.5, rejected={"1": "NaN"})], other, status="failed")
    table = summary_table(read([one, two]), 0.8)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert {key: cells[key] for key in list(cells)[5:]} == {
        "loss": ["1.0000", "1.0000"], "s": ["7", ""], "rounds to 0.800": ["1", "never"],
        "MB to it": ["0.0", ""], "refused": ["0", "1"], "sha256": ["abababababab", ""],
        "status": ["completed", "failed"], "folder": ["one", "two"],
    }  # fmt: skip
    assert all(line.split()[0] in ("run", "fedavg", "feddyn", "accuracy:") or "──" in line
               for line in text(table).splitlines() if line)  # fmt: skip


def test_a_loss_is_that_of_the_last_evaluation(tmp_path: Path):
    """Not of an earlier one where it was not finite; nothing where there was none."""
    diverged = folder_of(tmp_path / "diverged", [row(1, 0.8), row(2, 0.1, loss=None)])
    other = CONFIG | {"strategy.name": "feddyn"}
    early = folder_of(tmp_path / "early", [row(1)], other, status="failed")
    runs = read([diverged, early])
    cells = {str(column.header): list(column.cells) for column in summary_table(runs).columns}
    assert cells["loss"] == ["not finite", ""]
    assert METRICS["loss"].read(runs[0], 0, {}) is None
    seeded = folder_of(tmp_path / "seed", [row(1, 0.9)], CONFIG | {"run.seed": 5})
    page = Page(write([diverged, early, seeded], tmp_path / "page.html").read_text())
    assert [line[4] for line in page.tables["Runs"]] == [
        "loss", "not finite", "—", "1.0000"
    ]  # fmt: skip
    assert [line[4] for line in page.tables["Means over seeds"]] == ["loss", "not finite", "—"]
    alone = Page(write([diverged], tmp_path / "alone.html").read_text())
    assert alone.boxes["loss"] == "not finiteround 2"
    rounds = next(lines for title, lines in alone.tables.items() if lines[0][:1] == ["round"])
    assert [line[2] for line in rounds[:3]] == ["loss", "1.0000", "not finite"]


def test_brackets_are_no_markup_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    told = {"status": "failed", "error": "expected [batch, 3], found [/data/x]"}
    one, two = (folder_of(tmp_path / n, [row(1, 0.5)], **told) for n in ("a[lr=0.1]", "b[red]"))
    assert main(["report", str(one), "--out", str(tmp_path / "page.html")]) == 0
    assert f"failed: {told['error']}" in capsys.readouterr().out
    assert main(["report", str(one), str(two), "--out", str(tmp_path / "page.html")]) == 0
    assert main(["compare", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert out.count("\n a[lr=0.1] ") == out.count("\n b[red] ") == 2


def test_a_wide_table_loses_no_digit_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = {f"accuracy_{name}": 0.125 for name in ("sel", "all", "first")}
    ended = {"status": "interrupted", "wall_s": 3.0, "cpu_s": 12.0, "model_sha256": "ab" * 32}
    folders = []
    for name in ("dyn", "part"):
        of = CONFIG | {"strategy.name": f"fed{name}", "regularizers": "moon,asam,proximal,man"}
        rows = [row(1, 0.5, **models, bytes_up=123_400_000, bytes_down=234_500_000)]
        folders.append(folder_of(tmp_path / f"a-run-of-fed{name}", rows, of, **ended))
    for name, *options in ["compare"], ["report", "--out", str(tmp_path / "page.html")]:
        assert main([name, *map(str, folders), *options]) == 0
        out = capsys.readouterr().out
        for words in ("fedpart+moon,asam,proximal,man", "0.125 (0.125)", "123.4 / 234.5"):
            assert words in out, name
        assert "…" not in out


def seeded(folder: Path, seed: int, accuracies: list[float], **more: Any) -> Path:
    rows = [row(t, accuracy, **more) for t, accuracy in enumerate(accuracies, 1)]
    return folder_of(folder, rows, CONFIG | {"run.seed": seed, "run.name": folder.name}, wall_s=2.0)


def test_means_over_seeds_by_hand(tmp_path: Path):
    one = seeded(tmp_path / "s1", 1, [0.5, 0.7])
    two = seeded(tmp_path / "s2", 2, [0.3, 0.8, 0.6], bytes_up=40)
    other = folder_of(tmp_path / "o", [row(1, 0.4), row(2, 0.4)], CONFIG | {"strategy.name": "x"})
    broken = folder_of(tmp_path / "b", [row(1, 0.1)], CONFIG | {"run.seed": 3}, status="failed")
    runs = read([one, other, two, broken])
    first, second = alike(runs)
    assert (first.label, [run.folder for run in first.runs]) == ("fedavg", [one, two, broken])
    assert (second.label, second.runs) == ("x", (runs[1],))
    # rounds 1 and 2 are those that both completed runs have; the deviation of two is |a - b| / 2^.5
    found = seeds.line(first, "accuracy", "bytes")
    assert found.x == [45, 90]  # means of 30 and 60, and of 60 and 120
    assert found.y == pytest.approx([0.4, 0.75])
    assert found.spread == pytest.approx([0.2 / 2**0.5, 0.1 / 2**0.5])
    assert seeds.line(second, "accuracy").spread is None
    page = Page(write([one, other, two, broken], tmp_path / "page.html", 0.65).read_text())
    assert page.tables["Means over seeds"][1:] == [
        ["●\xa0fedavg", "2 of 3", "0.6500 ± 0.0707", "0.7500 ± 0.0707", "1.0000 ± 0.0000", "70 B",
         "50 B", "2.0 s"],
        ["●\xa0x", "1", "0.4000", "0.4000", "1.0000", "20 B", "40 B", "—"],
    ]  # fmt: skip
    assert page.tables["To a target accuracy"][1:] == [
        ["●\xa0fedavg", "2.0", "90 B", "3.0 s"],  # rounds 2 and 2; 60 and 120 bytes
        ["●\xa0x", "not reached; best 0.4000", "", ""],
    ]
    assert page.tables["Settings that differ"] == [
        ["setting", "fedavg", "x"],
        [page.tables["Settings that differ"][1][0], "fedavg", "x"],
    ]
    assert "The others with run.seed = 2, 3." in page.text
    colours = [a["style"] for tag, a in page.tags if a.get("class") == "dot"]
    assert colours[:6] == [colours[0], colours[1], colours[0], colours[1], colours[0], colours[0]]
    assert colours[0] != colours[1]


@pytest.mark.parametrize("number", [8, 9])
def test_settings_of_many_runs_go_down_the_page(tmp_path: Path, number: int):
    rates = [0.1 * (k + 1) for k in range(number)]
    runs = [folder_of(tmp_path / f"r{k}", [row(1)], CONFIG | {"train.lr": rates[k]})
            for k in range(number)]  # fmt: skip
    found = Page(write(runs, tmp_path / "page.html").read_text()).tables["Settings that differ"]
    down = [list(line) for line in zip(*found, strict=True)] if number <= 8 else found
    assert len(found) == (2 if number <= 8 else 1 + number)
    assert down[0][0] == ("setting" if number <= 8 else "run")
    assert down[0][1].startswith("train.lr")
    assert down[1:] == [[f"r{k}", str(rate)] for k, rate in enumerate(rates)]


def test_what_is_alike(tmp_path: Path):
    """Not runs of the same seed, which are no sample; and names tell groups apart."""
    same = [seeded(tmp_path / name, 1, [0.5]) for name in ("a", "b")]
    assert [group.label for group in alike(read(same))] == ["a", "b"]
    other = CONFIG | {"run.seed": 2, "train.lr": 0.5}
    folders = [
        *same[:1], seeded(tmp_path / "c", 2, [0.5]), folder_of(tmp_path / "d", [row(1)], other)
    ]  # fmt: skip
    assert [group.label for group in alike(read(folders))] == [
        "fedavg train.lr=0.1", "fedavg train.lr=0.5"
    ]  # fmt: skip


def test_cells_of_a_suite_have_its_names(tmp_path: Path):
    cells = [
        folder_of(
            tmp_path / f"{cell}_seed{seed}", [row(1)], CONFIG | {"run.seed": seed, "train.lr": lr}
        )
        for cell, lr in (("low_fedavg", 0.1), ("high_fedavg", 0.5))
        for seed in (1, 2)
    ]
    assert [group.label for group in alike(read(cells))] == ["low_fedavg", "high_fedavg"]
    assert [group.label for group in alike(read([*cells[:1], *cells[2:]]))] == [
        "low_fedavg", "high_fedavg"
    ]  # fmt: skip


def test_many_seeds_stay_readable(tmp_path: Path):
    folders = [seeded(tmp_path / f"s{seed}", seed, [0.5, 0.6]) for seed in range(12)]
    page = Page(write(folders, tmp_path / "page.html").read_text())
    assert len(page.tables["Means over seeds"]) == 2 + 13  # with their heads
    folded = [text for text in page.words if text.startswith("All 12 runs")]
    assert folded == ["All 12 runs", "All 12 runs as numbers"]
    assert page.text.count("flatfed run") == 1


def test_many_methods_have_names_below_and_a_colour_each(tmp_path: Path):
    lines = {f"method {i}": ([1.0, 2.0], [1.0, float(i)]) for i in range(20)}
    plots.lines(lines, "round", "loss", tmp_path / "many.png")
    plots.lines({"a": ([1.0, 2.0], [1.0, 2.0])}, "round", "loss", tmp_path / "one.png")
    many, one = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("many", "one"))
    assert many.width == one.width and many.height > one.height + 150
    pixels = {tuple(pixel) for pixel in np.asarray(many).reshape(-1, 3)}
    hexes = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in pixels}
    assert len({*plots.COLOURS}) == 20 and {*plots.COLOURS} <= hexes


@pytest.mark.parametrize("steps", [1, 2])
def test_gradient_norms_show_however_few_the_steps(steps: int, tmp_path: Path):
    plots.gradient_norms({"x": [[1.0, 2.0][:steps], [3.0, 4.0][:steps]]}, tmp_path / "norms.png")
    pixels = np.asarray(Image.open(tmp_path / "norms.png").convert("RGB")).reshape(-1, 3)
    blue = tuple(int(plots.BLUE[i : i + 2], 16) for i in (1, 3, 5))
    assert (pixels == blue).all(axis=1).any()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that `plots` makes, with their axes."""
    made: list[Any] = []

    def kept(*size: float, **grid: int) -> Any:
        made.append(new_figure(*size, **grid))
        return made[-1]

    monkeypatch.setattr(plots, "new_figure", kept)
    return made


def test_thousands_of_rounds_of_gradient_norms_are_one_line(figures: list, tmp_path: Path):
    """With a gap and a dotted line after every round: an artist for each takes minutes."""
    rounds = [[1.0, 2.0, 3.0][: 1 + t % 3] for t in range(3000)]
    plots.gradient_norms({"a": rounds}, tmp_path / "x.png")
    [(_, panel)] = figures
    [line], [between] = panel.lines, panel.collections
    x, y = line.get_data()
    assert [int(k) for k, norm in zip(x, y, strict=True) if norm > 0] == list(range(6000))
    assert list(y[np.isfinite(y)]) == [norm for norms in rounds for norm in norms]
    assert len(y) == 9000 and len(line.get_markevery()) == 1000
    assert [line[0][0] for line in between.get_segments()[:4]] == [0.5, 2.5, 5.5, 6.5]


@pytest.mark.parametrize("many", [1, 2, 30])
def test_clients_rounds_and_steps_are_whole_numbers(many: int, figures: list, tmp_path: Path):
    x, path = list(range(1, many + 1)), tmp_path / "x.png"
    plots.curves([row(t, 0.5) for t in x], path)
    plots.comparison({("a", "round"): {"b": (x, x)}}, path)
    plots.lines({"a": (x, x)}, "round", "loss", path)
    plots.participation(np.ones((many, many)), x, path)
    plots.gradient_norms({"a": [[1.0] * many]}, path)
    plots.label_distribution([[1, 2]] * many, "ab", path)
    axes = [one for figure, _ in figures for one in figure.axes]
    assert len(axes) == 7
    for one in axes:
        left, right = one.get_xlim()
        ticks = [tick for tick in one.get_xticks() if left <= tick <= right]
        assert ticks and all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("length", [3, 100])
def test_a_comparison_has_its_names_below_the_lines(length: int, figures: list, tmp_path: Path):
    runs = {f"{i} {'x' * length}": ([1, 2, 3], [0.1, 0.2, 0.9]) for i in range(12)}
    plots.comparison({("a", "round"): runs, ("b", "round"): runs}, tmp_path / "x.png")
    [(figure, _)] = figures
    [legend] = figure.legends
    names, whole = legend.get_window_extent(), figure.bbox
    assert len(legend.get_texts()) == 12
    assert whole.x0 <= names.x0 and names.x1 <= whole.x1
    for panel in figure.axes:
        assert panel.get_legend() is None and panel.get_tightbbox().y0 >= names.y1
        assert panel.bbox.height > 250


def test_lines_that_coincide_all_show(tmp_path: Path):
    x = [float(t) for t in range(100)]
    plots.lines(dict.fromkeys("abc", (x, x)), "round", "loss", tmp_path / "same.png")
    right = np.asarray(Image.open(tmp_path / "same.png").convert("RGB"))[:, 300:]  # of the legend
    for colour in plots.COLOURS[:3]:
        assert (right == list(bytes.fromhex(colour[1:]))).all(-1).sum() > 100


def test_who_took_part_by_hand(tmp_path: Path):
    run = run_of(
        row(1, cohort=[0, 1], failed={"1": f"gone {EVIL}"}),
        row(2, cohort=[1], replies=[], rejected={"1": "NaN"}, client_loss=None),
        row(3, 0.5, evaluation_failed={"0": "late"}),
    )
    assert states_of(run).tolist() == [[1, 0, 1], [2, 3, 0]]
    page = Page(participants.participation([run], Pictures(tmp_path / "pictures")))
    each, listed = page.tables["Participation"][:3], page.tables["Participation"][4:]
    assert each[1:] == [["0", "5", "2", "2", "0", "0"], ["1", "3", "2", "0", "1", "1"]]
    assert listed == [
        ["1", "1", "no answer", f"gone {EVIL}"],
        ["2", "1", "rejected", "NaN"],
        ["3", "0", "evaluation", "late"],
    ]
    strip = np.asarray(Image.open(tmp_path / "pictures" / "participation.png").convert("RGB"))
    for colour in plots.STATES.values():  # cells' and the legend's
        assert (strip == list(bytes.fromhex(colour[1:]))).all(-1).sum() > 500


def test_refusals_are_told_by_reason(tmp_path: Path):
    lost = {str(k): f"{k} of 10 elements are NaN" for k in range(8)} | {"8": "no samples"}
    both = {"cohort": [*range(9)], "replies": []}
    rows = [row(1, rejected=lost, **both), row(2, failed={"3": "x", "5": "x"}, **both)]
    run = Run("x", {}, rows, CONFIG)
    page = Page(participants.participation([run], Pictures(tmp_path / "pictures")))
    assert page.tables["Participation"][-4:] == [
        ["round", "clients", "what", "reason"],
        ["1", "0, 1, 2, 3, 4, 5 and 2 more", "rejected",
         "0 of 10 elements are NaN (other numbers in others)"],
        ["1", "8", "rejected", "no samples"],
        ["2", "3, 5", "no answer", "x"],
    ]  # fmt: skip
    assert "Failures and rejected updates: 9 rejected, 2 no answer" in page.text


def test_drift_by_hand(tmp_path: Path):
    own = {"client_accuracy_before": {"0": 0.2, "1": 0.4}, "client_accuracy_after": {"0": 0.9}}
    run = run_of(row(1, 0.5, **own), row(2, client_loss=0.1))
    assert local_gain(run) == [(1, pytest.approx(0.3), 0.9)]
    page = Page(participants.drift([run], Pictures(tmp_path / "pictures")))
    assert page.tables["Client drift"][1][1:] == [
        "0.5000", "1.0000", "+0.5000", "0.3000", "0.9000", "+0.6000"
    ]  # fmt: skip


def test_updates_by_hand(tmp_path: Path):
    """The table has the last evaluated round's, also of a run where nobody moved then."""
    one = run_of(
        row(1, 0.5, update_norm=1.5, update_norm_max=4.0, update_alignment=0.5),
        row(2),
        row(3, 0.5, update_norm=1.25, update_norm_max=2.0, update_alignment=0.123456),
    )
    still = run_of(row(1, 0.5, update_norm=0.0, update_norm_max=0.0), label="y")
    for runs, names in (([one], ["x"]), ([one, still], ["x", "y"])):
        page = Page(participants.drift(runs, Pictures(tmp_path / "pictures")))
        head, *lines = page.tables["Client drift"]
        assert head[4:] == ["mean length of an update", "longest update", "alignment of updates"]
        told = {"x": ["1.25", "2", "0.1235"], "y": ["0", "0", "—"]}
        assert [line[4:] for line in lines] == [told[name] for name in names]
        captions = [a["alt"] for tag, a in page.tags if tag == "img"]
        assert len([a for a in captions if "x: 0.5 at 1 to 0.1235 at 3" in a]) == 1
        assert len([a for a in captions if "1.5 at 1 to 1.25 at 3" in a]) == 1
    without = Page(participants.drift([run_of(row(1, 0.5))], Pictures(tmp_path / "pictures")))
    assert len(without.tables["Client drift"][0]) == 4


def test_updates_of_a_partial_round_are_marked(tmp_path: Path):
    moved = {"update_norm": 1.5, "update_norm_max": 4.0, "update_alignment": 0.5}
    full = run_of(row(1, 0.5, **moved, active=["conv2"]), row(2, 0.5, **moved))
    partial = run_of(row(1, 0.5, **moved), row(2, 0.5, **moved, active=["conv2"]), label="y")
    page = Page(participants.drift([full, partial], Pictures(tmp_path / "pictures")))
    lines = page.tables["Client drift"][1:]
    assert [line[4:] for line in lines] == [["1.5", "4", "0.5"], ["1.5*", "4*", "0.5*"]]
    assert "does not compare with full rounds" in page.text
    page = Page(participants.drift([full], Pictures(tmp_path / "pictures")))
    assert "does not compare with full rounds" not in page.text


def test_what_is_the_same_of_all_clients_is_told_once(tmp_path: Path):
    equal = {"classes": ["a", "b"], "samples": [4, 4], "label_counts": [[2, 2], [1, 3]]}
    folder = folder_of(tmp_path / "x", [row(1, 0.5, cohort=[0, 1])], clients=equal)
    page = Page(write([folder], tmp_path / "page.html").read_text())
    assert "of 2 classes: 4 samples and 2 classes each." in page.text


def test_what_comes_from_outside_is_text(tmp_path: Path):
    classes = {"classes": [EVIL, "_hidden"], "samples": [3], "label_counts": [[1, 2]]}
    config = CONFIG | {"data.source": EVIL, "old.key": EVIL, "strategy.name": EVIL}
    rows = [row(1, 0.5, rejected={"0": "<img src=x onerror=alert(1)>"}, replies=[])]
    folder = folder_of(
        tmp_path / "<b>one", rows, config, classes, error=EVIL, status="failed", model_sha256=EVIL
    )
    page = Page(write([folder], tmp_path / "out" / "page.html").read_text())
    assert "script" not in {tag for tag, _ in page.tags} and "b" not in {
        tag for tag, _ in page.tags
    }
    assert not [a for tag, a in page.tags if tag == "img" and "onerror" in a]
    assert page.text.count(EVIL) >= 6
    assert page.tables["Participation"][-1][-1:] == ["<img src=x onerror=alert(1)>"]
    assert (tmp_path / "out" / "page" / "labels.png").exists()


@pytest.mark.parametrize("end", ["refused", "before round 1", "killed", "one failed round"])
def test_runs_that_ended_early(end: str, tmp_path: Path):
    folder = tmp_path / "one"
    if end == "refused":  # before the settings were written
        folder_of(folder, [], None, None, status="failed", error="no <such> key", rounds=0)
        told = "one /F failed: no <such> key accuracy—never evaluated"
    elif end == "before round 1":
        folder_of(folder, [], status="failed", error="roll call: nobody")
        told = "fedavg on digits /F failed: roll call: nobody accuracy—never evaluated"
    elif end == "killed":  # in the middle of the second row
        folder_of(folder, [row(1, 0.5)], status="running")
        with (folder / "history.jsonl").open("a") as file:
            file.write('{"round": 2, "coh')
        told = "/F running, unless it was killed accuracy0.5000round 1"
    else:
        failed = row(1, replies=[], client_loss=None) | {"accuracy": None, "loss": None}
        folder_of(folder, [failed], status="failed", error="interrupted")
        told = "/F failed: interrupted accuracy—never evaluated"
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / ".000000-0.safetensors.1").touch()  # a crash left it
    page = Page(write([folder], tmp_path / "page.html", 0.5).read_text())
    assert "flatfed resume" not in page.text
    (folder / "checkpoints" / "000000-0.safetensors").touch()
    page = Page(write([folder], tmp_path / "page.html", 0.5).read_text())
    assert told.replace("/F", str(folder)) in page.text
    assert page.exact["rounds"] == (end not in ("refused", "before round 1"))
    assert (f"flatfed resume {folder}" in page.text) == (end != "refused")
    status = "running$" if end == "killed" else "failed: "
    assert re.search(f"(?m)^status +{status}", text(summary_table(read([folder]))))


def test_many_runs(tmp_path: Path):
    other = CONFIG | {"train.lr": 0.5, "strategy.name": "feddyn", "run.name": "two"}
    flat = {"lambda_max": 4.0, "lambda_max_residual": 0.01, "trace": None}
    one = folder_of(tmp_path / "one", [row(1, 0.5), row(2, 0.9, **flat)], model_sha256="ab" * 32)
    two = folder_of(tmp_path / "two", [row(1, 0.6), row(2, 0.7)], other, wall_s=7.5)
    afterwards = {"samples": 64, "lambda_max": 2.0, "match": {"paper": {"h_n": 3.5, "h_d": 0.1}}}
    (two / "flatness.json").write_text(json.dumps(afterwards))
    none = folder_of(tmp_path / "none", [], status="failed", error="broken")
    page = Page(write([one, two, none], tmp_path / "page.html").read_text())
    lines = page.values["Runs"][1:]
    assert [line[2:8] for line in lines] == [
        [0.9, 0.9, 1.0, 2, 20, 40], [0.7, 0.7, 1.0, 2, 20, 40], [None, None, None, 0, 0, 0]
    ]  # fmt: skip
    named = [line[0] for line in page.tables["Runs"]]
    assert named == ["run", "●\xa0onefedavg", "●\xa0feddyntwo", "●\xa0nonefedavg"]
    assert [line[1] for line in page.tables["Runs"][1:]] == ["completed", "completed", "failed"]
    assert page.text.count("none failed: broken") == 1
    assert [line[8] for line in lines] == [None, 7.5, None]
    # 0.9 of 0.9 is 0.81
    reach = [line[1] for line in page.tables["To a target accuracy"]]
    assert reach == ["round", "2", "not reached; best 0.7000", "not reached; best —"]
    differ = [[re.split("[a-z]* ", line[0])[0][:13], *line[1:]] for line in
              page.tables["Settings that differ"]]  # fmt: skip
    assert [line[1:] for line in differ] == [
        ["one", "feddyn", "none"], ["0.1", "0.5", "0.1"], ["fedavg", "feddyn", "fedavg"]
    ]  # fmt: skip
    assert sum(tag == "mark" for tag, _ in page.tags) == 2
    said = "Seconds of one include the measuring of flatness during the run."
    assert page.text.count(said) == 2  # with the curves, and with the target
    assert page.text.count("2 clients hold 8 training samples of 2 classes: 3 to 5") == 1
    assert page.tables["Flatness"][1:] == [
        ["one", "2", "4 ± 0.04", "—", "—"],
        ["feddyn", "final model, 64 samples", "2", "3.5", "0.1"],
    ]


def test_runs_of_different_data(tmp_path: Path):
    out = tmp_path / "page.html"
    one = folder_of(tmp_path / "one", [row(1, 0.5)])
    two = folder_of(tmp_path / "two", [row(1, 0.5)], CONFIG | {"data.source": "cifar10"})
    more = folder_of(tmp_path / "more", [row(1, 0.5)], clients=CLIENTS | {"samples": [5, 4]})
    said = (
        "runs of different data: data.source is digits in one and cifar10 in two; give runs of the "
        "same data, or --anyway$"
    )
    with pytest.raises(ValueError, match=said):
        write([one, two], out)
    with pytest.raises(ValueError, match="training samples is 8 in one and 9 in more"):
        write([one, more], out)
    assert not out.exists()
    assert "2 runs on digits and cifar10" in write([one, two], out, anyway=True).read_text()


def test_runs_of_other_samples_of_one_source():
    folder = {"data.source": "folder", "data.path": "a", "run.seed": 0}

    def problem(digest: str, other: str, source: str = "folder", **settings: Any) -> str | None:
        told = [{"data_sha256": sha} if sha else {} for sha in (digest, other)]
        one = folder | {"data.source": source}
        two = one | {key.replace("_", ".", 1): value for key, value in settings.items()}
        return different_data([Run("x", told[0], [], one), Run("y", told[1], [], two)])

    # The digest decides, wherever the data lie; the path where a run has none.
    assert problem("1" * 64, "1" * 64, data_path="b") is None
    said = problem("1" * 64, "2" * 64)
    assert "the digest of the samples is 111111111111 in x and 222222222222 in y; give" in said
    assert "data.path is a in x and b in y; give runs of" in problem("1" * 64, "", data_path="b")
    assert problem("", "", source="mine.nets:load", data_path="b")
    assert problem("", "", source="cifar10", data_path="b") is None
    assert problem("", "") is None
    # Another seed may hold out others: then the path decides again.
    assert problem("1" * 64, "2" * 64, run_seed=1) is None
    assert problem("1" * 64, "2" * 64, run_seed=1, data_path="b")
    assert problem("1" * 64, "2" * 64, **{"data_image-size": 16}) is None


def test_wrong_arguments(tmp_path: Path):
    one = folder_of(tmp_path / "one", [row(1, 0.5)])
    with pytest.raises(ValueError, match="target = 90: an accuracy is above 0 and at most 1"):
        write([one], tmp_path / "page.html", 90)
    with pytest.raises(ValueError, match=r"give a name that ends in \.html"):
        write([one], tmp_path / "page")
    with pytest.raises(ValueError, match="given twice"):
        write([one, tmp_path / "x" / ".." / "one"], tmp_path / "page.html")
    with pytest.raises(ValueError, match="holds no run"):
        write([tmp_path], tmp_path / "page.html")


@pytest.mark.parametrize("name", ["all", "all/one"])
def test_pictures_do_not_lie_among_results(name: str, tmp_path: Path):
    """Else `all/*` would hold files that are no runs."""
    (tmp_path / "all").mkdir()
    one = folder_of(tmp_path / "all" / "one", [row(1, 0.5), row(2, 0.6)])
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="among the results in "):
        write([one], tmp_path / f"{name}.html")
    assert sorted(tmp_path.rglob("*")) == files
    write([one], tmp_path / "all" / "page.html")


NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE_S = 120.0


class Browser:
    """Headless Chromium, asked over a pipe; keeps what it tells beside its answers."""

    def __init__(self, profile: Path) -> None:
        listen, self.ask = os.pipe()
        self.answers, speak = os.pipe()

        def pipes() -> None:  # Chromium reads from 3 and writes to 4
            for source, place in ((os.dup(listen), 3), (os.dup(speak), 4)):
                os.dup2(source, place)

        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            preexec_fn=pipes, pass_fds=(3, 4), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(listen), os.close(speak)
        self.sent, self.rest, self.session = 0, b"", {}
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready = select.select([self.answers], [], [], PATIENCE_S)[0]
            assert ready, f"{CHROMIUM} says nothing"
            read = os.read(self.answers, 1 << 20)
            assert read, f"{CHROMIUM} has gone"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params, **self.session}
        os.write(self.ask, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.sent:
            self.events.append(answer)
        return answer["result"]

    def show(self, path: Path, width: int) -> tuple[int, np.ndarray]:
        """How wide the page is at this width of the screen, and its screenshot."""
        metrics = {"deviceScaleFactor": 1, "mobile": width < 600}
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, **metrics)
        self("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        wide = self.value("document.documentElement.scrollWidth")
        png = base64.b64decode(self("Page.captureScreenshot")["data"])
        return wide, np.asarray(Image.open(BytesIO(png)).convert("L"))

    def value(self, expression: str) -> Any:
        """Of an expression in the page."""
        answer = self("Runtime.evaluate", returnByValue=True, expression=expression)
        return answer["result"]["value"]

    def complaints(self) -> list[str]:
        """Whatever the page said on the console."""
        errors = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event["method"] for event in self.events if event["method"] in errors]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(f"none of {', '.join(NAMES)} on the PATH")
    opened = Browser(tmp_path / "profile")
    try:
        yield opened
        opened.session = {}
        opened("Browser.close")  # killed, it would leave folders behind
        opened.process.wait(PATIENCE_S)
    finally:
        opened.process.kill()
        opened.process.wait()


@pytest.mark.parametrize("width", [1200, 360])
def test_in_a_browser(width: int, real: Path, report: Path, browser: Browser):
    wide, screenshot = browser.show(report, width)
    said = browser.value(
        "Object.fromEntries([...document.querySelectorAll('dl > div')].map(box => "
        "[box.children[0].innerText, box.children[1].innerText.split('\\n')[0]]))"
    )
    summary = json.loads((real / "summary.json").read_text())
    assert said["accuracy"] == f"{summary['accuracy']:.4f}"
    assert said["best accuracy"] == f"{summary['best_accuracy']:.4f}"
    assert (said["rounds"], said["model_sha256"]) == ("3", summary["model_sha256"])
    asked = [e["params"]["request"]["url"] for e in browser.events
             if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert [url for url in asked if not url.startswith("data:")] == [report.resolve().as_uri()]
    assert wide <= width and screenshot.shape == (800, width)
    images = "[...document.images].filter(i => {}).length"
    assert browser.value(images.format("i.getBoundingClientRect().right > innerWidth")) == 0
    assert screenshot.std() > 10 and (screenshot < 100).mean() > 0.005  # ink on it
    assert browser.value(images.format("i.complete && i.naturalWidth > 400")) == 16
    assert not browser.complaints()


SEEN = (
    "[...document.querySelectorAll('h2')].find(h => h.innerText == '{}').parentElement"
    ".querySelectorAll('tbody tr')"
)
"""The rows of a section's tables."""


@pytest.mark.parametrize("width", [1280, 390])
def test_several_runs_in_a_browser(width: int, browser: Browser, tmp_path: Path):
    """As wide as the table of runs gets; one of them failed."""
    more = {
        "accuracy_sel": 0.51, "accuracy_all": 0.52, "client_accuracy_mean": 0.53,
        "client_accuracy_worst_decile": 0.54, "lambda_max": 4.0, "update_norm": 1.0,
        "update_norm_max": 2.0, "update_alignment": 0.5, "grad_norm": {"all": [1.0, 2.0]},
        "client_accuracy_before": {"0": 0.2}, "client_accuracy_after": {"0": 0.9},
    }  # fmt: skip
    config = {name: CONFIG | {"strategy.name": name} for name in ("fedavg", "feddyn", "scaffold")}
    rows = [row(1, 0.5, **more), row(2, 0.9125, **more)]
    done = {"wall_s": 1234.5, "cpu_s": 99.5, "model_sha256": "ab" * 32}
    folders = [
        folder_of(tmp_path / "a", rows, config["fedavg"], **done),
        folder_of(tmp_path / "a-longer-name", rows, config["feddyn"], **done),
        folder_of(
            tmp_path / "c", [row(1, 0.25, replies=[], rejected={"0": "NaN"}, client_loss=None)],
            config["scaffold"], status="failed", error="round 1: 0 good replies",
        ),
    ]  # fmt: skip
    page = write(folders, tmp_path / "page.html")
    wide, _ = browser.show(page, width)
    assert wide <= width and not browser.complaints()
    cells = f"[...{SEEN.format('Runs')}].map(tr => [...tr.cells].map(td => {{}}))"
    told = browser.value(cells.format("td.innerText"))
    assert [line[1:4] for line in told] == [
        ["completed", "0.9125", "0.9125"], ["completed", "0.9125", "0.9125"],
        ["failed", "0.2500", "0.2500"],
    ]  # fmt: skip
    assert told[0][5:11] == ["2", "20 B", "40 B", "1,234 s", "99.5 s", "0"]
    assert told[0][11:] == ["0.5100", "0.5200", "0.5300", "0.5400", "ab" * 8]
    places = browser.value(cells.format("td.getBoundingClientRect().right"))
    shown = places if width < 600 else [line[:11] for line in places]
    assert max(map(max, shown)) <= width
    browser("Emulation.setEmulatedMedia", media="print")
    browser("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1,
            mobile=False)  # fmt: skip
    ends = "[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)"
    assert max(browser.value(ends)) <= 718


@pytest.mark.parametrize("width", [1280, 390])
def test_a_long_name_leaves_room_for_numbers(width: int, browser: Browser, tmp_path: Path):
    rows = [row(1, 0.5), row(2, 0.9)]
    name = "a_very_long_name_of_a_run_" * 6
    folders = [folder_of(tmp_path / f"{name}{i}", rows) for i in range(2)]
    browser.show(write(folders, tmp_path / "page.html"), width)
    for title, column, told in (("Runs", 3, "0.9000"), ("To a target accuracy", 1, "2")):
        cells = f"[...{SEEN.format(title)}].map(tr => [...tr.cells][{column}])"
        assert browser.value(f"{cells}.map(td => td.innerText)") == [told, told]
        assert max(browser.value(f"{cells}.map(td => td.getBoundingClientRect().right)")) <= width


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that ends because all updates are rejected, in three rounds."""
    base = tmp_path_factory.mktemp("failed")
    settings = (
        "run.name=failed", f"run.output-dir={base}", "run.pictures=false", "run.rounds=5",
        "clients.number=12", "train.device=cpu", "train.lr=1e30",
    )  # fmt: skip
    assert main(["run", *settings]) == 3
    release()
    return base / "failed"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_failed_run_in_a_browser(width: int, failed: Path, browser: Browser, tmp_path: Path):
    page = write([failed], tmp_path / "page.html")
    wide, _ = browser.show(page, width)
    assert wide <= width and not browser.complaints()
    error = json.loads((failed / "summary.json").read_text())["error"]
    assert f"failed: {error}" in browser.value("document.body.innerText")
    assert "36 rejected" in browser.value("document.body.innerText")
    lines = browser.value(f"[...{SEEN.format('Participation')}].map(tr => tr.innerText)")
    lines = [line for line in lines if "0, 1, 2, 3, 4, 5 and 6 more" in line]
    assert len(lines) == 3 and all("NaN or infinite" in line for line in lines)
    strip = Image.open(tmp_path / "page" / "participation.png").convert("RGB")
    colours = {colour: count for count, colour in strip.getcolors(1 << 20)}
    rejected, answered = (
        colours.get(tuple(bytes.fromhex(plots.STATES[state][1:])), 0)
        for state in ("rejected", "answered")
    )
    assert rejected > 0.5 * strip.width * strip.height and not answered


def test_what_is_folded_away_is_printed(report: Path, browser: Browser, tmp_path: Path):
    inside = (
        "[...document.querySelectorAll('details > :not(summary)')].map(it => it.checkVisibility())"
    )
    browser.show(report, 800)
    on_screen = browser.value(inside)
    browser("Emulation.setEmulatedMedia", media="print")
    printed = browser.value(inside)
    pdf = browser("Page.printToPDF", printBackground=False)["data"]
    assert len(on_screen) >= 3 and not any(on_screen) and all(printed)
    if shutil.which("pdftotext"):
        (tmp_path / "report.pdf").write_bytes(base64.b64decode(pdf))
        made = subprocess.run(
            ["pdftotext", tmp_path / "report.pdf", "-"], check=True, capture_output=True, text=True
        )
        assert "package" in made.stdout  # the head of the table of versions


def test_remarks_are_no_larger_in_print_than_what_they_are_of(report: Path, browser: Browser):
    browser.show(report, 800)
    browser("Emulation.setEmulatedMedia", media="print")
    size = "(it) => parseFloat(getComputedStyle(it).fontSize)"
    pairs = f"[...document.querySelectorAll('th small')].map(it => [it, it.parentNode].map({size}))"
    found = browser.value(pairs)
    assert found and all(remark <= cell for remark, cell in found)


def test_the_command(runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from fl_server.cli import main

    one = runner("clients.number=2", "run.rounds=2").folder
    two = runner("clients.number=2", "run.rounds=2", "train.lr=0.01").folder
    out = tmp_path / "both.html"
    assert main(["report", str(one), str(two), "--out", str(out), "--target", "0.2"]) == 0
    assert "train.lr" in out.read_text()
    assert str(out) in capsys.readouterr().out
    assert main(["report", str(one)]) == 0
    assert (one / "report.html").exists()
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_may_have_another_place(tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "one", [row(1, 0.5), row(2, 0.6)])
    (folder / "report").touch()  # where the pictures go
    assert main(["report", str(folder)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {folder / 'report'}: File exists; give another place with --out FILE.html"
    )
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert main(["report", str(folder), "--out", str(folder / "report" / "page.html")]) == 2
    assert capsys.readouterr().err == f"error: {folder / 'report' / 'page'}: Not a directory\n"


def test_names_that_the_font_lacks_say_nothing_on_the_terminal(tmp_path, recwarn):
    plots.label_distribution([[3, 4], [5, 1]], ["肺炎", "normal"], tmp_path / "labels.png")
    assert (tmp_path / "labels.png").stat().st_size and not recwarn.list
