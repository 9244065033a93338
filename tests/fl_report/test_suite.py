"""Suites: their files, the metrics of a run, the table beside the published numbers."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from fl_common.config import methods, resolve
from fl_report import cost, plots, suite_page, suite_table
from fl_report.compare import Run
from fl_report.suite import Cell, Reduced, SuiteError, cells_of, load, parse
from fl_report.suite_metrics import KINDS, Metric
from fl_server import suites
from fl_server.cli import main
from fl_server.suites import deciding, open_suite

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    path for path in (ROOT / "experiments").glob("*.toml") if "[methods." in path.read_text()
)
PUBLISHED = sorted((ROOT / "docs" / "results").glob("*.json"))

TEXT = """\
title = "Two methods"
source = "nobody"
seeds = [0, 1]
metrics = ["accuracy", "rounds-to:0.5"]
[base]
clients.number = 3
run.rounds = 2
[methods.fedavg]
[methods.feddyn]
strategy.name = "feddyn"
[settings.few]
[settings.many]
clients.number = 5
[reduced]
about = "one seed"
seeds = [0]
settings = ["few"]
base = { run.rounds = 1 }
[[published]]
table = "Table 1"
metric = "accuracy"
settings = ["few", "many"]
values = { fedavg = ["50.0 ± 1.5", ""], feddyn = [60, 61.5] }
"""


def written(folder: Path, text: str = TEXT) -> Path:
    path = folder / "two.toml"
    path.write_text(text)
    return path


ROWS = [
    {"round": 1, "accuracy": 0.4, "seconds": 2.0, "client_cpu_s": 1.0, "bytes_up": 100,
     "bytes_down": 200, "loss": 1.5},
    {"round": 2, "accuracy": 0.6, "seconds": 4.0, "client_cpu_s": 9.0, "bytes_up": 300,
     "bytes_down": 200, "loss": 1.0, "lambda_max": 7.0, "trace": 90.0, "h_n": 3.0, "h_d": 0.5},
    {"round": 3, "accuracy": 0.5, "accuracy_sel": 0.52, "accuracy_all": 0.54,
     "accuracy_first": 0.3, "seconds": 3.0, "client_cpu_s": 2.0, "bytes_up": 600,
     "bytes_down": 200, "loss": 1.25},
]  # fmt: skip
SUMMARY = {"wall_s": 12.5, "cpu_s": 20.0, "bytes_up": 1000, "bytes_down": 600}
EXPECTED = {
    "accuracy": 50.0,  # of the last round
    "accuracy-best": 60.0,
    "accuracy-at:1": 40.0,
    "accuracy-at:4": None,
    "accuracy-mean:2": 100 * 0.55,  # (0.6 + 0.5) / 2
    "accuracy-first": 30.0,
    "accuracy-first-at:3": 30.0,
    "accuracy-first-at:2": None,
    "accuracy-sel": 52.0,
    "accuracy-all": 54.0,
    "loss": 1.25,
    "lambda-max": 7.0,
    "trace": 90.0,
    "h-n": 3.0,
    "h-d": 0.5,
    "rounds-to:0.6": 2.0,
    "rounds-to:0.61": None,
    "mb-to:0.6": 800 / 1e6,  # 100 + 200 + 300 + 200 B
    "mb-up": 1000 / 1e6,
    "mb-down": 600 / 1e6,
    "poster-gb-up:2": None,  # no settings here
    "poster-tmacs:2": None,
    "seconds": 12.5,
    "cpu-seconds": 20.0,
    "seconds-per-round": 2.5,  # (2 + 3) / 2: round 2 measured flatness
    "client-cpu-per-round": 2.0,  # the median of 1, 9, 2
    "memory-mb": 512.0,
}


def test_every_metric_of_a_run_whose_numbers_are_known():
    run = Run("one", SUMMARY, ROWS)
    found = {n: Metric.of(n).value(run, {"max_rss_bytes": 512_000_000}) for n in EXPECTED}
    assert found == EXPECTED
    assert {name.partition(":")[0] for name in EXPECTED} == set(KINDS)


def test_seconds_per_round_leave_out_the_evaluation_of_some_rounds():
    rows = [{"round": i, "seconds": s} for i, s in ((1, 1.0), (2, 2.0), (3, 60.0))]
    rows[2]["accuracy"] = 0.5
    assert Metric.of("seconds-per-round").value(Run("one", SUMMARY, rows), {}) == 1.5


def test_a_run_without_numbers_has_none():
    empty = Run("none", {}, [])
    assert {Metric.of(name).value(empty, {}) for name in EXPECTED} == {None}


POSTER = ("main-cifar10", "main-cifar100", "main-tiny-imagenet")


def of_the_poster(suite: str, kind: str) -> list[tuple[Cell, int, float]]:
    """The cells of its main table: ours, rounds, and the number as printed."""
    path = ROOT / "experiments" / f"fedpart-{suite}.toml"
    parsed = parse(path)
    cells = {cell.method: cell for cell in cells_of(path, parsed, Reduced(), {}) if not cell.seed}
    return [
        (cells[method], int(block.metric.partition(":")[2]), float(row[0]))
        for block in parsed.published
        if block.metric.startswith(kind) and not block.differs
        for method, row in block.values.items()
    ]


@pytest.mark.parametrize("suite", POSTER)
def test_the_posters_computation_is_that_of_its_table(suite):
    clients = {"samples": [499, 500, 501]}
    printed = of_the_poster(suite, "poster-tmacs")
    assert len(printed) == 4 * (4 if suite == "main-cifar10" else 5)
    for cell, t, number in printed:
        metric = Metric.of(f"poster-tmacs:{t}")
        run = Run("", {}, [{}] * t, cell.values, clients)
        assert metric.value(run, {}) == pytest.approx(number, rel=0.005)
        for rows, known in ([{}] * (t - 1), clients), ([{}] * t, {}):
            assert metric.value(Run("", {}, rows, cell.values, known), {}) is None
    unknown = Run("", {}, [{}] * t, cell.values | {"data.source": "folder"}, clients)
    assert metric.value(unknown, {}) is None


@pytest.mark.parametrize("suite", [*POSTER, "c1-cifar10"])
def test_the_posters_communication_is_that_of_its_table(suite):
    """Of what `flatfed cost` says is sent, BatchNorm's statistics too."""
    shares = {}
    for cell, t, number in of_the_poster(suite, "poster-gb-up"):
        if t not in shares:
            plan = cost.plan_of(cell.values | {"run.rounds": t, "strategy.name": "fedpart"})
            shares[t] = cost.report(plan, 500, lambda _: list(range(40))).costs[t]["bytes_up"]
        sent = shares[t][cell.method.endswith("-part")]
        rows = [{"bytes_up": sent / t, "replies": list(range(40))}] * t
        metric = Metric.of(f"poster-gb-up:{t}")
        run = Run("", {}, rows, cell.values)
        assert metric.value(run, {}) == pytest.approx(number, rel=0.004)
        assert metric.value(Run("", {}, rows[1:], cell.values), {}) is None
        assert metric.value(Run("", {}, rows, cell.values | {"data.source": "folder"}), {}) is None


