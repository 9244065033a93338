"""What this process may use of its machine: processors and memory."""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Of this process's container, in a container."""
INFO = Path("/proc/cpuinfo")
MEMORY = Path("/proc/meminfo")


def processors() -> int:
    """How many there are for this process, at least 1: its affinity, or fewer where a container's
    quota (`docker run --cpus`) leaves less."""
    affinity = getattr(os, "sched_getaffinity", None)
    found = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(found, _quota()))


def _quota() -> int:
    """Processors that a container may use, rounded up."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((CGROUP / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota.isdecimal():  # "max" and -1 are none
            return math.ceil(int(quota) / int(period))
    return sys.maxsize


def processor() -> str:
    """The processors' name: on their kind depend the last bits of a sum."""
    named = re.search(r"^model name\s*: (.*)$", INFO.read_text(), re.M) if INFO.exists() else None
    return named[1] if named else platform.machine()


def free_bytes() -> int:
    """Memory that can be had: the machine's, or what a container's limit leaves."""
    found = [sys.maxsize]
    if MEMORY.exists():
        found.append(1024 * _number(MEMORY, "MemAvailable:"))
    limits = CGROUP / "memory.max", CGROUP / "memory/memory.limit_in_bytes"
    used = CGROUP / "memory.current", CGROUP / "memory/memory.usage_in_bytes"
    for limit, now in zip(limits, used, strict=True):
        if limit.exists() and limit.read_text().strip().isdecimal():
            # Files that were read stay in memory until it is needed.
            cached = _number(limit.with_name("memory.stat"), "inactive_file ")
            found.append(max(0, int(limit.read_text()) - int(now.read_text()) + cached))
    return min(found)


def _number(path: Path, name: str) -> int:
    """The number behind the line's name; 0 if there is none."""
    line = re.search(rf"^{name}\s*(\d+)", path.read_text(), re.M) if path.exists() else None
    return int(line[1]) if line else 0
