"""What the user's own data and models fail with, and where."""

from __future__ import annotations

import sys
import traceback

OURS = {"fl_client", "fl_common", "fl_server", "regularizers", "strategies"}


def told(error: Exception) -> str:
    """An error on one line, with the last place of the user's own code, if it came from there."""
    place, said = "", str(error)
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
        known = OURS | sys.stdlib_module_names
        if module.partition(".")[0] not in known and "site-packages" not in file:
            place = f" ({file}:{line})"
    if isinstance(error, SyntaxError):
        place, said = f" ({error.filename}:{error.lineno})", error.msg
    if isinstance(error, ValueError) and not place:
        return said
    return ": ".join([type(error).__name__, *said.splitlines()[:1]]) + place
