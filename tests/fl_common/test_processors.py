from __future__ import annotations

import os

import pytest

from fl_common import processors


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "200000\n"}, 8),
    ],
)
def test_a_containers_quota_counts(tmp_path, monkeypatch, files, expected):
    """Of eight processors, by the files of cgroups v2 and v1."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(processors, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert processors.count() == expected


def test_where_there_are_no_affinities(tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "CGROUP", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processors.count() == 1


def test_their_name(tmp_path, monkeypatch):
    (tmp_path / "info").write_text("vendor_id\t: X\nmodel name\t: X 9 Processor\nmodel name\t: Y\n")
    monkeypatch.setattr(processors, "INFO", tmp_path / "info")
    assert processors.model() == "X 9 Processor"
    monkeypatch.setattr(processors, "INFO", tmp_path / "none")
    assert processors.model()
