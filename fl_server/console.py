"""What the commands share: exit codes, complaints, settings from files and arguments."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from fl_common.config import Scalar

OK, USAGE, FAILED, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 2, 3, 130, 141, 143


def complain(lines: Sequence[str]) -> int:
    """Tell mistakes of the call, one a line; gives the exit code."""
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return USAGE


def settings_of(args: argparse.Namespace) -> tuple[dict[str, Scalar], list[str]]:
    """The settings of files, under those of the command line, and every mistake in them."""
    from fl_common.config import flatten, from_text
    from fl_common.files import read_toml

    errors: list[str] = []
    values: dict[str, Scalar] = {}
    for file in args.config:
        try:
            read = read_toml(file)
            if "methods" in read:
                errors.append(f"--config {file}: is a suite; run it with flatfed suite {file}")
            else:
                values |= flatten(read)
        except OSError as error:
            errors.append(f"--config {file}: {error.strerror}")
        except ValueError as error:
            errors.append(f"--config {file}: not a TOML file: {error}")
    given: dict[str, str] = {}
    for item in args.values:
        key, equals, value = item.partition("=")
        if not key or not equals:
            errors.append(f"{item}: settings are written key=value")
            continue
        if key in given:
            errors.append(f"{key}: given twice, {given[key]!r} and {value!r}")
        given[key] = value
    return values | from_text(given), errors


def show(table: RenderableType) -> None:
    """Print what rich draws: as wide as the terminal, or 120 columns and what it needs."""
    from fl_report.terminal import console

    console(table, 120).print(table)


def failed(why: str) -> int:
    """Tell why a run failed; gives the exit code."""
    print(f"error: the run failed: {why}", file=sys.stderr)
    return FAILED
