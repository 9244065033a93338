"""The processors that this process may use."""

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


def count() -> int:
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


def model() -> str:
    """The name of the processors, on which the last bits of a sum depend."""
    named = re.search(r"^model name\s*: (.*)$", INFO.read_text(), re.M) if INFO.exists() else None
    return named[1] if named else platform.machine()
