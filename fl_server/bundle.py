"""The folder that Flower bundles and ships: the code of servers and clients, and no more."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from importlib.metadata import requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from fl_common.files import read_toml
from fl_common.pyproject import flower_section

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = (
    "fl_common",
    "fl_client",
    "fl_flatness",
    "fl_server",
    "fl_report",
    "strategies",
    "regularizers",
)
COMMANDS = (
    "fl_server/*_commands.py",
    "fl_server/bundle.py",
    "fl_server/certificates.py",
    "fl_server/cli.py",
    "fl_server/console.py",
    "fl_server/federation.py",
    "fl_server/flower_run.py",
    "fl_server/suites.py",
    "fl_report/suite*.py",
)
"""What only the `flatfed` command runs: no server or client needs to be sent it."""


def checkout() -> Path | None:
    """FlatFed's own checkout, if it runs from one."""
    root = Path(__file__).resolve().parents[1]
    path = root / "pyproject.toml"
    return root if path.exists() and read_toml(path)["project"]["name"] == "flatfed" else None


@contextmanager
def app_directory() -> Iterator[Path]:
    """The Flower app to run: a copy, removed afterwards.  In a checkout Flower would look at every
    file, those of .venv and results too, which takes seconds; it does all the same where
    pyproject.toml asks for a bundle of more than the packages."""
    own, root = checkout(), Path(__file__).resolve().parents[1]
    patterns = [f"{package}/**/*.py" for package in PACKAGES]
    if own:
        told = read_toml(root / "pyproject.toml")["tool"]["flwr"]["app"]
        if {*told.get("fab-include", ())} != {*patterns}:
            yield root
            return
        patterns += ["pyproject.toml", ".gitignore"]
    with tempfile.TemporaryDirectory(prefix="flatfed-app-") as folder:
        app = Path(folder) / "flatfed"
        for path in (path for pattern in patterns for path in root.glob(pattern)):
            if path.is_file() and not path.is_symlink():
                copy = app / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
        if not own:
            (app / "pyproject.toml").write_text(_pyproject())
        yield app


def _pyproject() -> str:
    needs = [need for need in requires("flatfed") or [] if "extra ==" not in need]
    return (
        f'[project]\nname = "flatfed"\nversion = "{version("flatfed")}"\n'
        f'license = "Apache-2.0"\ndependencies = {needs}\n\n'
        f'[tool.flwr.app]\npublisher = "flatfed"\nfab-exclude = {list(COMMANDS)}\n\n'
        "[tool.flwr.app.components]\n"
        'serverapp = "fl_server.app:app"\nclientapp = "fl_client.app:app"\n\n' + flower_section()
    )
