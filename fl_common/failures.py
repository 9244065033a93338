"""How a client's failure is worded, the same on all engines."""

from __future__ import annotations

from fl_common.user_code import place


class Failed(Exception):
    """Why there is no reply, in the words that become the client's failure."""


def reason(error: Exception) -> str:
    """The error's class and text, as in the last line of a traceback, and the place in a model, in
    data or in a method's file that it came from."""
    if isinstance(error, Failed):
        return str(error)
    first, *more = str(error).splitlines() or [""]
    return "\n".join([f"{type(error).__name__}: {first}{place(error)}", *more])


def first_line(error: Exception) -> str:
    """The first line of an error's text; its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


LONGEST = 500
"""Characters of a client's own text that a message shows."""


def harmless(text: str) -> str:
    """A stranger's text, safe to print: of bounded length, and without control characters."""
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
