"""One run of a Flower app: in simulation, or on a SuperLink that is there already.

Simulation is private while it lasts, and nothing is left behind afterwards. Left to itself, `flwr
run` shares one SuperLink per machine, lets it live on after the run, takes whatever environment and
working directory it was first started with, and exits 0 when the ServerApp crashed. Here every run
has its own Flower home, its own empty working directory (Ray's actors import from there first), its
own SuperLink and its own Ray session, in one temporary folder.

All of it is started by a keeper: a child process that needs only the standard library. On Linux the
keeper adopts every orphan among its descendants (Ray's processes leave their sessions and process
groups, not their ancestry), so it can end them all; and it does so as soon as its standard input
closes, which the end of the caller, even by SIGKILL, cannot avoid. Elsewhere a process whose parent
has died escapes the keeper.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_common import processes, sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

BIN = Path(sys.executable).parent
CONNECTION = "private"
START_TIMEOUT = 60.0  # s, for the SuperLink to listen
LIST_TIMEOUT = 60.0  # s, for `flwr list` to answer
SUBMIT_TIMEOUT = 120.0  # s, for a SuperLink to take a run
STOP_TIMEOUT = 30.0  # s, for a SuperLink to stop a run
QUIET = 30.0  # s without a line from a run, after which its status is asked for
LOST = 60.0  # s without an answer from the SuperLink, after which a run is given up
POLL = 0.05  # s
LONGEST_ROOT = 20  # bytes; Ray's socket paths add up to 85, and Linux allows 107
REFUSED = "Flower refused the run"
RESULT = "\0flatfed-result "  # begins the keeper's last line
KEEPER = (  # needs nothing but the standard library and these packages
    f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r}); "
    "from fl_server.flower_run import _keep; _keep()"
)

ENVIRONMENT = {
    **processes.FLOWER,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ADDRESS": "",  # never join a Ray cluster that is there already
}

LINES = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
"""Environment in which `flwr` holds back no line and writes UTF-8."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) *: {2,}(.*)", re.DOTALL)
_CLASS = re.compile(r"<class '[\w.]+'>:<'")
_STARTED = re.compile(r"Successfully started run (\d+)")
_NOISE = (  # true of Flower's shared SuperLink, misleading here
    "Using SuperLink: ",
    "Starting logstream for run_id ",
    "Since flwr 1.32, default simulated SuperNodes",
    "To change federation size, use the following command:",
    "\tflwr federation simulation-config ",
)
_ACTOR_ENDS = "Manually terminating ClientAppActor"
"""In what each of Ray's actors says when a simulation has ended, as a warning."""


@dataclass(frozen=True)
class FlowerStatus:
    """How Flower says a run ended."""

    run_id: int
    status: str  # "finished:completed", "finished:failed" or "finished:stopped"
    details: str  # the reason of a failure

    @property
    def completed(self) -> bool:
        """Whether the ServerApp came to its end (its clients may all have failed)."""
        return self.status == "finished:completed"


def run_simulation(
    app_dir: Path,
    run_config: Mapping[str, str | int | float | bool],
    *,
    clients: int,
    client_gpus: float = 0.0,
    on_line: Callable[[str], None] = print,
    env: Mapping[str, str] | None = None,
) -> FlowerStatus:
    """Run the Flower app in `app_dir` once, on Ray, and wait for its end.

    `run_config` overrides keys of the app's `[tool.flwr.app.config]` (dotted, as the ServerApp sees
    them), `clients` is the number of simulated SuperNodes, each of which takes `client_gpus` of a
    GPU while it works, `env` is added to the environment of every process of the run, and `on_line`
    gets what the ServerApp prints and logs, line by line.
    However this function is left, no process and no file of the run remains.

    Raises:
        ValueError: `clients` or a value of `run_config` is not what Flower can take.
        RuntimeError: Flower did not start, refused the run, or broke down during it. A ServerApp
            that raises is no error here: see the returned status.
    """
    if clients < 1:
        raise ValueError(f"clients is {clients}, but a run needs at least 1")
    job = {
        "app": str(Path(app_dir).resolve()),
        "federation": f"num-supernodes={clients} client-resources-num-cpus=1 "
        f"client-resources-num-gpus={client_gpus}",
        "config": _toml(run_config),
    }
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", KEEPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, **ENVIRONMENT, **(env or {})},
        start_new_session=True,  # Ctrl-C is for the caller; the keeper ends when the caller leaves
    )
    result: dict[str, Any] = {
        "error": "The process that watches over the run ended without an error message"
    }
    tail: deque[str] = deque(maxlen=8)
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended: see `result`
            keeper.stdin.write(json.dumps(job) + "\n")
            keeper.stdin.flush()
        for line in keeper.stdout:
            if line.startswith(RESULT):
                result = json.loads(line.removeprefix(RESULT))
            elif (text := _plain(line)) is not None:
                tail.append(text)
                on_line(text)
    finally:
        keeper.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.close()
        keeper.wait()
    if "error" in result:
        raise RuntimeError("\n".join([result["error"], *_unframed(tail)]))
    return FlowerStatus(**result)


