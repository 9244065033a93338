"""`flatfed suite` on a suite in miniature: the whole path, and what it does after it was killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from living import wait_for

from fl_common import machine, processes
from fl_common.config import resolve
from fl_report.suite_table import rows
from fl_server.cli import main
from fl_server.suites import differing

FLATFED = Path(sys.executable).with_name("flatfed")
ROUNDS = 40
SUITE = f"""\
title = "Miniature"
source = "nobody"
seeds = [0, 1]
metrics = ["accuracy", "mb-up", "memory-mb"]
[base]
clients.number = 3
run.rounds = {ROUNDS}
eval.every = {ROUNDS // 2}
run.pictures = false
[methods.fedavg]
[methods.feddyn]
strategy.name = "feddyn"
[[published]]
table = "Table 1"
metric = "accuracy"
values = {{ fedavg = [90.0] }}
"""
CELLS = ["fedavg_seed0", "feddyn_seed0", "fedavg_seed1", "feddyn_seed1"]


class Suite:
    """A suite's file, and processes that run it."""

    def __init__(self, base: Path, text: str = SUITE) -> None:
        self.file, self.out = base / "mini.toml", base / "out"
        self.file.write_text(text)
        self.folder, self.log = self.out / "mini", base / "log.txt"

    def call(self, *words: str) -> int:
        return main(["suite", str(self.file), "--out", str(self.out), *words])

    def start(self, *before: str) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*before, FLATFED, "suite", self.file, "--out", self.out],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def rounds(self, cell: str) -> int:
        path = self.folder / cell / "history.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def until(self, cell: str, process: subprocess.Popen[bytes]) -> None:
        """Waits until this cell is in its middle."""
        held = wait_for(lambda: self.rounds(cell) >= 3 or process.poll() is not None, 240)
        assert held and process.poll() is None, self.log.read_text()

    def summary(self, cell: str) -> dict[str, Any]:
        return json.loads((self.folder / cell / "summary.json").read_text())

    def files(self, cell: str) -> dict[str, tuple[str, int]]:
        """Digest and time of every file of a cell."""
        return {
            str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in (self.folder / cell).rglob("*")
            if path.is_file()
        }


def children(process: subprocess.Popen[bytes]) -> list[int]:
    return [p for p, row in processes.living().items() if row.parent == process.pid]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="a child's end with its parent is Linux's")
