"""What a user gets: `make demo` in fresh clones, plain `flwr run`, the wheel, the Flower bundle."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flwr.cli.build import build_fab_from_disk

from fl_common.sockets import free_port
from fl_server.bundle import COMMANDS, app_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "fl_client",
    "fl_common",
    "fl_flatness",
    "fl_report",
    "fl_server",
    "regularizers",
    "strategies",
)
PATH = "/usr/local/bin:/usr/bin:/bin"
LIMIT = 1500  # s, for two installations at once on a busy machine with a cold package index
MAY_BE_IN_HOME = {
    ".cache",
    ".cache/flatfed",
    ".cache/matplotlib",
    ".cache/pip",
    ".config",
    ".config/matplotlib",
}
FLOWER = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ADDRESS": "",  # Ray would join a cluster of someone else's
}
BUNDLE_NAMES = """
import io, json, zipfile
from flwr.cli.build import build_fab_from_disk
from fl_server.bundle import app_directory

with app_directory() as app:
    fab = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app)))
print(json.dumps([str(app), fab.namelist()]))
"""


def modules(root: Path, *, without: Iterable[str] = COMMANDS) -> list[str]:
    """The .py files of the rooms; those that run on servers and clients, unless told."""
    files = {file for room in ROOMS for file in (root / room).rglob("*.py")}
    files -= {file for pattern in without for file in root.glob(pattern)}
    return sorted(file.relative_to(root).as_posix() for file in files)


def test_flower_bundle_holds_the_rooms_and_nothing_else():
    """By plain `flwr run` in the checkout, and of the copy that `flatfed run` makes of it."""
    with app_directory() as app:
        bundle = build_fab_from_disk(app)
        assert len([*app.rglob("*")]) < 500
    assert bundle == build_fab_from_disk(ROOT)
    with zipfile.ZipFile(io.BytesIO(bundle)) as fab:
        names = fab.namelist()
    assert {"fl_client/app.py", "fl_common/data/images.py"} <= set(modules(ROOT))
    assert sorted(names) == sorted([".info/CONTENT", "pyproject.toml", *modules(ROOT)])


def environment(home: Path) -> dict[str, str]:
    """The least a user has: a home (which marks the processes) and a PATH; pip's settings too.

    With SPT_NOENV, the processes of Ray that change their title keep their environment readable.
    """
    pip = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    return {"HOME": str(home), "PATH": PATH, "SPT_NOENV": "1", **pip}


def living(home: Path) -> dict[int, str]:
    """Process id and command line of every process whose home is `home`."""
    entry, found = f"\0HOME={home}\0".encode(), {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if entry in b"\0" + (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            pass
    return found


def end(processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@dataclass(frozen=True)
class Demo:
    """A clone, and what one `make demo` in it did."""

    clone: Path
    home: Path
    code: int
    lines: list[tuple[float, str]]
    """Seconds since the start, line."""
    during: str
    """Command lines of its processes while rounds ran."""

    @property
    def output(self) -> str:
        return "\n".join(line for _, line in self.lines)

    @property
    def results(self) -> Path:
        return Path(re.findall(r"(?m)^results: (.*)$", self.output)[-1])

    def seconds_at(self, start: str) -> float:
        """When the first line came that starts so."""
        return next(seconds for seconds, line in self.lines if line.startswith(start))


def python_for_make() -> list[str]:
    """Nothing if the PATH has a Python that can be used; else the variable that names one."""
    usable = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
    found = shutil.which("python3", path=PATH)
    if found and subprocess.run([found, "-c", usable], capture_output=True).returncode == 0:
        return []
    return [f"PYTHON={Path(sys.base_prefix, 'bin', 'python3')}"]


def make_demo(clone: Path, home: Path, **more: str) -> Demo:
    command = ["timeout", "--kill-after=30", str(LIMIT), "make", "demo", *python_for_make()]
    lines, during, start = [], "", time.monotonic()
    with subprocess.Popen(
        command,
        cwd=clone,
        env=environment(home) | more,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as make:
        for line in make.stdout:
            lines.append((time.monotonic() - start, line.rstrip("\n")))
            if line.startswith("round ") and not during:
                during = "\n".join(living(home).values())
    lines.append((time.monotonic() - start, "end"))
    return Demo(clone, home, make.returncode, lines, during)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Demo]]:
    """`make demo` in two fresh clones of HEAD at once."""
    if sys.platform != "linux" or not all(map(shutil.which, ("git", "make", "timeout"))):
        pytest.skip("needs Linux, git, make and timeout")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    places = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for place in places:
        git(place, "clone", "--quiet", str(ROOT), "flatfed")
        (place / "home").mkdir()
    try:
        with ThreadPoolExecutor(2) as pool:
            yield list(pool.map(lambda p: make_demo(p / "flatfed", p / "home"), places))
    finally:
        for place in places:
            end(living(place / "home"))
            shutil.rmtree(place / "flatfed/.venv", ignore_errors=True)  # a gigabyte


def git(folder: Path, *arguments: str) -> bytes:
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", *arguments]
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True).stdout


@pytest.mark.long
def test_two_fresh_clones_run_the_demo_at_once(demos: list[Demo], tmp_path: Path):
    for demo in demos:
        assert demo.code == 0, demo.output
        install = demo.seconds_at("PATH=")
        print(f"install {install:.0f} s, demo {demo.lines[-1][0] - install:.0f} s")

        # Rounds are told as they end, and the place of the results at both ends.
        rounds = [seconds for seconds, line in demo.lines if line.startswith("round ")]
        assert len(rounds) == 30
        assert rounds[-1] - rounds[0] > 1
        assert demo.output.count(f"results: {demo.results}") == 2
        assert demo.results.parent == demo.clone / "results"

        found = summary(demo.results)
        assert found["status"] == "completed"
        assert found["engine"] == "ray"
        assert found["clients"] == 10
        assert found["rounds"] == 30
        assert found["accuracy"] >= 0.9

        # What they started was seen, and is gone with its folder.
        for name in ("flower-superlink", "flower-superexec", "flwr-simulation", "raylet", "ray::"):
            assert name in demo.during
        assert living(demo.home) == {}
        private = set(re.findall(r"/tmp/flatfed-\w+", demo.output))
        assert private
        assert not any(Path(folder).exists() for folder in private)

        assert git(demo.clone, "status", "--porcelain") == b""
        left = {path.relative_to(demo.home) for path in demo.home.rglob("*")}
        assert {"/".join(path.parts[:2]) for path in left} <= MAY_BE_IN_HOME

    hashes = {summary(demo.results)["model_sha256"] for demo in demos}
    env = environment(demos[0].home)
    settings = (f"run.output-dir={tmp_path}", "run.name=alone")
    alone = [demos[0].clone / ".venv/bin/flatfed", "run", *settings]
    subprocess.run(alone, cwd=tmp_path, env=env, check=True, capture_output=True)
    assert hashes == {summary(tmp_path / "alone")["model_sha256"]}


@pytest.mark.long
def test_a_run_that_fails_fails_the_command(demos: list[Demo], tmp_path: Path):
    clone, home = demos[0].clone, demos[0].home
    cache = tmp_path / "cache"
    cache.write_text("a file, where a folder is needed")
    before = set((clone / "results").iterdir())
    broken = make_demo(clone, home, FLATFED_CACHE=str(cache))
    assert broken.code == 2  # make's own
    assert f"error: FLATFED_CACHE: {cache} cannot be written to" in broken.output
    assert set((clone / "results").iterdir()) == before  # nothing was started

    settings = ("engine.name=ray", "clients.deadline-s=0.001", "run.name=late")
    command = [clone / ".venv/bin/flatfed", "run", *settings, f"run.output-dir={tmp_path}"]
    env = environment(home)
    late = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert late.returncode == 3
    # Of the roll call, or of the first round where all were quicker than it looked for them.
    assert re.search(r"(part after|reply within) 0\.001 s \(clients\.deadline-s\)", late.stderr)
    assert summary(tmp_path / "late")["status"] == "failed"
    assert living(home) == {}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets, whose paths may not be long, go here."""
    with tempfile.TemporaryDirectory(prefix="flatfed-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.long
def test_plain_flwr_run(demos: list[Demo], tmp_path: Path, short_folder: Path):
    """With Flower's default of 2 nodes it ends at once and names the flag; with that, it runs."""
    clone, home, empty = demos[0].clone, tmp_path / "home", tmp_path / "empty"
    home.mkdir()
    empty.mkdir()
    http, control = str(free_port()), str(free_port())
    env = environment(home) | FLOWER
    env |= {
        "PATH": f"{clone / '.venv/bin'}:{PATH}",
        "FLWR_HOME": str(tmp_path / "flower"),
        "RAY_TMPDIR": str(short_folder),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http,
        "FLWR_LOCAL_CONTROL_API_PORT": control,
    }

    def flwr_run(*options: str) -> str:
        command = ["timeout", "300", clone / ".venv/bin/flwr", "run", clone, "--stream", *options]
        start = time.monotonic()
        done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)
        print(f"flwr run: {time.monotonic() - start:.0f} s")
        assert done.returncode == 0, done.stdout + done.stderr  # Flower's, whatever the app did
        return done.stdout + done.stderr

    def results(output: str) -> Path:
        return Path(re.findall(r"(?m)^results: (.*)$", output)[-1])

    try:
        output = flwr_run()
        superlinks = [pid for pid, line in living(home).items() if "flower-superlink" in line]
        assert len(superlinks) == 1

        told = re.search(r"(?m)^run failed: (.*)$", output)[1]
        assert "clients.number = 10" in told
        assert "2 nodes" in told
        first = results(output)
        assert first.parent == home / "flatfed-results"
        assert summary(first)["status"] == "failed"
        assert summary(first)["error"] == told
        assert summary(first)["wall_s"] < 10

        words = shlex.split(told)
        flag = words.index("--federation-config")
        second = results(flwr_run(*words[flag : flag + 2]))
        assert second.parent == home / "flatfed-results"
        assert summary(second)["engine"] == "ray"
        expected = summary(demos[0].results)["model_sha256"]
        assert summary(second)["model_sha256"] == expected

        # Flower leaves its SuperLink behind; the rest follows it.
        os.kill(superlinks[0], signal.SIGTERM)
        deadline = time.monotonic() + 30
        while living(home) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert living(home) == {}
    finally:
        end(living(home))
    assert list(empty.iterdir()) == []
    assert git(clone, "status", "--porcelain") == b""


