"""How a client's failure is told: alike on all engines."""

from __future__ import annotations


class Failed(Exception):
    """Why there is no reply, in the words that become the client's failure."""


def reason(error: Exception) -> str:
    """Its class and its text, as the last line of a traceback has them."""
    return str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
