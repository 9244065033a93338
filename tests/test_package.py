"""What is true of the package as a whole: its rooms, its imports, its one source of settings."""

from __future__ import annotations

import ast
import fnmatch
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from fl_common.config import meaning
from fl_server.bundle import COMMANDS, app_directory
from fl_server.cli import main

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def is_room(folder: Path) -> bool:
    patterns = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    is_package = folder.is_dir() and any(folder.glob("*.py"))
    return is_package and any(fnmatch.fnmatch(folder.name, p) for p in patterns)


ROOMS = sorted(folder.name for folder in ROOT.iterdir() if is_room(folder))
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
TREES = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in FILES}


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of all that a module imports, at any depth of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: -node.level + 1 or None]
                base = ".".join([*above, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def package_of(path: str) -> str:
    return ".".join(Path(path).parent.parts)


IMPORTS = {path: set(imports(tree, package_of(path))) for path, tree in TREES.items()}


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def test_pyproject_says_what_flatfed_config_prints(capsys):
    assert main(["config"]) == 0
    printed = flat(tomllib.loads(capsys.readouterr().out))
    kept = flat(PYPROJECT["tool"]["flwr"]["app"]["config"])
    assert kept == printed
    assert list(kept) == list(printed)
    assert {key: type(v) for key, v in kept.items()} == {key: type(v) for key, v in printed.items()}
    assert not [key for key in kept if "_" in key]


def test_write_pyproject_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert main(["config", "--write-pyproject"]) == 0
    assert (tmp_path / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()


def test_write_pyproject_repairs_the_section_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    good = (ROOT / "pyproject.toml").read_text()
    spoilt = good.replace("rounds = 30", "rounds = 31\nodd = 1").replace("# local epochs", "# x")
    assert spoilt != good
    (tmp_path / "pyproject.toml").write_text(spoilt)
    assert main(["config", "--write-pyproject"]) == 0
    assert (tmp_path / "pyproject.toml").read_text() == good


def test_a_run_on_flower_says_that_pyproject_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Flower would refuse the key of a method that was written since, and say no more."""
    path = tmp_path / "pyproject.toml"
    path.write_text((ROOT / "pyproject.toml").read_text().replace("\nmu = ", "\nnu = "))
    monkeypatch.setattr("fl_server.bundle.checkout", lambda: tmp_path)
    assert main(["run", "engine.name=ray", f"run.output-dir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: its keys do not match the methods (")
    assert "fedprox.mu" in line and "flatfed config --write-pyproject" in line
    assert [*tmp_path.iterdir()] == [path]


def test_config_explains_every_key(capsys):
    """Each key stands under a line that says what it means."""
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if line and line[0] not in "#[":
            assert above.startswith("# "), line


def test_a_key_of_a_method_of_ones_own_may_lack_words():
    class Params(BaseModel):
        mu: float = Field(0.1, gt=0)
        nu: float = 0.0

    told = [meaning(field) for field in Params.model_fields.values()]
    assert told == ["no description (greater than 0)", "no description"]


@pytest.mark.parametrize(
    ("group", "keys"),
    [
        ("run", "rounds seed name output-dir resume"),
        ("clients", "number per-round sampling min-replies deadline-s"),
        ("data", "source path partition alpha min-size augment"),
        ("model", "name norm"),
        (
            "train",
            "optimizer lr lr-decay momentum weight-decay clip-norm epochs batch-size device dtype "
            "threads deterministic",
        ),
        ("strategy", "name params"),
        ("engine", "name connection workers cohort"),
        ("client", "state-dir"),
        ("eval", "every on"),
        ("flatness", "every samples engine layers match"),
        ("fedprox", "mu"),
        ("proximal", "mu"),
    ],
)
def test_fixed_names(group: str, keys: str):
    assert set(keys.split()) <= set(PYPROJECT["tool"]["flwr"]["app"]["config"][group])


def test_regularizers_is_a_key_of_its_own():
    assert PYPROJECT["tool"]["flwr"]["app"]["config"]["regularizers"] == ""


def test_flower_accepts_every_value():
    """A run config holds str, int, float and bool alone."""
    for key, value in flat(PYPROJECT["tool"]["flwr"]["app"]["config"]).items():
        assert isinstance(value, str | int | float | bool), key


def modules_after(code: str) -> set[str]:
    """Names in sys.modules after `code` has run in a fresh interpreter."""
    report = "\nimport sys as _s, json as _j; print('\\n' + _j.dumps(sorted(_s.modules)))"
    command = [sys.executable, "-c", code + report]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_imports_neither_torch_nor_flwr(arguments: list[str]):
    loaded = roots(
        modules_after(
            "from fl_server.cli import main\n"
            f"try: main({arguments})\n"
            "except SystemExit as stop: assert not stop.code"
        )
    )
    heavy = {"torch", "flwr", "torchvision", "datasets", "sklearn", "matplotlib", "numpy", "ray"}
    assert not loaded & heavy


def test_client_app_imports_the_standard_library_and_flwr_alone():
    """Flower starts a process for every message: a resident worker must not pay for torch."""
    flower = modules_after("import flwr.app, flwr.clientapp")
    ours = modules_after("import flwr.app, flwr.clientapp, fl_client.app")
    added = roots(ours) - roots(flower)
    assert "fl_client.app" in ours
    assert "torch" not in roots(ours)
    assert {name for name in added - set(ROOMS) if name not in sys.stdlib_module_names} == set()


def test_package_init_files_are_empty():
    found = [file for file in FILES if file.name == "__init__.py"]
    assert {file.parent.name for file in found} >= set(ROOMS)
    assert [str(file) for file in found if file.read_bytes()] == []


MAY_IMPORT = {
    "fl_common": set(),
    "strategies": {"fl_common"},
    "regularizers": {"fl_common"},
    "fl_client": {"fl_common", "fl_flatness", "strategies", "regularizers"},
    "fl_flatness": {"fl_common"},
    "fl_report": {"fl_common"},
}


@pytest.mark.parametrize("path", list(TREES))
def test_dependencies_point_one_way(path: str):
    room = Path(path).parts[0]
    used = {name.partition(".")[0] for name in IMPORTS[path]}
    others = (used & (set(ROOMS) | {"fl_server", "fl_client", "benchmarks", "tests"})) - {room}
    if room == "fl_server":
        assert not others & {"benchmarks", "tests"}
    else:
        assert others <= MAY_IMPORT[room], f"{path} imports {others - MAY_IMPORT[room]}"


def test_rooms_of_the_plan_exist():
    assert {
        "fl_client",
        "fl_common",
        "fl_flatness",
        "fl_report",
        "fl_server",
        "regularizers",
        "strategies",
    } <= set(ROOMS)


def test_the_bundle_holds_every_room():
    patterns = PYPROJECT["tool"]["flwr"]["app"]["fab-include"]
    bundled = {file for pattern in patterns for file in ROOT.glob(pattern)}
    commands = {file for pattern in COMMANDS for file in ROOT.glob(pattern)}
    assert PYPROJECT["tool"]["flwr"]["app"]["fab-exclude"] == list(COMMANDS)
    assert set(FILES) <= bundled
    assert ROOT / "fl_server/suites.py" in commands
    left_out = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in commands}
    for file in bundled - commands:
        path = file.relative_to(ROOT).as_posix()
        typed = ("if TYPE_CHECKING:", "if typing.TYPE_CHECKING:")
        run = [node for node in TREES[path].body if not ast.unparse(node).startswith(typed)]
        used = set(imports(ast.Module(run, []), package_of(path)))
        assert not used & left_out, f"{path} imports what is not in the bundle"
    assert {file.relative_to(ROOT).parts[0] for file in bundled} <= set(ROOMS)


def test_a_bundle_that_is_to_hold_more_is_made_of_the_checkout(monkeypatch: pytest.MonkeyPatch):
    """Flower's patterns are those of .gitignore, not of Python."""
    with app_directory() as app:
        assert app != ROOT
    assert not app.exists()
    more = tomllib.loads((ROOT / "pyproject.toml").read_text())
    more["tool"]["flwr"]["app"]["fab-include"].append("mine/")
    monkeypatch.setattr("fl_server.bundle.read_toml", lambda path: more)
    with app_directory() as app:
        assert app == ROOT
    assert (ROOT / "pyproject.toml").exists()


def test_one_file_at_most_imports_torchvision():
    users = {
        path for path, names in IMPORTS.items() if "torchvision" in {n.split(".")[0] for n in names}
    }
    assert users <= {"fl_common/data/vision.py"}


FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


@pytest.mark.parametrize("path", list(TREES))
def test_nothing_is_unpickled_or_evaluated(path: str):
    assert not {name.partition(".")[0] for name in IMPORTS[path]} & FORBIDDEN
    assert not IMPORTS[path] & {"torch.load", "torch.serialization", "torch.package"}
    for node in ast.walk(TREES[path]):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.load", where
            assert ast.unparse(node) != "pandas.read_pickle", where
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), where
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), where
            assert node.value.value is False, where


def test_the_search_finds_what_it_looks_for():
    """The checks above see a forbidden line where there is one."""
    source = "import a.b\nfrom torch import load\nfrom . import c\nfrom ..d import e\n"
    source += "import_module('pickle')"
    found = set(imports(ast.parse(source), "room.sub"))
    assert found >= {"a.b", "torch.load", "room.sub.c", "room.d.e", "pickle"}
