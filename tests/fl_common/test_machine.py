from __future__ import annotations

import os
import sys

import pytest

from fl_common import machine


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
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.processors() == expected


def test_where_there_are_no_affinities(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.processors() == 1


def test_their_name(tmp_path, monkeypatch):
    (tmp_path / "info").write_text("vendor_id\t: X\nmodel name\t: X 9 Processor\nmodel name\t: Y\n")
    monkeypatch.setattr(machine, "INFO", tmp_path / "info")
    assert machine.processor() == "X 9 Processor"
    monkeypatch.setattr(machine, "INFO", tmp_path / "none")
    assert machine.processor()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8192),
        ({"memory.max": "max\n", "memory.current": "100\n"}, 8192),
        ({"memory.max": "5000\n", "memory.current": "4000\n"}, 1000),
        (
            {
                "memory.max": "5000\n",
                "memory.current": "4000\n",
                "memory.stat": "anon 100\ninactive_file 2500\n",
            },
            3500,
        ),
        ({"memory.max": "5000\n", "memory.current": "6000\n"}, 0),
        (
            {"memory/memory.limit_in_bytes": "5000\n", "memory/memory.usage_in_bytes": "4000\n"},
            1000,
        ),
    ],
)
def test_a_containers_limit_counts_less_what_is_only_cached(tmp_path, monkeypatch, files, expected):
    files = {"info": "MemTotal: 16 kB\nMemAvailable:   8 kB\n", **files}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "info")
    assert machine.free_bytes() == expected


def test_where_nothing_tells_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "info")
    assert machine.free_bytes() == sys.maxsize