def test_the_cells_are_the_matrix_and_later_settings_win(tmp_path):
    text = TEXT.replace("[settings.few]", '[cells]\n"many_feddyn" = { feddyn.alpha = 0.5 }\n'
        '[only]\nfedavg = ["few"]\n[settings.few]')  # fmt: skip
    cells = load(written(tmp_path, text), overrides={"train.lr": 0.2}).cells
    assert [cell.name for cell in cells] == [
        "few_fedavg_seed0", "few_feddyn_seed0", "many_feddyn_seed0",
        "few_fedavg_seed1", "few_feddyn_seed1", "many_feddyn_seed1",
    ]  # fmt: skip
    assert cells[2].values == {
        "clients.number": 5, "run.rounds": 2, "strategy.name": "feddyn", "feddyn.alpha": 0.5,
        "train.lr": 0.2, "run.seed": 0,
    }  # fmt: skip


def test_settings_may_be_of_different_data(tmp_path):
    other = '[settings.many]\ndata.source = "breast-cancer"\nmodel.name = "mlp"\n'
    cells = load(written(tmp_path, TEXT.replace("[settings.many]\n", other))).cells
    assert {cell.setting: cell.values.get("data.source") for cell in cells} == {
        "few": None, "many": "breast-cancer"
    }  # fmt: skip


def test_reduced_takes_fewer_cells_and_its_own_settings(tmp_path):
    plan = load(written(tmp_path), reduced=True)
    assert plan.folder_name == "two-reduced"
    assert [cell.name for cell in plan.cells] == ["few_fedavg_seed0", "few_feddyn_seed0"]
    assert {cell.values["run.rounds"] for cell in plan.cells} == {1}


