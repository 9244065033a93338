"""`flatfed compare`: numbers of several runs side by side, and their picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fl_report.compare import read
from fl_server.cli import main

SMALL = ["clients.number=3", "train.device=cpu", "run.rounds=2"]


def test_a_table_and_a_picture_of_two_runs(runner, tmp_path, capsys):
    one = runner(*SMALL, "eval.models=sel")
    two = runner(*SMALL, "strategy.name=feddyn")
    picture = tmp_path / "both.png"
    capsys.readouterr()
    assert main(["compare", str(one.folder), str(two.folder), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    for result, name in ((one, "fedavg"), (two, "feddyn")):
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert f"{result.history[-1]['accuracy']:.3f}" in line
    assert f"{one.history[-1]['accuracy_sel']:.3f}" in printed


def test_runs_of_one_method_are_named_by_their_folders(runner):
    folders = [runner(*SMALL, f"run.seed={seed}").folder for seed in (0, 1)]
    assert [run.label for run in read(folders)] == ["run1", "run2"]


def test_a_run_that_is_not_completed_is_told(tmp_path, capsys):
    for name, status in (("one", "completed"), ("two", "interrupted"), ("three", "completed")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(f'{{"status": "{status}"}}')
    for names, statuses in (
        (["one", "three"], []),
        (["one", "two"], ["completed", "interrupted"]),
    ):
        assert main(["compare", *(str(tmp_path / name) for name in names)]) == 0
        printed = capsys.readouterr().out.split()
        found = [word for word in printed if word in ("status", "completed", "interrupted")]
        assert found == (["status", *statuses] if statuses else [])


def test_a_folder_without_a_run_is_a_mistake(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: holds no run")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("history.jsonl", b'{"round": 1}\n{"round"\n{"round": 3}\n', ", line 2: is not JSON (Exp"),
        ("history.jsonl", b'{"round": 1}\n\xff\n', ", line 2: is not JSON ('utf-8' codec"),
        ("config.json", b"{", ": is not JSON (Exp"),
        ("summary.json", b"", ": is not JSON (Exp"),
        ("history.jsonl", b'{"round": 1}\n[]\n', ", line 2: is not JSON (no object"),
        ("history.jsonl", b'{"round": 1}\n{"round": 3}\n', ", line 2: is not of round 2 (round: 3"),
        ("history.jsonl", b'{"loss": 1.0}\n', ", line 1: is not of round 1 (round: None"),
        ("config.json", b"null", ": is not JSON (no object"),
        ("summary.json", b"[]", ": is not JSON (no object"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(name, content, told, tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    for command in ("compare", "report"):
        assert main([command, str(tmp_path)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path / name}{told}")
        assert line.endswith("); repair it, or leave this run out")


def test_a_completed_run_whose_history_lacks_rounds_is_told(runner, capsys):
    """Else the accuracy of an earlier round would stand beside the final model."""
    folder, history = (result := runner(*SMALL)).folder, result.folder / "history.jsonl"
    first, _ = history.read_text().splitlines(keepends=True)
    for damage, has in ((lambda: history.write_text(first), 1), (history.unlink, 0)):
        damage()
        for command in ("compare", "report"):
            capsys.readouterr()
            assert main([command, str(folder)]) == 2
            assert capsys.readouterr().err == (
                f"error: {history}: has {has} of 2 rounds; repair it, or leave this run out\n"
            )


def test_a_broken_measurement_is_named(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "flatness.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 2
    assert f"error: {tmp_path / 'flatness.json'}: is not JSON" in capsys.readouterr().err


def test_runs_of_different_data(runner, tmp_path, capsys):
    folders = [
        str(runner(*SMALL, f"data.partition={partition}", f"data.max-samples={number}").folder)
        for partition, number in (("iid", 60), ("iid", 90), ("dirichlet", 60))
    ]
    picture = tmp_path / "all.png"
    capsys.readouterr()
    for others, differ in (
        (folders[:2], "the number of training samples is 180 in run1 and 270 in run2"),
        (folders[::2], "data.partition is iid in run1 and dirichlet in run3"),
    ):
        assert main(["compare", *others, "--picture", str(picture)]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == (
            "",
            f"error: runs of different data: {differ}; give runs of the same data, or --anyway\n",
        )
        assert not picture.exists()
    assert main(["compare", *folders, "--anyway", "--picture", str(picture)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "run" in line] == [
        "run", "run1", "run2", "run3"
    ]  # fmt: skip
    assert picture.exists()


def test_a_folder_is_told_by_its_samples_wherever_it_lies(runner, tmp_path, capsys):
    results = []
    for name, seed in (("one", 0), ("copy", 0), ("other", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (2, 2, 6, 8, 8, 3), dtype=np.uint8)
        for split, images in zip(("train", "test"), pixels, strict=True):
            for label, some in zip("ab", images, strict=True):
                place = tmp_path / name / split / label
                place.mkdir(parents=True)
                for i, image in enumerate(some):
                    Image.fromarray(image).save(place / f"{i}.png")
        settings = ["data.source=folder", f"data.path={tmp_path / name}", "data.partition=iid"]
        results.append(runner(*SMALL, *settings, "data.min-size=1"))
    one, copy, other = (str(result.folder) for result in results)
    digests = [result.summary["data_sha256"] for result in results]
    assert digests[0] == digests[1] and len(digests[0]) == 64
    capsys.readouterr()
    assert main(["compare", one, copy]) == 0
    assert main(["compare", one, other]) == 2
    told = f"the digest of the samples is {digests[0][:12]} in run1 and {digests[2][:12]} in run3"
    assert told in capsys.readouterr().err
