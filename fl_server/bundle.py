"""The folder that Flower bundles and ships: the checkout, or a copy of the installed packages."""

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


@contextmanager
def app_directory() -> Iterator[Path]:
    """The Flower app to run; a copy made from an installed wheel is removed afterwards."""
    root = Path(__file__).resolve().parents[1]
    if _is_checkout(root):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="flatfed-app-") as folder:
        app = Path(folder) / "flatfed"
        for package in PACKAGES:
            shutil.copytree(
                root / package, app / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        (app / "pyproject.toml").write_text(_pyproject())
        yield app


def _is_checkout(root: Path) -> bool:
    path = root / "pyproject.toml"
    return path.exists() and read_toml(path)["project"]["name"] == "flatfed"


def _pyproject() -> str:
    needs = [need for need in requires("flatfed") or [] if "extra ==" not in need]
    return (
        f'[project]\nname = "flatfed"\nversion = "{version("flatfed")}"\n'
        f'license = "Apache-2.0"\ndependencies = {needs}\n\n'
        f'[tool.flwr.app]\npublisher = "flatfed"\nfab-exclude = {list(COMMANDS)}\n\n'
        "[tool.flwr.app.components]\n"
        'serverapp = "fl_server.app:app"\nclientapp = "fl_client.app:app"\n\n' + flower_section()
    )
