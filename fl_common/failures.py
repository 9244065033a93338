"""How a client's failure is told: alike on all engines."""

from __future__ import annotations

from fl_common.own import place


class Failed(Exception):
    """Why there is no reply, in the words that become the client's failure."""


def reason(error: Exception) -> str:
    """Its class and its text, as the last line of a traceback has them, and where in a model, in
    data or in a method's file."""
    if isinstance(error, Failed):
        return str(error)
    first, *more = str(error).splitlines() or [""]
    return "\n".join([f"{type(error).__name__}: {first}{place(error)}", *more])


LONGEST = 500
"""Characters of what a client says of itself, in a line for people."""


def harmless(text: str) -> str:
    """A stranger's words: of bounded length, and with nothing that a terminal obeys."""
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
