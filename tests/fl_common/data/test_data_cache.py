import json
import logging
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fl_common.data import cache
from fl_common.data.errors import DataError
from fl_common.data.partition import cached_partition
from fl_common.data.sources import load


def make(writer: cache.Writer) -> dict:
    writer.add("a", [np.arange(6).reshape(3, 2), np.arange(2).reshape(1, 2)], 4)
    return {"names": ["x"]}


def test_an_entry_is_what_was_added(tmp_path):
    entry = cache.fetch(tmp_path, "e", make)
    np.testing.assert_array_equal(entry.arrays["a"], [[0, 1], [2, 3], [4, 5], [0, 1]])
    assert entry.facts == {"names": ["x"]}
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["a.npy", "meta.json"]


def test_it_is_made_once(tmp_path):
    cache.fetch(tmp_path, "e", make)
    entry = cache.fetch(tmp_path, "e", lambda _: pytest.fail("made again"))
    assert entry.arrays["a"].shape == (4, 2)


def test_arrays_are_aligned_mapped_and_private(tmp_path):
    array = cache.fetch(tmp_path, "e", make).arrays["a"]
    assert isinstance(array.base, np.memmap)
    assert array.ctypes.data % 64 == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.from_numpy(array)[0, 0] = 9
    assert cache.fetch(tmp_path, "e", make).arrays["a"][0, 0] == 0


def truncate(entry):
    with (entry / "a.npy").open("r+b") as file:
        file.truncate(100)


def lie_about_shape(entry):
    meta = json.loads((entry / "meta.json").read_text())
    meta["arrays"]["a"]["shape"] = [2, 4]
    (entry / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lie_about_shape,
        lambda entry: (entry / "a.npy").unlink(),
        lambda entry: (entry / "meta.json").unlink(),
        lambda entry: (entry / "meta.json").write_text("{"),
        lambda entry: (entry / "meta.json").write_text("null"),
    ],
)
def test_a_damaged_entry_is_made_again_with_a_warning(tmp_path, caplog, damage):
    cache.fetch(tmp_path, "e", make)
    damage(tmp_path / "e")
    with caplog.at_level(logging.WARNING):
        entry = cache.fetch(tmp_path, "e", make)
    np.testing.assert_array_equal(entry.arrays["a"][2], [4, 5])
    assert [r.message for r in caplog.records if "is damaged and is made again" in r.message]


def test_a_failed_make_leaves_nothing_but_the_lock(tmp_path):
    def fail(writer):
        make(writer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fetch(tmp_path, "e", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["e.lock"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / "e.partial" / "scratch").mkdir(parents=True)
    (tmp_path / "e.partial" / "a.npy").write_bytes(b"half")
    assert cache.fetch(tmp_path, "e", make).arrays["a"].shape == (4, 2)
    assert not (tmp_path / "e.partial").exists()


def test_blocks_without_rows_add_nothing(tmp_path):
    def with_empty_blocks(writer: cache.Writer) -> dict:
        writer.add("x", [np.arange(0), np.arange(3), np.arange(0)], 3)
        return {}

    assert cache.fetch(tmp_path, "entry", with_empty_blocks).arrays["x"].tolist() == [0, 1, 2]


def test_wrong_number_of_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="4 rows, 5 were announced"):
        cache.fetch(tmp_path, "e", lambda w: w.add("a", [np.zeros(4)], 5))


def test_of_processes_that_ask_at_once_one_makes(tmp_path):
    code = f"""
import time, numpy as np
from pathlib import Path
from fl_common.data import cache

def make(writer):
    time.sleep(0.5)
    writer.add("a", [np.arange(4)], 4)
    print("made")
    return {{}}

print(cache.fetch(Path({str(tmp_path)!r}), "e", make).arrays["a"].sum())
"""
    start = [sys.executable, "-c", code]
    running = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [process.communicate()[0].split() for process in running]
    assert sorted(lines, key=len) == [["6"], ["6"], ["made", "6"]]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="FLATFED_CACHE"):
        cache.fetch(tmp_path / "file" / "sub", "e", make)


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("FLATFED_CACHE", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path
    monkeypatch.delenv("FLATFED_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / ".cache" / "flatfed"


# Data sets in the cache


def folder(root, shade=0):
    for i in range(6):
        path = root / f"c{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (10 * i, shade, 0)).save(path)
    return root


def test_changed_files_are_decoded_again(tmp_path):
    root = folder(tmp_path / "f")
    first = load("folder", root, cache_dir=tmp_path / "cache")
    again = load("folder", root, cache_dir=tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    folder(root, shade=200)
    # In case the file system's clock is too coarse to see the change:
    os.utime(root / "c0" / "0.png", ns=(1, 1))
    changed = load("folder", root, cache_dir=tmp_path / "cache")
    assert changed.train.x[0, 1, 0, 0] == 200
    assert changed.fingerprint != first.fingerprint


def test_the_seed_is_in_the_key_only_where_it_is_used(tmp_path):
    for seed in range(3):
        load("digits", cache_dir=tmp_path, seed=seed)
    assert len([p for p in (tmp_path / "datasets").iterdir() if p.is_dir()]) == 1


def test_a_damaged_data_set_is_decoded_again(tmp_path, caplog):
    first = load("digits", cache_dir=tmp_path)
    pixels = first.train.x.copy()  # the file it is mapped from is about to shrink
    [entry] = (p for p in (tmp_path / "datasets").iterdir() if p.is_dir())
    with (entry / "train_x.npy").open("r+b") as file:
        file.truncate(1000)
    again = load("digits", cache_dir=tmp_path)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.train.x, pixels)
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("scheme", ["iid", "pathological"])
def test_a_warm_start_imports_numpy_alone(tmp_path, scheme):
    cold = load("digits", cache_dir=tmp_path)
    parts = cached_partition(cold, scheme=scheme, clients=10, seed=0, cache_dir=tmp_path)
    code = f"""
import sys
from fl_common.data.partition import cached_partition
from fl_common.data.sources import load
data = load("digits", cache_dir={str(tmp_path)!r})
parts = cached_partition(data, scheme={scheme!r}, clients=10, seed=0, cache_dir={str(tmp_path)!r})
heavy = ["datasets", "flwr_datasets", "sklearn", "PIL", "pandas", "pyarrow", "torch", "torchvision"]
print(data.fingerprint, parts[3].sum(), *(name for name in heavy if name in sys.modules))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [cold.fingerprint, str(parts[3].sum())]