def _toml(config: Mapping[str, str | int | float | bool]) -> str:
    """`config` as TOML: a quoted key is one key to Flower, with its dots."""
    lines = []
    for key, value in config.items():
        if not isinstance(value, str | int | float | bool):
            raise ValueError(f"{key} is a {type(value).__name__}, not a str, int, float or bool")
        # A float is spelt by Python (JSON has no inf); else JSON's spelling is TOML's, but for DEL.
        text = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{json.dumps(key)} = {text}\n".replace("\x7f", "\\u007f"))
    return "".join(lines)


def _plain(line: str) -> str | None:
    """A line of `flwr run` without colours, Flower's INFO prefix and the class before a client's
    reason; None for a line that is not to be shown."""
    text = _CLASS.sub("", without_colours(line.rstrip("\n")))
    if match := _LEVEL.fullmatch(text):
        level, message = match.groups()
        if not message or message.startswith(_NOISE):
            return None
        return message if level == "INFO" else f"{level}: {message}"
    return None if text.startswith(_NOISE) or _ACTOR_ENDS in text else text


def _unframed(lines: Iterable[str]) -> list[str]:
    """What stands in the frame that Flower puts around an error."""
    words = (line.strip("│ ") for line in lines if not line.startswith(("╭", "╰")))
    return list(filter(None, words))


def without_colours(text: str) -> str:
    """What Flower's commands print, without a terminal's escape sequences."""
    return _COLOUR.sub("", text)


def run_on_connection(
    app_dir: Path,
    run_config: Mapping[str, str | int | float | bool],
    connection: str,
    *,
    flower_home: Path | None = None,
    on_line: Callable[[str], None] = print,
) -> FlowerStatus:
    """Run the Flower app in `app_dir` once on the SuperLink `connection` and wait for its end.

    `connection` is a name in the Flower configuration of `flower_home` (default: the user's own);
    the rest is as for `run_simulation`.  If the caller is interrupted, the run is stopped.

    Raises:
        ValueError: a value of `run_config` is not what Flower can take.
        RuntimeError: the SuperLink did not answer, or refused the run.
    """
    env = {**os.environ, **ENVIRONMENT, **sockets.direct(), **LINES}
    if flower_home:
        env["FLWR_HOME"] = str(flower_home)
    link = _Link(connection, env)
    with tempfile.TemporaryDirectory(prefix="flatfed-") as folder:
        settings = Path(folder, "run.toml")
        settings.write_text(_toml(run_config), encoding="utf-8")
        with link.start("run", str(app_dir), connection, "--stream", "-c", str(settings)) as submit:
            return _follow(link, submit, on_line)