def test_a_reduced_suite_may_leave_out_a_published_metric_and_blanks_may_overlap(tmp_path):
    text = TEXT.replace('about = "one seed"', 'about = "one seed"\nmetrics = ["loss"]')
    text += '[[published]]\ntable = "Table 2"\nmetric = "accuracy"\nsettings = ["many"]\n'
    text += "values = { fedavg = [51] }\n"  # Table 1 has "" there
    assert [m.name for m in load(written(tmp_path, text), reduced=True).metrics] == ["loss"]


def test_a_configuration_beside_the_suite_is_under_its_base(tmp_path):
    (tmp_path / "plain.toml").write_text("[run]\nrounds = 9\n[train]\nlr = 0.3\n")
    text = TEXT.replace("title", 'config = "plain.toml"\ntitle', 1)
    [values, *_] = (cell.values for cell in load(written(tmp_path, text)).cells)
    assert (values["run.rounds"], values["train.lr"]) == (2, 0.3)


BAD = {
    "unknown key": ("run.rounds = 2", "run.ronds = 2",
        "few_fedavg_seed0 and 3 more: run.ronds: unknown key; did you mean run.rounds?"),
    "wrong value": ("run.rounds = 2", "run.rounds = 0",
        "few_fedavg_seed0 and 3 more: run.rounds = 0: must be at least 1"),
    "method": ('strategy.name = "feddyn"', 'strategy.name = "fedyn"',
        'few_feddyn_seed0 and 1 more: strategy.name = "fedyn": unknown; did you mean feddyn?'),
    "own key": ("run.rounds = 2", 'run.name = "a"', "few_fedavg_seed0 and 3 more: run.name: a "
        "suite sets it itself; leave it out"),
    "own seed": ("run.rounds = 2", "run.seed = 7", "few_fedavg_seed0 and 3 more: run.seed: a "
        "suite sets it itself; leave it out"),
    "metric": ('"accuracy",', '"acuracy",', "metrics: acuracy is unknown; did you mean accuracy?"),
    "no argument": ("rounds-to:0.5", "rounds-to", "metrics: rounds-to: needs a target in (0, 1]"),
    "argument": ('"accuracy",', '"accuracy:3",', "metrics: accuracy:3: accuracy has no argument"),
    "suite key": ("title", "tilte", "tilte: unknown key; docs/suites.md lists those of a suite"),
    "missing": ('seeds = [0, 1]\n', "", "seeds: is missing; docs/suites.md tells what it holds"),
    "seed twice": ("seeds = [0, 1]", "seeds = [0, 1, 0]",
        "seeds: 0 is given twice; give each once"),
    "metric twice": ('"accuracy",', '"accuracy", "accuracy",',
        "metrics: accuracy is given twice; give each once"),
    "reduced twice": ('about = "one seed"', 'methods = ["fedavg", "fedavg"]',
        "reduced.methods: fedavg is given twice; give each once"),
    "no configuration": ("title", 'config = "none.toml"\ntitle',
        "config: {folder}/none.toml: No such file"),
    "no column": ('"few", "many"]\nv', '"few", "mayn"]\nv',
        "published, Table 1: no setting mayn; this suite has few, many"),
    "no method": ("fedavg = [", "fedavgg = [",
        "published, Table 1: no method fedavgg; this suite has fedavg, feddyn"),
    "row": ("[60, 61.5]", "[60]", "published, Table 1: feddyn has 1 values for 2 settings"),
    "no number": ("[60, 61.5]", '[60, "61..5"]', '"61..5" is not a number; write 52.9'),
    "name": ("[settings.few]", "[settings.Few]", "a name has small letters, digits, dots"),
    "toml": ("[settings.few]", "[settings.few", "not a TOML file: "),
    "not measured": ('metric = "accuracy"', 'metric = "loss"',
        "published, Table 1: loss is not among metrics; add it there"),
    "excluded": ("[settings.few]", '[only]\nfedavg = ["many"]\n[settings.few]',
        'published, Table 1: fedavg in few does not run, as [only] says; write ""'),
    "twice": ("[[published]]", '[[published]]\ntable = "Table 0"\nmetric = "accuracy"\n'
        'settings = ["few"]\nvalues = { feddyn = [59] }\n[[published]]',
        'published, Table 1: feddyn in few has its accuracy in Table 0; write "" there'),
    "column twice": ('"few", "many"]\nv', '"few", "few"]\nv',
        "published, Table 1: feddyn in few has its accuracy in Table 1"),
    "other data": ('strategy.name = "feddyn"', 'data.source = "breast-cancer"\nmodel.name = "mlp"',
        'few_feddyn_seed0: data.source = "breast-cancer" here and "digits" in few_fedavg_seed0; '
        "the methods of a setting need the same data: make them [settings]"),
    "base": ("[settings.few]", '[against]\nfeddyn = "fedavgg"\n[settings.few]',
        "against: no method fedavgg; this suite has fedavg, feddyn"),
    "own base": ("[settings.few]", '[against]\nfeddyn = "feddyn"\n[settings.few]',
        "against: feddyn is its own base"),
    "cell": ("[settings.few]", '[cells."few_fedav"]\n[settings.few]', "cells: no few_fedav; write"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_nothing_starts(case, tmp_path, capsys):
    old, new, told = BAD[case]
    assert old in TEXT
    path = written(tmp_path, TEXT.replace(old, new, 1))
    out, told = tmp_path / "out", told.replace("{folder}", str(tmp_path))
    assert main(["suite", str(path), "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"error: {path}: ") and told in line for line in lines), lines
    assert not out.exists()


def test_other_mistakes_of_the_call(tmp_path, capsys):
    def error(*words: str) -> str:
        assert main(["suite", *words, "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    plain = tmp_path / "plain.toml"
    plain.write_text("[run]\nrounds = 3\n")
    assert f"no suite (it has no [methods]); run a plain configuration with flatfed run " \
        f"--config {plain}" in error(str(plain))  # fmt: skip
    assert "No such file" in error(str(tmp_path / "none.toml"))
    path = str(written(tmp_path))
    assert "--jobs 0: must be at least 1" in error(path, "--jobs", "0")
    assert "train.device: given twice" in error(path, "train.device=cpu", "--device", "cpu")
    assert "trian.lr: unknown key; did you mean train.lr?" in error(path, "trian.lr=1")
    bare = written(tmp_path, TEXT[: TEXT.index("[reduced]")])
    assert "[reduced]: there is none; leave out --reduced" in error(str(bare), "--reduced")
    apart = '[only]\nfeddyn = ["many"]\n[reduced]\nmethods = ["feddyn"]\n'
    unpublished = TEXT[: TEXT.index("[[published]]")]
    nothing = written(tmp_path, unpublished.replace("[reduced]\n", apart))
    assert "[reduced] and [only] leave no run" in error(str(nothing), "--reduced")


def cell(method: str, seed: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    done = {
        "values": {"accuracy": accuracy, "rounds-to:0.5": None, "seconds": 3.0},
        "rounds": 2, "wall_s": 1.5, "cpu_s": 1.0, "device": "cpu", "date": "2026-01-31",
        "model_sha256": "ab" * 32, "code": "cd" * 32, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    name, status = f"{method}_seed{seed}", "missing" if accuracy is None else "completed"
    told = {"cell": name, "method": method, "setting": "", "seed": seed, "status": status}
    return told | (done if status == "completed" else {}) | more


def a_table(**more: Any) -> dict[str, Any]:
    block = {"table": "Table 1", "metric": "accuracy", "settings": [], "differs": "", "note": "",
        "values": {"fedavg": ["50.0 ± 1.5"], "feddyn": [60]}}  # fmt: skip
    return {
        "name": "two", "title": "Two methods", "source": "nobody", "about": "", "reduced": False,
        "command": "flatfed suite two.toml", "reduced_about": "", "overrides": [],
        "metrics": ["accuracy", "rounds-to:0.5"], "published": [block],
        "cells": [cell("fedavg", 0, 52.0), cell("fedavg", 1, 54.0), cell("feddyn", 0, 59.0),
                  cell("feddyn", 1, None)],
    } | more  # fmt: skip


def texts(table: dict[str, Any]) -> dict[tuple[str, str], tuple[str, str, str, int, int]]:
    return {
        (row.method, row.metric): (row.published, row.ours, row.difference, row.runs, row.missing)
        for row in suite_table.rows(table)
    }


def test_published_ours_and_the_difference():
    # 53 is the mean of 52 and 54, sqrt(2) their deviation with n - 1; 53 - 50 = 3, 59 - 60 = -1.
    assert texts(a_table()) == {
        ("fedavg", "accuracy [%]"): ("50.0 ± 1.5", "53.0 ± 1.4", "+3.0", 2, 0),
        ("feddyn", "accuracy [%]"): ("60", "59.0", "-1.0", 1, 1),
        ("fedavg", "rounds to accuracy 0.5"): ("-", "never", "-", 2, 0),
        ("feddyn", "rounds to accuracy 0.5"): ("-", "never", "-", 1, 1),
    }
    page = suite_page.markdown(a_table())
    head = "accuracy [%], published | ours | difference | rounds to accuracy 0.5"
    assert f"| method | runs | {head} |\n" in page
    assert "| fedavg | 2 | 50.0 ± 1.5 [1] | 53.0 ± 1.4 | +3.0 | never |\n" in page
    assert "| feddyn | 1 of 2 | 60 [1] | 59.0 | -1.0 | never |\n" in page
    assert "**1 of 4 runs are missing.**" in page and "| feddyn_seed1 | - |" in page
    cut = a_table(cells=[cell("fedavg", 0, 52.0), cell("fedavg", 1, None, status="interrupted")])
    page = suite_page.markdown(cut)
    assert "**1 of 2 runs are missing (1 interrupted).**" in page


def test_differences_from_a_base_method_are_taken_seed_by_seed():
    # 2 and 1 over the base; of seed 2, the base is missing.
    cells = [cell("fedavg", seed, at) for seed, at in enumerate((50.0, 60.0, None))]
    cells += [cell("feddyn", seed, at) for seed, at in enumerate((52.0, 61.0, 40.0))]
    for i, reached in ((0, 8.0), (3, 5.0), (4, 4.0)):
        cells[i]["values"]["rounds-to:0.5"] = reached
    cells[4]["device"] = "Card (cuda)"
    table = a_table(cells=cells, against={"feddyn": "fedavg"}, published=[])
    table["metrics"].append("seconds")
    [pair] = suite_table.pairs(table)
    assert (pair.method, pair.base, pair.seeds) == ("feddyn", "fedavg", 2)
    told = {"accuracy [%]": "+1.5 ± 0.7", "rounds to accuracy 0.5": "-3.0 (1 of 2)",
            "wall time [s]": "x 1.00 (1 of 2)"}  # fmt: skip
    assert pair.differences == told
    page = suite_page.markdown(table)
    assert "| method | less | seeds | accuracy [%] | rounds to accuracy 0.5 | wall time" in page
    assert "| feddyn | fedavg | 2 | +1.5 ± 0.7 | -3.0 (1 of 2) | x 1.00 (1 of 2) |\n" in page
    assert "<td>+1.5 ± 0.7</td>" in suite_page.opening(table)
    del cells[:3]
    assert suite_table.pairs(table) == []
    assert "less" not in suite_page.markdown(table)


def in_terminal(table: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(suite_page.terminal(table))
    return console.export_text()


def test_the_terminal_has_a_line_for_each_number():
    table = a_table(against={"feddyn": "fedavg"}, metrics=["accuracy", "seconds"])
    lines = [line.split() for line in in_terminal(table).splitlines()]
    assert ["feddyn", "wall", "time", "[s]", "1", "of", "2", "-", "3.0", "-"] in lines
    assert ["feddyn", "fedavg", "1", "accuracy", "[%]", "+7.0"] in lines


def test_ratios_are_of_runs_under_the_same_conditions():
    """On the same device, with as many beside them; of several devices there is no mean."""
    cells = [cell("fedavg", seed, 50.0, jobs=1) for seed in range(4)]
    cells += [cell("feddyn", seed, 50.0, jobs=1) for seed in range(4)]
    for i, seconds in enumerate((6.0, 9.0, 6.0, 6.0)):
        cells[4 + i]["values"]["seconds"] = seconds
    table = a_table(cells=cells, against={"feddyn": "fedavg"}, metrics=["seconds"], published=[])

    def told() -> str:
        [pair] = suite_table.pairs(table)
        return pair.differences["wall time [s]"]

    assert told() == "x 2.25 ± 0.50"
    cells[7]["jobs"] = 2
    assert told() == "x 2.33 ± 0.58 (3 of 4)"
    cells[1]["device"] = cells[5]["device"] = "Card (cuda)"
    assert told() == "Card (cuda): x 3.00 (n = 1); cpu: x 2.00 ± 0.00 (n = 2)"


def test_a_method_whose_runs_have_no_number_has_its_line():
    cells = [cell("fedavg", 0, 52.0), cell("feddyn", 0, 52.0)]
    cells[1]["values"]["accuracy"] = None
    page = suite_page.markdown(a_table(cells=cells, metrics=["accuracy"], published=[]))
    assert "| fedavg | 1 | 52.0 |\n| feddyn | 1 | - |\n" in page


def test_a_table_of_many_columns_has_a_line_for_each_number(monkeypatch):
    table = a_table(against={"feddyn": "fedavg"})
    monkeypatch.setattr(suite_page, "WIDE", 3)
    page = suite_page.markdown(table)
    assert "| fedavg | accuracy [%] | 2 | 50.0 ± 1.5 [1] | 53.0 ± 1.4 | +3.0 |\n" in page
    assert "| feddyn | rounds to accuracy 0.5 | 1 of 2 | - | never | - |\n" in page
    assert "| feddyn | fedavg | 1 | accuracy [%] | +7.0 |\n" in page


def test_the_picture_of_a_table_is_of_means_over_seeds(tmp_path):
    """At the rounds that all runs have, over MB too where methods differ in them."""
    first = {"rounds": [0, 1, 2], "mb": [0.0, 2.0, 4.0], "accuracy": [0.1, 0.2, 0.4]}
    second = {"rounds": [0, 2], "mb": [0.0, 4.0], "accuracy": [0.3, 0.6]}
    less = {"rounds": [0, 2], "mb": [0.0, 1.0], "accuracy": [0.1, 0.2]}
    cells = [cell("fedavg", 0, 40.0, curve=first), cell("fedavg", 1, 60.0, curve=second)]
    cells += [cell("fedpart", 0, 20.0, curve=less), cell("fedpart", 1, None)]
    table = a_table(cells=cells)
    means, part = [pytest.approx(0.2), pytest.approx(0.5)], [0.1, 0.2]
    assert suite_page.panels(table) == {
        ("", "round"): {"fedavg": ([0, 2], means), "fedpart": ([0, 2], part)},
        ("", "MB sent, up and down"): {"fedavg": ([0, 4], means), "fedpart": ([0, 1], part)},
    }
    written = suite_page.write(table, tmp_path / "page.md")
    assert [path.name for path in written] == ["page.md", "page.json", "two.png"]
    with Image.open(written[-1]) as picture:
        assert picture.format == "PNG"
    assert "](two.png)" in written[0].read_text()
    apart = [one | {"setting": setting} for one, setting in zip(cells, "abab", strict=True)]
    found = suite_page.panels(table | {"cells": apart})
    assert list(found) == [("a", "round"), ("b", "round")]
    assert found["b", "round"]["fedpart"] == ([], [])
    del cells[0]["curve"]
    written = suite_page.write(table, tmp_path / "page.md")
    assert len(written) == 2 and "png" not in written[0].read_text()
    assert not (tmp_path / "two.png").exists()  # it was of other runs


def test_panels_stand_in_rows_each_with_its_own_axes(tmp_path, monkeypatch):
    made, real = [], plots.new_figure

    def new_figure(*size, **more):
        made.append(real(*size, **more)[0])
        return made[-1], made[-1].axes

    monkeypatch.setattr(plots, "new_figure", new_figure)
    panels = {(f"s{n}", "round"): {"a": ([0.0, 10.0**n], [0.1, 0.2])} for n in range(5)}
    plots.comparison(panels, tmp_path / "many.png")
    [figure] = made
    assert [axes.get_title() for axes in figure.axes] == [f"s{n}" for n in range(5)]
    ends = [axes.get_xlim()[1] for axes in figure.axes]
    assert all(end == pytest.approx(1.05 * 10**n, rel=0.1) for n, end in enumerate(ends))
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.width < 2 * picture.height


def test_every_setting_has_its_own_published_number():
    more = {"settings": ["few", "many"], "values": {"fedavg": [50, 40]}}
    block = a_table()["published"][0] | more
    cells = [cell("fedavg", 0, 52.0, setting=setting) for setting in ("many", "few")]
    rows = suite_table.rows(a_table(published=[block], cells=cells, metrics=["accuracy"]))
    told = [(row.setting, row.published, row.difference) for row in rows]
    assert told == [("many", "40", "+12.0"), ("few", "50", "+2.0")]


def test_only_remarks_that_a_line_cites_are_told_with_numbers_of_their_own():
    [first] = a_table()["published"]
    other = first | {"table": "Table 0", "metric": "loss"}
    second = first | {"table": "Table 2", "values": {"feddyn": [60]}}
    first = first | {"values": {"fedavg": [50]}}
    page = suite_page.markdown(a_table(published=[other, second, first]))
    assert "| fedavg | 2 | 50 [2] | 53.0 ± 1.4 | +3.0 |" in page
    assert "| feddyn | 1 of 2 | 60 [1] | 59.0 | -1.0 |" in page
    assert "[1] Table 2.\n\n[2] Table 1.\n" in page
    assert "Table 0" not in page and "[3]" not in page


def test_the_device_is_told_by_name_and_as_it_was_set_where_a_run_did_not_record_it(tmp_path):
    suite = TEXT[: TEXT.index("[settings.few]")] + "[settings.few]\n"
    plan = load(written(tmp_path, suite.replace("[0, 1]", "[0]")))
    for cell, told in zip(plan.cells, ({"device": "Card (cuda)"}, {}), strict=True):
        (tmp_path / cell.name).mkdir()
        summary = SUMMARY | {"status": "completed", "rounds": 0, "model_sha256": "", "versions": {}}
        (tmp_path / cell.name / "summary.json").write_text(json.dumps(summary | told))
        (tmp_path / cell.name / "config.json").write_text('{"train.device": "cuda"}')
    table = suite_table.gather(plan, tmp_path, "", lambda _: {}, lambda _: "unknown")
    assert [cell["device"] for cell in table["cells"]] == ["Card (cuda)", "cuda"]
    assert "device: Card (cuda), cuda\n- seconds are those of" in suite_page.markdown(table)


def test_settings_that_change_no_number_but_its_rounding_leave_a_suite_comparable(tmp_path):
    """And those of places, engines, devices, deadlines and trackers."""
    same = {
        "tracking.to": "tensorboard", "engine.cohort": "auto", "engine.workers": "2",
        "clients.deadline-s": 9.0, "train.device": "cpu", "train.threads": 2,
        "train.channels-last": "on", "data.cache-dir": str(tmp_path),
    }  # fmt: skip
    for more in ({}, {"train.lr": 0.2}):
        suite = open_suite(written(tmp_path), same | more, False, tmp_path / "out", 1)
        assert suite.table()["overrides"] == list(more)


def test_published_runs_whose_rounding_differs_are_kept(tmp_path):
    """As those of a card, 20 clients at once, are on a machine without one."""
    suite = open_suite(written(tmp_path), {}, False, tmp_path / "out", 1)
    [first, second, *_] = suite.plan.cells
    settings = [deciding(resolve(cell.values).flat()) for cell in (first, second)]
    settings = [settings[0] | {"engine.cohort": "20"}, settings[1] | {"train.lr": 0.7}]
    cells = [
        cell(one.method, one.seed, 50.0, cell=one.name, setting=one.setting, settings=its)
        for one, its in zip((first, second), settings, strict=True)
    ]
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "two.json").write_text(json.dumps(a_table(cells=cells)))
    statuses = [one["status"] for one in suite.table(tmp_path / "pages")["cells"]]
    assert statuses[:2] == ["completed", "missing"]


def test_cells_beside_each_other_share_a_containers_quota(monkeypatch):
    shares = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: shares.append(cores))
    monkeypatch.setattr(suites.machine, "processors", lambda: 4)
    for place in range(2):
        suites._take_cores(place, 2)
    assert shares == [[0, 2], [1, 3]]


def test_a_run_that_was_interrupted_is_told_as_that(tmp_path):
    plan = load(written(tmp_path), reduced=True)
    (tmp_path / plan.cells[0].name).mkdir()
    summary = SUMMARY | {"status": "failed", "error": "interrupted"}
    (tmp_path / plan.cells[0].name / "summary.json").write_text(json.dumps(summary))
    (tmp_path / plan.cells[0].name / "config.json").write_text("{}")
    table = suite_table.gather(plan, tmp_path, "", lambda _: {}, lambda _: "unknown")
    assert [cell["status"] for cell in table["cells"]] == ["interrupted", "missing"]


def test_a_run_that_is_not_there_and_one_that_cannot_be_read(tmp_path):
    plan = load(written(tmp_path), reduced=True)
    (tmp_path / plan.cells[0].name).mkdir()
    (tmp_path / plan.cells[0].name / "summary.json").write_text("{")
    table = suite_table.gather(plan, tmp_path, "", lambda _: {}, lambda _: "unknown")
    assert [cell["status"] for cell in table["cells"]] == ["broken", "missing"]


def test_the_costs_are_those_of_every_method():
    """Of ours; the proximal term, SAM and ASAM run as fedprox, fedsam and fedasam."""
    cells = load(ROOT / "experiments" / "costs.toml").cells
    ours = {name for name in methods("strategies") if not name.startswith("flwr:")}
    assert {cell.values.get("strategy.name", "fedavg") for cell in cells} == ours
    terms = {*methods("regularizers")} - {"proximal", "sam", "asam"}
    assert {cell.values.get("regularizers", "") for cell in cells} == {"", *terms}


def test_of_runs_that_never_reach_a_target_the_others_are_told():
    table = a_table()
    table["cells"][0]["values"]["rounds-to:0.5"] = 4.0
    told = texts(table)["fedavg", "rounds to accuracy 0.5"]
    assert told == ("-", "4.0 (1 of 2)", "-", 2, 0)


def test_runs_on_two_devices_have_no_mean_of_their_seconds():
    card = {"device": "Card (cuda)"}
    cells = [cell("fedavg", 0, 52.0), cell("fedavg", 1, 54.0, **card), cell("fedavg", 2, None)]
    cells[1]["values"]["seconds"] = 1.0
    table = a_table(cells=cells, metrics=["accuracy", "seconds"])
    told = texts(table)
    assert told["fedavg", "accuracy [%]"][1] == "53.0 ± 1.4"
    assert told["fedavg", "wall time [s]"][1] == "Card (cuda): 1.0 (n = 1); cpu: 3.0 (n = 1)"
    page = suite_page.markdown(table)
    assert "| rounds | wall s | CPU s | device | model |" in page
    assert "| 1.5 | 1.0 | cpu | abab" in page and "| 1.5 | 1.0 | Card (cuda) | abab" in page
    assert "| fedavg_seed2 | - | - | - | - | - | - | missing |" in page
    cells[0]["values"]["seconds"] = None  # of an earlier version, which did not measure it
    assert texts(table)["fedavg", "wall time [s]"][1] == "Card (cuda): 1.0 (n = 1)"
    cells[1]["values"]["seconds"] = None
    assert ("fedavg", "wall time [s]") not in texts(table)


def test_other_conditions_than_the_published_ones_have_no_difference():
    differs = a_table()["published"][0] | {"differs": "other data"}
    seconds = a_table()["published"][0] | {"metric": "seconds"}
    for other, word in (
        ({"reduced": True, "reduced_about": "smaller"}, "ours, reduced"),
        ({"overrides": ["run.rounds"]}, "ours, other settings"),
        ({"published": [differs]}, "not compared: other data"),
        ({"published": [seconds], "metrics": ["seconds"]}, "wall time"),
    ):
        table = a_table(**other)
        assert {row.difference for row in suite_table.rows(table)} == {"-"}
        assert word in suite_page.markdown(table)


def test_the_report_of_a_suite_says_what_its_table_says():
    lines = suite_page.opening(a_table(reduced=True, reduced_about="smaller"))
    told = "Reduced: smaller; so it is not compared with the published numbers."
    assert f"<strong>{told}</strong>" in lines and "1 of 4 runs are missing." in lines
    assert "<td>53.0 ± 1.4</td>" in lines and "<td>50.0 ± 1.5 [1]</td>" in lines
    assert "[1] Table 1." in lines


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_suites_that_come_with_it_are_right(path):
    for reduced in (False, True):
        try:
            assert load(path, reduced=reduced).cells
        except SuiteError as error:  # those that need a folder, or have no reduced form
            assert all("data.path" in e or "[reduced]: there is none" in e for e in error.errors)


def test_there_are_suites():
    assert len(SHIPPED) >= 15


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_page_is_made_from_the_numbers_beside_it(path):
    assert path.with_suffix(".md").read_text() == suite_page.markdown(json.loads(path.read_text()))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_page_is_of_its_suite(path):
    """As the suite's file has it now."""
    table = json.loads(path.read_text())
    file = ROOT / "experiments" / f"{path.stem.removesuffix('-reduced')}.toml"
    suite = parse(file)
    cut = suite.reduced if table["reduced"] else Reduced()
    assert [cell["cell"] for cell in table["cells"]] == [
        cell.name for cell in cells_of(file, suite, cut, {})
    ]
    assert table["metrics"] == (cut.metrics or suite.metrics)
    for key in ("title", "source", "about", "against"):
        assert table[key] == getattr(suite, key), key
    assert table["reduced_about"] == (cut.about if table["reduced"] else "")
    assert table["published"] == [block.model_dump() for block in suite.published]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_table_is_whole_or_says_what_is_missing(path):
    cells = json.loads(path.read_text())["cells"]
    missing = sum(cell["status"] != "completed" for cell in cells)
    page = path.with_suffix(".md").read_text()
    told = re.search(r"^\*\*(\d+) of (\d+) runs are missing", page, re.MULTILINE)
    assert cells and (told is None) == (missing == 0)
    assert told is None or (int(told[1]), int(told[2])) == (missing, len(cells))


def test_every_published_page_has_its_numbers():
    folder = ROOT / "docs" / "results"
    pages = {path.stem for path in folder.glob("*.md")} - {"README"}
    assert pages == {path.stem for path in PUBLISHED}
    pictures = {path.stem for path in PUBLISHED if suite_page.panels(json.loads(path.read_text()))}
    assert {path.stem for path in folder.glob("*.png")} == pictures
