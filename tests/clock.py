"""A clock for what polls and waits."""

from __future__ import annotations


class Clock:
    """In the place of the module `time`: time passes only while one waits [s]."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