def _follow(
    link: _Link, submit: subprocess.Popen[str], on_line: Callable[[str], None]
) -> FlowerStatus:
    """Hand on the lines of a submitted run until it has ended; stop it if that is interrupted."""
    run_id, tail, deadline = 0, deque(maxlen=8), time.monotonic() + SUBMIT_TIMEOUT
    lines = _lines(submit.stdout)
    try:
        while (line := lines(QUIET if run_id else deadline - time.monotonic())) != "":
            if line is None:  # silence
                if not run_id:
                    raise RuntimeError(f"Flower did not accept the run within {SUBMIT_TIMEOUT:g} s")
                if (status := link.status(run_id)) is not None:
                    return status
            elif match := _STARTED.match(without_colours(line)):
                run_id = int(match[1])
            elif (text := _plain(line)) is not None:
                tail.append(text)
                on_line(text)
        if not run_id:
            raise RuntimeError("\n".join([REFUSED, *_unframed(tail)]))
        while (status := link.status(run_id)) is None:
            time.sleep(2.0)  # the stream of lines broke off, the run goes on
        return status
    except RuntimeError:
        raise
    except BaseException:
        while not run_id and (line := lines(10.0)):  # it may be on its way
            if match := _STARTED.match(without_colours(line)):
                run_id = int(match[1])
        if run_id:
            on_line(link.stop(run_id))
        raise


def _lines(stream: Any) -> Callable[[float], str | None]:
    """`read(seconds)` gives the next line of `stream`, "" at its end, None if none came in time."""
    received: queue.SimpleQueue[str] = queue.SimpleQueue()

    def pump() -> None:
        with contextlib.suppress(ValueError):  # closed
            for line in stream:
                received.put(line)
        received.put("")

    threading.Thread(target=pump, daemon=True).start()

    def read(seconds: float) -> str | None:
        try:
            return received.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            return None

    return read


