"""The page of methods is what the code says."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from fl_common.config import ConfigError, dashed, methods, resolve
from fl_common.local import Work
from fl_report.methods import page

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
REGULARIZERS = methods("regularizers")


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run: python -m fl_report.methods > docs/methods.md"


def test_every_method_and_key_is_on_it():
    text = PAGE.read_text()
    for room in ("strategies", "regularizers"):
        for name, cls in methods(room).items():
            if ":" not in name:
                assert f"### `{name}`" in text
                for field in cls.Params.model_fields:
                    assert f"`{name}.{field.rstrip('_').replace('_', '-')}`" in text


def test_what_a_client_remembers_is_on_it():
    """With any setting: docs/fedpart.md has local statistics."""
    work = Work.of(resolve({}), 1, 1, 1)
    for name, cls in methods("strategies").items():
        if ":" in name:
            continue
        part = PAGE.read_text().partition(f"### `{name}`")[2].partition("### `")[0]
        told = part.partition("A client remembers ")[2].partition(", the server")[0]
        assert set(cls.Rule.memory) <= set(told.split(", ")) | {"nothing"}
        for key, field in cls.Params.model_fields.items():
            for choice in get_args(field.annotation):
                own = cls.Rule(cls.Params(**{key: choice}), work).memory
                assert own == cls.Rule.memory or f"`{name}.{dashed(key)}={choice}`" in told


def settings(name: str) -> dict[str, object]:
    shape = {"data.source": "synthetic", "model.name": "resnet8"}
    return {**shape, "regularizers": name} | ({"model.head": "moon"} if name == "moon" else {})


@pytest.mark.parametrize("name", REGULARIZERS)
def test_neutral_settings_are_settings(name: str):
    key, value = REGULARIZERS[name].neutral.split("=")
    kind = int if name == "gradaug" else float
    resolve({**settings(name), key: kind(value)})


@pytest.mark.parametrize("name", REGULARIZERS)
def test_what_the_page_calls_refused_is_refused(name: str):
    refused = {
        s for s, cls in methods("strategies").items() if ":" not in s and name in cls.refuses
    }
    for strategy in refused:
        with pytest.raises(ConfigError, match=f"{name} with strategy {strategy}"):
            resolve({**settings(name), "strategy.name": strategy})