def test_killed_and_interrupted_it_redoes_what_is_not_finished(tmp_path, capfd):
    suite = Suite(tmp_path)

    # Ctrl-C in the first cell: the child ends cleanly, and the way on is told.
    process = suite.start()
    suite.until(CELLS[0], process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "interrupted; continue with: flatfed suite" in suite.log.read_text()
    assert suite.summary(CELLS[0])["error"] == "interrupted"

    # SIGKILL of the suite alone: its child does not stay behind.
    process = suite.start()
    wait_for(lambda: "goes on" in suite.log.read_text() and bool(children(process)), 60)
    suite.until(CELLS[1], process)
    [child] = children(process)
    process.kill()
    process.wait(60)

    # SIGKILL of both, in a suite that was started again before the child had ended.
    process = suite.start()
    suite.until(CELLS[2], process)
    assert child not in processes.living()
    [child] = children(process)
    process.kill()
    os.kill(child, signal.SIGKILL)
    process.wait(60)
    assert wait_for(lambda: child not in processes.living(), 60)
    before = {cell: suite.files(cell) for cell in CELLS[:2]}
    assert all(suite.summary(cell)["status"] == "completed" for cell in CELLS[:2])
    assert suite.summary(CELLS[2])["status"] == "running"
    done = suite.rounds(CELLS[2])
    capfd.readouterr()

    assert suite.call() == 0
    told = capfd.readouterr().out
    assert "4 cells, 2 done, 2 to run" in told
    started = [line for line in told.splitlines() if ": begins" in line or ": goes on" in line]
    assert len(started) == 2
    assert started[0].startswith(f"{CELLS[2]}: goes on from its checkpoint")
    assert started[1] == f"{CELLS[3]}: begins"
    assert {cell: suite.files(cell) for cell in CELLS[:2]} == before
    assert done - 1 <= suite.summary(CELLS[2])["resumed_after_rounds"][0] <= done

    # An interrupted cell ends as one that nothing happened to.
    for cell, strategy in ((CELLS[1], "feddyn"), (CELLS[2], "fedavg")):
        seed = cell[-1]
        assert main(["run", f"run.output-dir={tmp_path}", f"run.name={cell}", "clients.number=3",
            f"run.rounds={ROUNDS}", f"eval.every={ROUNDS // 2}", f"strategy.name={strategy}",
            f"run.seed={seed}", "run.pictures=false"]) == 0  # fmt: skip
        whole = json.loads((tmp_path / cell / "summary.json").read_text())
        assert suite.summary(cell)["model_sha256"] == whole["model_sha256"]

    check_the_table(suite)

    # Once more: nothing is left, and nothing is touched.
    before, started = {cell: suite.files(cell) for cell in CELLS}, time.monotonic()
    capfd.readouterr()
    assert suite.call() == 0
    assert "4 done, 0 to run" in capfd.readouterr().out
    assert {cell: suite.files(cell) for cell in CELLS} == before
    assert time.monotonic() - started < 60

    # Other settings are another suite: refused by name, nothing is lost.
    assert suite.call("run.rounds=41") == 2
    error = capfd.readouterr().err
    assert f"error: {suite.folder / CELLS[0]}: holds another run: run.rounds is {ROUNDS} there " \
        "and 41 here; give another --out" in error  # fmt: skip
    assert {cell: suite.files(cell) for cell in CELLS} == before


def check_the_table(suite: Suite) -> None:
    """Its numbers, recomputed from the histories."""
    table = json.loads((suite.folder / "table.json").read_text())
    rows = {}
    for cell in CELLS:
        history = (suite.folder / cell / "history.jsonl").read_text().splitlines()
        rows[cell] = [json.loads(line) for line in history]
    for told in table["cells"]:
        history = rows[told["cell"]]
        assert told["values"]["accuracy"] == 100 * history[-1]["accuracy"]
        assert told["values"]["mb-up"] == sum(row["bytes_up"] for row in history) / 1e6
        assert told["rounds"] == ROUNDS and len(told["code"]) == 64
    # Python with torch takes more than 100 MB.
    assert all(cell["values"]["memory-mb"] > 100 for cell in table["cells"])
    [one, two] = (100 * rows[f"fedavg_seed{seed}"][-1]["accuracy"] for seed in (0, 1))
    ours = f"{fmean([one, two]):.1f} ± {stdev([one, two]):.1f}"
    page = (suite.folder / "table.md").read_text()
    line = f"| fedavg | 2 | 90.0 [1] | {ours} | {fmean([one, two]) - 90:+.1f} |"
    assert line in page
    assert f"flatfed suite {suite.file}" in page and table["cells"][0]["code"][:12] in page
    report = (suite.folder / "report.html").read_text()
    assert all(cell in report for cell in CELLS) and ours in report


# As a script's `&` starts its processes.
IN_BACKGROUND = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.skipif(sys.platform != "linux", reason="a child's end with its parent is Linux's")
def test_a_suite_in_the_background_takes_its_cells_with_it(number, tmp_path):
    suite = Suite(tmp_path, SUITE.replace(f"rounds = {ROUNDS}", "rounds = 100000"))
    process = suite.start(*IN_BACKGROUND)
    suite.until(CELLS[0], process)
    [child] = children(process)
    started = processes.identify(child)
    process.send_signal(number)
    try:
        assert process.wait(60) == (143 if number == signal.SIGTERM else -number)
        assert wait_for(lambda: child not in processes.living(), 20)
    finally:
        processes.end({child: started})
    assert suite.summary(CELLS[0])["error"] == "interrupted"


def test_a_cell_measures_itself_whatever_became_of_the_suite(tmp_path):
    from fl_server import suites

    folder = tmp_path / "cell"
    place = [f"run.output-dir={tmp_path}", "run.name=cell"]
    settings = ["clients.number=2", "run.rounds=1", "run.pictures=false"]
    child = [sys.executable, "-P", "-c", suites.CHILD, str(folder)]
    command = [*child, "0", "2", "run", *place, *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    told = suites.measured(folder)
    assert 1e8 < told["max_rss_bytes"] < 1e10 and told["date"] == time.strftime("%Y-%m-%d")
    assert told["jobs"] == 2
    # Those of a cell that went on are the largest of all its processes.
    (folder / suites.MEASURED).write_text('{"max_rss_bytes": 12345678901, "jobs": 3}')
    resume = [*child, "0", "1", "resume", str(folder), "run.rounds=2"]
    subprocess.run(resume, check=True, stdout=subprocess.DEVNULL, timeout=120)
    told = suites.measured(folder)
    assert (told["max_rss_bytes"], told["jobs"]) == (12345678901, 3)


# The first cell's parameters overflow in its first round, and no update is accepted.
FAILING = """\
title = "Miniature"
seeds = [0]
metrics = ["accuracy"]
[base]
clients.number = 3
run.rounds = 2
clients.max-failed-rounds = 1
run.pictures = false
[methods.broken]
train.weight-decay = 1e30
[methods.fedavg]
[[published]]
table = "Table 1"
metric = "accuracy"
values = { fedavg = [90.0] }
"""


def test_a_failed_cell_is_told_and_the_others_go_on(tmp_path, capfd):
    suite = Suite(tmp_path, FAILING)
    assert suite.call() == 3
    told = capfd.readouterr()
    assert "broken_seed0: failed (3): run failed: " in told.out
    assert f"error: broken_seed0 failed; its log: {suite.folder}/logs/broken_seed0.txt" in told.err
    assert suite.summary("fedavg_seed0")["status"] == "completed"
    assert "1 of 2 runs are missing" in (suite.folder / "table.md").read_text()

    # The table alone, with the accuracies that are there; published, it is made from its JSON.
    docs = tmp_path / "docs"
    assert suite.call("--publish", str(docs)) == 0
    assert (docs / "mini.md").read_text() == (suite.folder / "table.md").read_text()
    assert str(tmp_path) not in json.loads((docs / "mini.json").read_text())["about"]
    capfd.readouterr()

    # Cells that failed are named where the table cannot be written either.
    (suite.folder / "table.md").unlink()
    (suite.folder / "table.md").mkdir()
    assert suite.call() == 3
    told = capfd.readouterr().err
    assert "table.md" in told and "error: broken_seed0 failed; its log: " in told


def test_cells_whose_data_cannot_be_read_are_not_tried_one_after_the_other(tmp_path, capfd):
    images = [f"{split}/{kind}/1.png" for split in ("train", "test") for kind in "ab"]
    for path in (tmp_path / "images" / image for image in images):
        path.parent.mkdir(parents=True)
        path.write_text("no image")
    text = BRIEF.replace("[base]", "[base]\nrun.rounds = 1") + "[methods.two]\n"
    text += f'[settings.images]\ndata.source = "folder"\ndata.path = "{tmp_path}/images"\n'
    text += "data.min-size = 1\n[settings.own]\n"
    suite = Suite(tmp_path, text)
    assert suite.call() == 3
    told = capfd.readouterr()
    started = [line for line in told.out.splitlines() if line.endswith(": begins")]
    cells = "images_fedavg_seed0", "own_fedavg_seed0", "own_two_seed0"
    assert started == [f"{cell}: begins" for cell in cells]
    assert "; not tried, as they have the same data: 1; 2 left" in told.out
    assert told.err.count("error: ") == 1
    assert suite.summary("own_two_seed0")["status"] == "completed"
    assert not (suite.folder / "images_two_seed0").exists()


# As many rounds as the call says.
BRIEF = """\
title = "Miniature"
seeds = [0]
metrics = ["accuracy"]
[base]
clients.number = 2
run.pictures = false
[methods.fedavg]
"""


def test_a_cohort_that_a_cell_chose_is_no_other_setting(tmp_path: Path):
    chosen, given = (resolve({"engine.cohort": cohort}).flat() for cohort in ("5", "auto"))
    (tmp_path / "config.json").write_text(json.dumps(chosen))  # of a run that began with auto
    assert differing(given, tmp_path) is None
    other = resolve({"engine.cohort": "2"}).flat()
    assert differing(other, tmp_path) == "engine.cohort is 5 there and 2 here"


def test_settings_of_the_call_hold_for_the_folder_and_are_named(tmp_path, capfd):
    suite = Suite(tmp_path, BRIEF)
    assert suite.call("run.rounds=1") == 0
    assert "settings of the last call" not in capfd.readouterr().out
    assert suite.call() == 0  # nothing is left to run
    assert "settings of the last call" not in capfd.readouterr().out

    suite.file.write_text(BRIEF + '[methods.fedprox]\nstrategy.name = "fedprox"\n')
    assert suite.call("--device", "cpu", "data.max-samples=50") == 2
    assert "data.max-samples is 0 there and 50 here" in capfd.readouterr().err
    assert suite.call("--device", "cpu") == 0
    told = capfd.readouterr().out
    assert "settings of the last call: run.rounds=1\n" in told
    assert suite.summary("fedprox_seed0")["rounds"] == 1
    table = json.loads((suite.folder / "table.json").read_text())
    assert table["command"].endswith("run.rounds=1 train.device=cpu")
    assert table["overrides"] == ["run.rounds"]


def test_some_of_the_cells(tmp_path, capfd):
    suite = Suite(tmp_path, BRIEF.replace("[0]", "[0, 1, 2]"))
    assert suite.call("run.rounds=1", "--cells", "*_seed[02]") == 0
    assert "3 cells, 0 done, 2 to run" in capfd.readouterr().out
    done = [(suite.folder / f"fedavg_seed{i}").exists() for i in range(3)]
    assert done == [True, False, True]
    table = json.loads((suite.folder / "table.json").read_text())
    assert table["command"] == f"flatfed suite {suite.file} run.rounds=1"
    assert [cell["status"] for cell in table["cells"]] == ["completed", "missing", "completed"]
    report = (suite.folder / "report.html").read_text()
    assert f"<h1>{table['title']}</h1>" in report and "1 of 3 runs are missing." in report
    assert suite.call("--cells", "feddyn*") == 2
    assert suite.call("--cells", "*", "--table") == 2
    assert capfd.readouterr().err == (
        "error: --cells feddyn*: no cell has such a name; they are fedavg_seed0, fedavg_seed1, "
        "fedavg_seed2\nerror: --cells: chooses what runs; leave it out with --table and --publish\n"
    )


def test_published_runs_outlive_the_folders_that_they_were_made_in(tmp_path, capfd):
    text = BRIEF + '[methods.fedprox]\nstrategy.name = "fedprox"\nfedprox.mu = 0.1\n'
    suite = Suite(tmp_path, text)
    pages = tmp_path / "pages"
    data = pages / "mini.json"

    def publish(*more: str) -> tuple[dict[str, Any], dict[str, Any], str]:
        """The table's cells by name, the whole of it, and what was told."""
        assert suite.call("--publish", str(pages), "run.rounds=1", *more) == 0
        table = json.loads(data.read_text())
        return {cell["cell"]: cell for cell in table["cells"]}, table, capfd.readouterr().out

    assert suite.call("run.rounds=1") == 0
    pages.mkdir()
    (pages / "README.md").write_text("`python -m fl_report.suite_index > ...` makes this page")
    first, table, told = publish()
    index = f"and now the index: python -m fl_report.suite_index > {pages / 'README.md'}\n"
    assert told.endswith(index)
    (pages / "README.md").write_text("our own")
    assert "index" not in publish()[2]
    assert "kept" not in told and table["elapsed_s"] > 0
    assert "run.output-dir" not in table["settings"] and table["settings"]["run.rounds"] == 1
    assert first["fedprox_seed0"]["settings"] == {"strategy.name": "fedprox", "fedprox.mu": 0.1}
    page = data.with_suffix(".md").read_text()

    shutil.rmtree(suite.folder / "fedavg_seed0")
    second, table, told = publish()
    assert f"kept from {data}, as {suite.folder} lacks them: fedavg_seed0\n" in told
    assert table["elapsed_s"] is None
    own = re.sub(r"; the suite's own time: \d+ s", "", page)
    assert data.with_suffix(".md").read_text() == own
    assert second["fedavg_seed0"].pop("command") == table["command"]
    assert second == first

    shutil.rmtree(suite.folder)
    assert suite.call("run.rounds=1", "--jobs", "2") == 0  # the numbers of this folder come first
    shutil.rmtree(suite.folder / "fedprox_seed0")
    third, table, told = publish()
    lines = data.with_suffix(".md").read_text().splitlines()
    assert [line for line in lines if line.startswith("flatfed suite")] == [
        f"flatfed suite {suite.file} --jobs 2 run.rounds=1",
        f"flatfed suite {suite.file} run.rounds=1",
    ]
    assert (third["fedavg_seed0"]["jobs"], third["fedprox_seed0"]["jobs"]) == (2, 1)

    suite.file.write_text(text.replace("mu = 0.1", "mu = 0.2"))
    fourth, table, told = publish()
    assert f"fedprox_seed0: not kept from {data}: fedprox.mu is 0.1 there and 0.2 here\n" in told
    assert fourth["fedprox_seed0"]["status"] == "missing"

    for cell in table["cells"]:  # as an older version wrote it
        cell.pop("settings", None)
    data.write_text(json.dumps(table | {"settings": {}}))
    shutil.rmtree(suite.folder / "fedavg_seed0")
    fifth, table, told = publish()
    assert f"fedavg_seed0: not kept from {data}, which lacks its settings\n" in told
    assert fifth["fedavg_seed0"]["status"] == "missing"

    data.write_text("<<<<<<< as git leaves it\n")
    assert suite.call("--publish", str(pages), "run.rounds=1") == 2
    told = f"error: {data}: cannot be read (Expecting value: line 1 column 1 (char 0)); repair it"
    assert capfd.readouterr().err.startswith(told) and data.read_text().startswith("<<<")


def test_a_completed_cell_with_a_broken_file_is_named(tmp_path, capfd):
    suite = Suite(tmp_path, BRIEF)
    assert suite.call("run.rounds=2") == 0
    [folder] = suite.folder.glob("*_seed0")
    history = folder / "history.jsonl"
    whole = history.read_text()
    first = whole.splitlines()[0]
    for text, told in (
        (first + '\n{"round"\n', f"{history}, line 2: is not JSON (Expecting ':' delimiter); "),
        (first + "\n", f"{history}: has 1 of 2 rounds; "),
    ):
        history.write_text(text)
        for words in ([], ["--table"]):
            capfd.readouterr()
            assert suite.call(*words) == 2
            error = capfd.readouterr().err
            assert error == f"error: {told}repair it, or move {folder} away to run it again\n"
        assert history.read_text() == text
    history.write_text(whole)
    assert suite.call("--table") == 0


def test_a_folder_with_something_else_is_refused_before_anything_starts(tmp_path, capfd):
    suite = Suite(tmp_path)
    foreign = suite.folder / CELLS[3]
    foreign.mkdir(parents=True)
    (foreign / "letter.txt").write_text("dear")
    assert suite.call() == 2
    assert f"error: {foreign}: holds no run; give another --out" in capfd.readouterr().err
    assert (foreign / "letter.txt").read_text() == "dear"
    assert not (suite.folder / CELLS[0]).exists()


def test_another_suite_at_work_is_told(tmp_path, capfd):
    from fl_common.files import lock

    suite = Suite(tmp_path)
    suite.folder.mkdir(parents=True)
    with lock(suite.folder):
        assert suite.call() == 2
    assert "another flatfed suite is running here" in capfd.readouterr().err


def test_cells_beside_each_other_make_the_same_table(tmp_path, capfd):
    text = SUITE.replace(f"rounds = {ROUNDS}", "rounds = 2").replace(', "memory-mb"', "")
    tables, pages = [], []
    for jobs in ("1", "2"):
        (base := tmp_path / jobs).mkdir()
        suite = Suite(base, text)
        assert suite.call("--jobs", jobs) == 0
        tables.append(json.loads((suite.folder / "table.json").read_text()))
        pages.append((suite.folder / "table.md").read_text())
        cores = sorted(os.sched_getaffinity(0))
        own = [max(1, len(cores[place :: int(jobs)])) for place in range(int(jobs))]
        shares = {min(share, machine.processors()) for share in own}
        devices = [
            json.loads((suite.folder / c / "summary.json").read_text())["device"] for c in CELLS
        ]
        assert {int(re.search(r"\d+", device)[0]) for device in devices} == shares
    assert rows(tables[0]) == rows(tables[1])
    digests = [[cell["model_sha256"] for cell in table["cells"]] for table in tables]
    assert digests[0] == digests[1] and len({*digests[0]}) == len(CELLS)
    for jobs, table, page in zip((1, 2), tables, pages, strict=True):
        assert {cell["jobs"] for cell in table["cells"]} == {jobs}
        assert table["elapsed_s"] > max(cell["wall_s"] for cell in table["cells"])
        assert (
            f"- {jobs} at once (--jobs); the suite's own time: {table['elapsed_s']:,.0f} s" in page
        )
        assert ("--jobs 2" in table["command"]) == (jobs == 2)

    # The table alone is that of the call that ran the cells; nothing runs for it.
    before = {cell: suite.files(cell) for cell in CELLS}
    for words in (["--table"], []):
        capfd.readouterr()
        assert suite.call(*words) == 0
        assert "90.0" in capfd.readouterr().out
        assert json.loads((suite.folder / "table.json").read_text()) == tables[1]
        assert {cell: suite.files(cell) for cell in CELLS} == before
