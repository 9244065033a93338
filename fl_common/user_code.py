"""Errors of the user's own data, models and methods, and where they come from."""

from __future__ import annotations

import sys
import traceback
from importlib.util import find_spec

METHODS = {"regularizers", "strategies"}
OURS = {"fl_client", "fl_common", "fl_flatness", "fl_server"}


def is_there(module: str) -> bool:
    """Whether there is such a module.  It is not imported, but the packages around it are; whatever
    else fails in them is raised."""
    if not all(part.isidentifier() for part in module.split(".")):
        return False
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            return False
        raise


def told(error: Exception) -> str:
    """An error on one line, with the last place of the user's own data or model, if it came from
    there."""
    where, said = place(error, OURS | METHODS), str(error)
    if isinstance(error, SyntaxError):
        where, said = f" ({error.filename}:{error.lineno})", error.msg
    if isinstance(error, ValueError) and not where:
        return said
    return ": ".join([type(error).__name__, *said.splitlines()[:1]]) + where


def place(error: Exception, ours: set[str] = OURS) -> str:
    """The last place that an error came through outside these packages and all libraries, as
    " (file:line)"; "" if there is none."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
        known = ours | sys.stdlib_module_names
        if module.partition(".")[0] not in known and "site-packages" not in file:
            found = f" ({file}:{line})"
    return found
