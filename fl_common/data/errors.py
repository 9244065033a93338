"""The one error that a user's mistake with data becomes."""


class DataError(ValueError):
    """A mistake in the data's settings or files; one line: what is wrong, where, the remedy."""
