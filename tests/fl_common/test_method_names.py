"""What lies in strategies/ and regularizers/ is found by the name that it declares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import regularizers
from fl_common import config
from fl_common.config import ConfigError, Group, methods
from fl_server.cli import main
from regularizers.base import METHODS


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


@pytest.mark.parametrize("name", ["train", "moon", "stochastic-depth"])
def test_a_name_is_no_other_groups(name: str, monkeypatch: pytest.MonkeyPatch):
    """That of the settings themselves, or of a method of the other room."""
    known = {room: methods(room) for room in ("strategies", "regularizers")}
    known["strategies"] = known["strategies"] | {name: known["strategies"]["fedprox"]}
    monkeypatch.setattr(config, "methods", known.get)
    with pytest.raises(
        ConfigError, match=rf": keys named {name}\.\* exist already; choose another name"
    ):
        config.schema.__wrapped__()


@pytest.mark.parametrize("value", [[], None])
def test_a_default_is_a_settings(value: object, monkeypatch: pytest.MonkeyPatch):
    """TOML and Flower's settings have no such values, and reports compare none."""

    class Params(Group):
        my_key: list[str] | None = value

    mine = type("Mine", (), {"__module__": "strategies.mine", "Params": Params})
    monkeypatch.setattr(config, "methods", {"strategies": {"mine": mine}, "regularizers": {}}.get)
    with pytest.raises(ConfigError, match=r"strategies.mine: mine.my-key = .*: a setting is text"):
        config.schema.__wrapped__()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One more folder of regularizers."""
    monkeypatch.setattr(regularizers, "__path__", [*regularizers.__path__, str(tmp_path)])
    before = dict(METHODS)
    methods.cache_clear()
    yield tmp_path
    sys.modules.pop("regularizers.mine", None)
    METHODS.clear()
    METHODS.update(before)
    methods.cache_clear()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import nowhere", r"ModuleNotFoundError: No module named 'nowhere' \(.*mine.py:1\)"),
        ("def f(:", r"SyntaxError: .* \(mine.py, line 1\)"),
        ("\nmu = nu", r"NameError: name 'nu' is not defined \(.*mine.py:2\)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named(text: str, why: str, own: Path):
    (own / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=rf"^regularizers/mine.py: {why}; correct the file"):
        methods("regularizers")


def test_a_method_needs_no_settings_of_its_own(own: Path):
    base = "from regularizers.base import Regularizer\n"
    (own / "mine.py").write_text(f"{base}class Mine(Regularizer):\n    name = 'mine'\n")
    assert methods("regularizers")["mine"].Params.model_fields == {}


@pytest.mark.parametrize("call", [["suite", "x.toml"], ["node", "--superlink", "h:1"], ["config"]])
def test_every_command_tells_it_in_one_line(
    call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refused() -> None:
        raise ConfigError(["strategies.mine: fedprox is strategies.fedprox's name"])

    monkeypatch.setattr(config, "schema", refused)
    assert main([*call, "dp-clip=1"]) == 2
    told = capsys.readouterr().err
    assert told == "error: strategies.mine: fedprox is strategies.fedprox's name\n"