@dataclass
class _Link:
    """A SuperLink, reached by calls of `flwr` with its connection's name."""

    connection: str
    env: Mapping[str, str]
    silent_since: float = math.inf  # by the monotonic clock; inf: it answered when last asked

    @contextmanager
    def start(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """`flwr` in a session of its own: Ctrl-C is for this process alone."""
        process = subprocess.Popen(
            [BIN / "flwr", *arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def ask(self, *arguments: str, limit: float) -> str:
        """All that `flwr` prints; TimeoutError if it takes longer than `limit` seconds."""
        with self.start(*arguments) as process:
            try:
                return without_colours(process.communicate(timeout=limit)[0])
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"`flwr {arguments[0]}` took more than {limit:g} s") from None

    def status(self, run_id: int) -> FlowerStatus | None:
        """How the run ended; None while it goes on.  Raises RuntimeError if nobody can say."""
        try:
            options = ("--run-id", str(run_id), "--format", "json")
            text = self.ask("list", self.connection, *options, limit=LIST_TIMEOUT)
            status = _status(text)
        except (TimeoutError, ValueError) as error:
            self.silent_since = min(self.silent_since, time.monotonic())
            if time.monotonic() - self.silent_since > LOST:
                raise RuntimeError(f"the SuperLink does not answer: {error}") from None
            return None
        self.silent_since = math.inf
        return status

    def stop(self, run_id: int) -> str:
        """Stop the run; what became of that, in one line."""
        with contextlib.suppress(TimeoutError):
            text = self.ask("stop", str(run_id), self.connection, limit=STOP_TIMEOUT)
            if "successfully stopped" in text or "finished" in text:
                return f"run {run_id} is stopped"
        return f"run {run_id} could not be stopped; type: flwr stop {run_id} {self.connection}"


def _status(listing: str) -> FlowerStatus | None:
    """The newest run of `flwr list --format json`; None if it goes on; ValueError if there is
    none."""
    try:
        run = json.loads(listing)["runs"][0]
    except (ValueError, LookupError, TypeError):
        with contextlib.suppress(ValueError, LookupError, TypeError):
            listing = json.loads(listing)["error-message"].rpartition("\n")[2]
        raise ValueError(" ".join(listing.split())) from None
    if not run["status"].startswith("finished"):
        return None
    details = run["status-details"]
    return FlowerStatus(int(run["run-id"]), run["status"], "" if details == "N/A" else details)


class _CallerGone(Exception):
    """The caller has closed the keeper's standard input."""


def _keep() -> None:
    """The keeper's life: read the job, run it, end every process, remove the folder, answer."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which children would inherit
    processes.adopt_orphans()
    job = json.loads(sys.stdin.readline())
    folder = tempfile.mkdtemp("", "flatfed-", sockets.root(LONGEST_ROOT))
    try:
        result = _run(Path(folder), **job)
    except _CallerGone:
        result = {}
    except Exception as error:
        result = {"error": str(error) or repr(error)}
    finally:
        processes.end_descendants()
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), f"{RESULT}{json.dumps(result)}\n".encode())


def _run(folder: Path, app: str, federation: str, config: str) -> dict[str, Any]:
    """Start a SuperLink, submit the app and print its log as it comes; the fields of a status."""
    for name in ("home", "empty"):
        (folder / name).mkdir()
    (folder / "run.toml").write_text(config, encoding="utf-8")
    os.environ.update(
        FLWR_HOME=str(folder / "home"),
        FLWR_LOG_LEVEL="INFO",  # the level at which the SuperLink says that it listens
        RAY_TMPDIR=str(folder),
        PATH=f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # Flower's own look-ups
        **sockets.direct(),
    )
    superlink, port = _start_superlink(folder)
    connection = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (folder / "home" / "config.toml").write_text(connection)
    options = ("--stream", "--federation-config", federation, "-c", folder / "run.toml")
    submit = _flwr(folder, "run", app, CONNECTION, *options, stderr=subprocess.STDOUT)
    _wait(submit, superlink, folder)
    while True:
        listing = _flwr(folder, "list", CONNECTION, "--format", "json", stdout=subprocess.PIPE)
        _wait(listing, superlink, folder, LIST_TIMEOUT)
        text = without_colours(listing.stdout.read().decode())
        try:
            runs = json.loads(text)["runs"]
        except (ValueError, KeyError):
            raise RuntimeError(f"Flower does not say how the run ended: {text}") from None
        if not runs:
            raise RuntimeError(REFUSED)
        if status := _status(text):
            return asdict(status)
        _pause(1.0)  # the stream of lines broke off, the run goes on


def _start_superlink(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A SuperLink for simulations that listens on a free loopback port, and the port."""
    log = folder / "superlink.log"
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        port = sockets.free_port()
        address = ("--host", "127.0.0.1", "--port", str(port))
        with log.open("wb") as out:
            options = ("--insecure", "--simulation", *address)
            streams = {"stdout": out, "stderr": subprocess.STDOUT}
            superlink = _start(folder, "flower-superlink", *options, **streams)
        while (ended := superlink.poll()) is None and time.monotonic() < deadline:
            # Not its /health: another SuperLink may have taken the port, and answer there.
            if b"Uvicorn running on" in log.read_bytes():
                return superlink, port
            _pause()
        if ended is None:
            raise _broken(f"did not listen within {START_TIMEOUT:g} s", log)
        if not sockets.TAKEN.search(log.read_bytes()):
            raise _broken(f"ended at its start with exit code {ended}", log)


def _start(folder: Path, name: str, *arguments: str | Path, **options: Any) -> subprocess.Popen:
    """Start one of Flower's commands in the empty folder."""
    command, empty = [BIN / name, *arguments], folder / "empty"
    return subprocess.Popen(command, cwd=empty, stdin=subprocess.DEVNULL, **options)


def _flwr(folder: Path, *arguments: str | Path, **options: Any) -> subprocess.Popen:
    """Start `flwr`."""
    return _start(folder, "flwr", *arguments, env={**os.environ, **LINES}, **options)


def _wait(
    process: subprocess.Popen, superlink: subprocess.Popen, folder: Path, limit: float = math.inf
) -> None:
    """Wait for the end of `process`, at most `limit` seconds and while the SuperLink lives."""
    deadline = time.monotonic() + limit
    while process.poll() is None:
        if (ended := superlink.poll()) is not None:
            raise _broken(f"ended during the run with exit code {ended}", folder / "superlink.log")
        if time.monotonic() > deadline:
            raise RuntimeError(f"`flwr {process.args[1]}` did not answer within {limit:g} s")
        _pause()


def _pause(seconds: float = POLL) -> None:
    """Sleep, unless the caller is gone."""
    if select.select([sys.stdin], [], [], seconds)[0]:
        raise _CallerGone


def _broken(what: str, log: Path) -> RuntimeError:
    """An error of the SuperLink, with the last lines of its log."""
    lines = without_colours(log.read_text(errors="replace")).splitlines()[-12:]
    return RuntimeError("\n".join([f"Flower's SuperLink {what}; the end of its log:", *lines]))
