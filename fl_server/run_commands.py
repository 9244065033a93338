"""`flatfed config`, `run` and `resume`, on every engine; each gives its exit code."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from fl_common import processes
from fl_common.files import absolute_path, unwritable
from fl_common.results import MODEL, checkpoints
from fl_server.console import FAILED, OK, TERMINATED, complain, failed, settings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_common.config import CoreConfig
    from fl_server.flower_run import FlowerStatus

FLOWER_LOG = "flower.log"
"""In the results folder: what Flower wrote of errors, tracebacks above all."""
TO_END = 15.0  # s, for the process of a run that is stopped; Flower ends it by force sooner

_OURS = re.compile(
    r"((round|run) +\d|(evaluation|flatness) of round |roll call: |resumed after |waiting|warning: "
    r"|results: |continue it with: )"
)


def config(args: argparse.Namespace) -> int:
    from fl_common.config import resolve
    from fl_common.pyproject import as_toml, write_pyproject

    values, errors = settings_of(args)
    config = resolve(values, absolute_paths=False, also=errors)
    if not args.write_pyproject:
        print(as_toml(config.flat()), end="")
        return OK
    if args.values or args.config:
        return complain(["--write-pyproject writes the defaults; give no settings with it"])
    try:
        write_pyproject(Path("pyproject.toml"))
    except FileNotFoundError:
        return complain(
            ["--write-pyproject: no pyproject.toml is here; run it in FlatFed's checkout"]
        )
    except (OSError, ValueError) as error:
        return complain([f"--write-pyproject: {error}"])
    return OK


def run(args: argparse.Namespace) -> int:
    from fl_common.config import absolute_paths, resolve
    from fl_server.recorder import (
        folder_error,
        read_summary,
        results_folder,
        resume_error,
        stored_config,
        timestamp,
    )

    given, errors = settings_of(args)
    values = absolute_paths(given)
    values["run.output-dir"] = values.get("run.output-dir") or str(Path.cwd() / "results")
    resume = values.get("run.resume") is True
    if not resume:
        values["run.name"] = values.get("run.name") or timestamp()
    folder = results_folder(str(values["run.output-dir"]), str(values.get("run.name", "")))
    if resume and values.get("run.name"):
        if problem := resume_error(folder, values):
            return complain([*errors, problem])
        values = {**stored_config(folder), **values}
    config = resolve(values, also=errors)
    if resume:
        reached = read_summary(folder)
        whole = reached.get("status") == "completed" and (folder / MODEL).is_file()
        if whole and reached.get("rounds") == config.run.rounds:
            print(
                f"{folder}: completed, all {config.run.rounds} rounds; nothing is left to do; for "
                f"more rounds: flatfed resume {quote(str(folder))} run.rounds=N"
            )
            return OK
    elif problem := folder_error(folder):
        return complain([problem])
    if problems := _unready(config):
        return complain(problems)
    processes.at_signal(signal.SIGTERM, lambda: sys.exit(TERMINATED))
    engines = {"inprocess": _run_inprocess, "ray": _run_ray, "grpc": _run_grpc}
    return engines[config.engine.name](config, folder)


def _unready(config: CoreConfig) -> list[str]:
    """What this machine lacks for the run; of nodes and their server elsewhere nothing is known."""
    from fl_common.data.cache import default_cache_dir
    from fl_server.tracking import missing

    if config.engine.name == "grpc":
        return []
    if config.data.partition == "local" and config.clients.number > 1:
        return [
            f"data.partition = local: with engine.name={config.engine.name} all clients would hold "
            "the same data; set engine.name=grpc, whose nodes have their own, or choose another "
            "data.partition"
        ]
    if gpus := config.engine.client_gpus:
        import torch

        if (cards := torch.cuda.device_count()) < gpus:
            return [
                f"engine.client-gpus = {gpus:g}: this machine has {cards} GPUs that torch can use; "
                "leave it out for clients on the CPU"
            ]
    if config.client.state_dir:
        from fl_client.node_checks import NodeError, check_state_dir

        try:
            check_state_dir(Path(config.client.state_dir))
        except NodeError as error:
            return [f"client.{error}"]
    cache = Path(config.data.cache_dir or default_cache_dir())
    # A cache that has data already may be read-only.
    if not (cache / "datasets").is_dir() and (problem := unwritable(cache)):
        key = "data.cache-dir" if config.data.cache_dir else "FLATFED_CACHE"
        return [f"{key}: {problem}; choose another folder with data.cache-dir"]
    return missing(config)


def resume(args: argparse.Namespace) -> int:
    folder = absolute_path(args.folder)
    place = [f"run.output-dir={folder.parent}", f"run.name={folder.name}", "run.resume=true"]
    args.values = [*place, *args.values]
    return run(args)


def _run_inprocess(config: CoreConfig, folder: Path) -> int:
    from flwr.app import Context, RecordDict

    from fl_client.app import app as client_app
    from fl_common.config import AUTO
    from fl_common.data.errors import DataError
    from fl_server.app import app as server_app
    from fl_server.exchange import RunFailed
    from fl_server.inprocess import InProcessGrid
    from fl_server.recorder import record_setting
    from fl_server.workers import count

    try:
        workers = count(config)
    except ValueError as error:
        return complain([str(error)])
    values = config.flat()

    def chosen(number: int, why: str) -> None:
        """Store the number, so that the run trains as many clients at once when it is resumed; one
        process does so."""
        record_setting(folder, "engine.cohort", str(number))
        if number > 1 and config.engine.workers != AUTO:
            record_setting(folder, "engine.workers", "1")
        print(why, flush=True)

    cohort = config.engine.cohort
    grid = InProcessGrid(client_app, config.clients.number, values, workers, cohort, chosen)
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(values)
    )
    try:
        server_app(grid, context)
    except (RunFailed, DataError):  # told already, in one line
        return FAILED
    except Exception:
        import traceback

        traceback.print_exc()
        return FAILED
    finally:
        grid.close()
    return OK


class _Told:
    """Hands the lines of a run on to the screen; what Flower reports of errors is kept instead, and
    so is the reason of a failure, which is told at the end."""

    def __init__(self, screen: Callable[[str], None] = print) -> None:
        self.screen, self.reason = screen, ""
        self.kept: list[str] = []
        self._error = False

    def __call__(self, line: str) -> None:
        if line.startswith("run failed: "):
            self.reason, self._error = line.removeprefix("run failed: "), False
            return
        if line.startswith(("ERROR: ", "CRITICAL: ")):
            self._error = True
        elif _OURS.match(line):
            self._error = False
        if self._error:
            self.kept.append(line)
        else:
            self.screen(line)

    def put_down(self, folder: Path) -> None:
        """Write what was kept to the results folder, unless that is on another machine."""
        if self.kept and folder.is_dir():
            with suppress(OSError), (folder / FLOWER_LOG).open("a") as log:
                log.write("\n".join([*self.kept, ""]))
                self.kept.clear()
                print(f"errors that Flower reported: {folder / FLOWER_LOG}", flush=True)

    def failed(self, known: str, guess: str) -> int:
        """Tell why the run failed, and give the exit code: the server's own reason, or else what is
        `known`; where nobody said, `guess` and what is still kept."""
        if why := self.reason or known:
            return failed(why)
        for line in self.kept:
            print(line, file=sys.stderr)
        return failed(guess)


def _run_ray(config: CoreConfig, folder: Path) -> int:
    from fl_server.flower_run import run_simulation

    shares = {"clients": config.clients.number, "client_gpus": config.engine.client_gpus}
    return _on_flower(config, folder, partial(run_simulation, **shares))


def _run_grpc(config: CoreConfig, folder: Path) -> int:
    from fl_server.federation import UsageError, connection
    from fl_server.flower_run import REFUSED, run_on_connection
    from fl_server.keys import why_unavailable

    try:
        link = connection(config.engine.connection)
    except UsageError as error:
        return complain([str(error)])
    if config.engine.connection and not config.clients.keys:  # "": what `flatfed up` started
        print(
            "warning: clients.keys is not set: every node that the SuperLink lets in can take any "
            "client's place",
            flush=True,
        )

    def submit(*arguments: Any, **options: Any) -> FlowerStatus:
        where = {"connection": link.name, "flower_home": link.flower_home}
        try:
            return run_on_connection(*arguments, **where, **options)
        except RuntimeError as error:
            refused = config.engine.connection and str(error).startswith(REFUSED)
            if refused and (why := why_unavailable(link, str(error))):
                raise RuntimeError(why) from None
            raise

    return _on_flower(config, folder, submit, elsewhere=not link.on_this_machine)


def _on_flower(
    config: CoreConfig,
    folder: Path,
    submit: Callable[..., FlowerStatus],
    *,
    elsewhere: bool = False,
) -> int:
    from fl_common.pyproject import out_of_date
    from fl_server.bundle import app_directory, checkout
    from fl_server.progress import Screen
    from fl_server.recorder import STOPPED, ended, read_summary

    root = checkout()
    if root and (problem := out_of_date(root / "pyproject.toml", config.flat())):
        return complain([problem])
    told = _Told()
    try:
        with app_directory() as app_dir, Screen(config.run.rounds) as screen:
            told.screen = screen
            status = submit(app_dir, config.flat(), on_line=told)
    except RuntimeError as error:
        return _broken_off(str(error), folder, told)
    except (KeyboardInterrupt, SystemExit) as left:
        reason = "interrupted" if isinstance(left, KeyboardInterrupt) else STOPPED
        if config.engine.name == "grpc" and read_summary(folder).get("status") == "running":
            print("its results are being completed", flush=True)
        ended(folder, reason, wait=TO_END)  # a ServerApp on nodes learns of it after the SuperLink
        print(end=_continued(folder), flush=True)
        raise
    return _outcome(status, config.run.rounds, folder, told, elsewhere=elsewhere)


def _continued(folder: Path) -> str:
    """The line that says how to continue a run; empty if it is completed, or has no checkpoint
    here."""
    from fl_server.recorder import read_summary

    left = checkpoints(folder) and read_summary(folder).get("status") != "completed"
    return f"continue it with: flatfed resume {quote(str(folder))}\n" if left else ""


def _broken_off(why: str, folder: Path, told: _Told) -> int:
    """End a run of which nobody is left on the server to say so; gives the exit code."""
    from fl_server.recorder import ended

    ended(folder, why)
    told.put_down(folder)
    return told.failed("", f"{why}\n{_continued(folder)}".rstrip())


def _outcome(
    status: FlowerStatus, rounds: int, folder: Path, told: _Told, *, elsewhere: bool = False
) -> int:
    """The exit code of a run of so many rounds, by what the server, its results folder (unless that
    is on another machine) and Flower say of it."""
    from fl_server.recorder import read_summary

    summary = read_summary(folder)
    reached = summary.get("status", "completed" if elsewhere and status.completed else "no summary")
    told.put_down(folder)
    if status.completed and reached == "completed":
        return OK
    says = f"Flower says {status.status} {status.details}".rstrip()
    if reached == "completed" and summary.get("rounds") == rounds:
        return told.failed(
            "its results are complete, but its process ended before all pictures were drawn; "
            f"{says}; draw them with: flatfed report {quote(str(folder))}",
            "",
        )
    if reached == "running":
        why = f"its process ended; {says}"
        return _broken_off(why, folder, told)
    if reached == "completed":  # and was to be extended
        reached = f"it did not go on after round {summary.get('rounds')}"
    error = summary.get("error", "") if reached == "failed" else ""
    return told.failed(error, f"{reached}; {says}")
