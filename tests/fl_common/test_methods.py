"""What lies in strategies/ and regularizers/ is found by the name that it declares."""

from __future__ import annotations

import pytest

from fl_common.config import ConfigError, methods


@pytest.mark.parametrize(
    ("room", "name"), [("strategies", "fedprox"), ("regularizers", "proximal")]
)
def test_a_name_is_one_files_alone(room: str, name: str):
    """A copy of a file would else silently stand in the place of the method it was copied from."""
    known = methods(room)[name]
    line = f"{room}.mine: {name} is {known.__module__}'s name; choose another"
    with pytest.raises(ConfigError, match=line):
        type("Copy", (known,), {"__module__": f"{room}.mine", "name": name})
    type("Half", (known,), {"__module__": f"{room}.mine"})  # declares none: it is no method
    methods.cache_clear()
    assert methods(room)[name] is known