@pytest.mark.long
def test_the_wheel_runs_without_a_checkout(demos: list[Demo], tmp_path: Path):
    """The last test of this file: in the second clone's environment it takes the clone's place."""
    checkout, home = demos[1].clone, demos[1].home
    binaries, env = checkout / ".venv/bin", environment(home)

    def call(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    quiet = ("--quiet", "--disable-pip-version-check")
    call(binaries / "pip", "wheel", *quiet, "--no-deps", "--wheel-dir", tmp_path, checkout)
    (wheel,) = tmp_path.glob("flatfed-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == modules(checkout, without=())

    call(binaries / "pip", "uninstall", *quiet, "--yes", "flatfed")
    call(binaries / "pip", "install", *quiet, "--no-deps", "--no-index", wheel)
    (tmp_path / "temporary").mkdir()
    env["TMPDIR"] = str(tmp_path / "temporary")
    app, bundled = json.loads(call(binaries / "python", "-c", BUNDLE_NAMES))
    assert Path(app).is_relative_to(tmp_path / "temporary")
    assert sorted(bundled) == sorted([".info/CONTENT", "pyproject.toml", *modules(checkout)])

    found = []
    for engine in ("inprocess", "ray"):
        settings = (f"engine.name={engine}", "run.rounds=1", f"run.name={engine}")
        call(binaries / "flatfed", "run", *settings)
        found.append(summary(tmp_path / "results" / engine))
    assert [(row["status"], row["engine"]) for row in found] == [
        ("completed", "inprocess"),
        ("completed", "ray"),
    ]
    assert found[0]["model_sha256"] == found[1]["model_sha256"]
    assert list((tmp_path / "temporary").iterdir()) == []
    assert living(home) == {}
