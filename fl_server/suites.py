"""Running the cells of a suite: each an ordinary results folder, made by a process of its own.

A cell that is complete is left alone, one that was interrupted goes on from its checkpoint, and a
folder that holds another run is refused before anything starts.
"""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_common import machine, processes
from fl_common.config import AUTO, resolve
from fl_common.files import LOCK, absolute_path, lock, read_object, read_or_empty, write_object
from fl_common.fingerprint import code_sha256
from fl_common.results import CONFIG, REPORT, checkpoints
from fl_report import compare, suite_page, suite_table
from fl_report.settings import PLACE, arguments, as_argument
from fl_report.suite import SuiteError, load, placeholder
from fl_server.checkpoint import code_of
from fl_server.console import TERMINATED
from fl_server.progress import duration
from fl_server.recorder import RESUMABLE, read_summary

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from fl_common.config import Scalar
    from fl_report.suite import Cell, Plan

MEASURED = "cell.json"
"""In a cell's results folder: what its process measured at its end."""
REMEMBERED = "suite.json"
"""In the suite's folder: the last call that ran cells, the settings that hold there, and the
seconds of all calls that ran cells and came to an end."""
LOGS = "logs"
GRACE = 30.0  # s, from the Ctrl-C that is handed on to the end of a child
POLL = 0.05  # s
TOLD = 5  # folders, one line each
OF_DATA = "DataError: "
"""In the reason of a run whose clients could not read or split their data."""
FREE = {*RESUMABLE, *PLACE, "run.pictures", "server.checkpoint-every", "train.device"} - {
    "run.rounds"
}
"""Settings in which a stored run may differ from its cell: they do not change what it computes."""
ROUNDING = ("train.threads", "train.channels-last", "train.graphs", "engine.cohort")
"""Settings that change the rounding of what a run computes and nothing else: its numbers stay
comparable with published ones."""


@dataclass
class State:
    """Where a suite stands."""

    done: list[Cell] = field(default_factory=list)
    left: list[Cell] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Folders that hold something else, a line each."""

    def check(self) -> None:
        """Raises SuiteError with the first few problems, if there are any."""
        if self.problems:
            more = len(self.problems) - TOLD
            told = [f"and {more} more folders"] if more > 0 else []
            raise SuiteError([*self.problems[:TOLD], *told])


def differing(config: Mapping[str, Scalar], folder: Path) -> str | None:
    """The first setting in which the run in `folder` differs from this configuration, as words;
    None if it is a run of this configuration."""
    try:
        stored = read_object(folder / CONFIG)
    except (OSError, ValueError) as error:
        return f"its {CONFIG} cannot be read ({getattr(error, 'strerror', None) or error})"
    return unlike(config, stored)


def unlike(
    config: Mapping[str, Scalar], stored: Mapping[str, Scalar], free: Collection[str] = ()
) -> str | None:
    """The first setting in which a stored run differs from this configuration, as words.

    free: further settings in which it may."""
    defaults = resolve({}).flat()
    for key in deciding({**config, **stored}):
        if key in free:
            continue
        ours, there = config.get(key), stored.get(key, defaults.get(key))
        # As on the command line: a key's type may have changed between versions.
        same = ours == there or as_argument(ours) == as_argument(there)
        if key == "engine.cohort" and ours == AUTO:  # a run stores the number that it chose
            same = True
        if not same:
            return f"{key} is {as_argument(there)} there and {as_argument(ours)} here"
    return None


def deciding(config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The settings that decide what a run computes."""
    its = config.items()
    return {k: v for k, v in its if k not in FREE and not k.startswith("tracking.")}


def begun(folder: Path) -> bool:
    """Whether a run has begun there, so that its settings, at least, could be lost."""
    return folder.exists() and (not folder.is_dir() or (folder / CONFIG).exists())


def complete(folder: Path) -> bool:
    """Whether the run in this folder came to its end."""
    return read_summary(folder).get("status") == "completed"


def broken(folder: Path) -> str | None:
    """Why a completed run has no numbers for the table, with the file's name; None if it has."""
    try:
        compare.read([folder])
    except ValueError as error:
        return str(error).rpartition("; ")[0] or str(error)
    return None


def look(plan: Plan, base: Path) -> State:
    """Which cells are done, which are left, and what stands in the way."""
    state = State()
    for cell in plan.cells:
        folder = base / cell.name
        if begun(folder):
            config = resolve(cell.values, absolute_paths=False).flat()
            if problem := differing(config, folder):
                state.problems.append(
                    f"{folder}: holds another run: {problem}; give another --out, or move it away"
                )
                continue
        elif folder.exists() and _foreign(folder):
            state.problems.append(f"{folder}: holds no run; give another --out, or move it away")
            continue
        done = complete(folder)
        if done and (problem := broken(folder)):
            state.problems.append(f"{problem}; repair it, or move {folder} away to run it again")
            continue
        (state.done if done else state.left).append(cell)
    return state


def _foreign(folder: Path) -> bool:
    """Whether a folder without settings holds anything but what a run begins with."""
    return any(p.name != LOCK and not p.name.startswith(f".{CONFIG}") for p in folder.iterdir())


def _at_rest(folder: Path) -> bool:
    """Whether nobody is at work on a run; one that was just interrupted is given time to end."""
    for _ in range(round(GRACE / POLL)):
        try:
            held = lock(folder)
        except OSError:  # nothing is there, or the run itself will tell what is wrong
            return True
        if held:
            held.close()
            return True
        time.sleep(POLL)
    return False


@dataclass
class Child:
    """A cell's process."""

    cell: Cell
    place: int
    """Among the cells that run at once, from 0 on."""
    process: subprocess.Popen[bytes]
    log: Path
    written: int
    """Bytes of the log when it began."""
    started: float = field(default_factory=time.monotonic)

    def said(self) -> str:
        """Why it failed, as its last words have it."""
        text = self.log.read_bytes()[self.written :].decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("run failed:", "error:"))]
        return (told or lines or ["it printed nothing"])[-1]


class Runner:
    """Runs what is left of a plan's `total` cells, `jobs` of them at once."""

    def __init__(self, base: Path, state: State, total: int, jobs: int) -> None:
        self.base, self.total, self.jobs = base, total, jobs
        self.waiting = list(state.left)
        self.finished = len(state.done)
        self.running: list[Child] = []
        self.failed: list[Cell] = []
        self.seconds: list[float] = []
        """Of each cell that was completed in this call."""

    def run(self) -> list[Cell]:
        """Run all that is left; gives the cells that failed.  Ends the children if interrupted."""
        before = processes.at_signal(signal.SIGTERM, lambda: sys.exit(TERMINATED))
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.jobs:
                    self._start(self.waiting.pop(0))
                time.sleep(POLL)
                for child in list(self.running):
                    self._reap(child)
        finally:
            signal.signal(signal.SIGTERM, before)
            self._end()
        return self.failed

    def _start(self, cell: Cell) -> None:
        folder = self.base / cell.name
        if not _at_rest(folder):
            self.failed.append(cell)
            print(f"{cell.name}: failed: another process is working in {folder}")
            return
        (self.base / LOGS).mkdir(exist_ok=True)
        path = self.base / LOGS / f"{cell.name}.txt"
        resumes = bool(checkpoints(folder))
        if folder.exists() and not resumes:
            shutil.rmtree(folder)  # not one round of it was kept
        with path.open("ab") as log:
            written = log.tell()
            place = min({*range(self.jobs)} - {child.place for child in self.running})
            about = str(folder), str(place), str(self.jobs)
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", CHILD, *about, *_command(cell, folder, resumes)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes through us
            )
        self.running.append(Child(cell, place, process, path, written))
        told = "begins"
        if resumes:
            told = "goes on from its checkpoint"
            if code_of(folder) != code_sha256():
                told += ", with other code than before: bits may differ"
        print(f"{cell.name}: {told}")

    def _reap(self, child: Child) -> None:
        code = child.process.poll()
        if code is None:
            return
        self.running.remove(child)
        folder, name = self.base / child.cell.name, child.cell.name
        if code == 0 and complete(folder):
            self.finished += 1
            self.seconds.append(time.monotonic() - child.started)
            told = f"{_outcome(folder)}, {self.seconds[-1]:.0f} s"
        else:
            self.failed.append(child.cell)
            why = child.said()
            told = f"failed ({code}): {why}; its log: {child.log}"
            if OF_DATA in why and (alike := self._with_data_of(child.cell)):
                self.waiting = [cell for cell in self.waiting if cell not in alike]
                told += f"; not tried, as they have the same data: {len(alike)}"
        print(f"[{self.finished}/{self.total}] {name}: {told}; {self._ahead()}")

    def _with_data_of(self, failed: Cell) -> list[Cell]:
        """Those that wait and would read and split the same data: they would fail alike."""

        def data(cell: Cell) -> dict[str, Scalar]:
            its = cell.values.items()
            return {k: v for k, v in its if k.startswith("data.") or k == "clients.number"}

        return [cell for cell in self.waiting if data(cell) == data(failed)]

    def _ahead(self) -> str:
        left = len(self.waiting) + len(self.running)
        if not left or not self.seconds:
            return f"{left} left"
        mean = sum(self.seconds) / len(self.seconds)
        return f"{left} left, ETA {duration(mean * left / self.jobs)}"

    def _end(self) -> None:
        """Ctrl-C for the children that are left, and the end of those that do not heed it."""
        for child in self.running:
            with suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for child in self.running:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


CHILD = "from fl_server.suites import child; child()"


def child() -> None:
    """The process of a cell: `flatfed`, interrupted when the suite is no more.  Its first arguments
    are the cell's folder, its place among those that run at once, and how many these are."""
    # A shell's `&` and nohup have it ignored, and we would not end when the suite asks us to.
    processes.at_signal(signal.SIGINT, processes.interrupt)
    if not processes.end_with(os.getppid(), signal.SIGINT):
        sys.exit("the suite is no more")
    from fl_server.cli import entry_point

    folder, place, jobs = Path(sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
    _take_cores(place, jobs)
    try:
        entry_point()
    finally:
        if begun(folder):
            _measure(folder, jobs)


def _take_cores(place: int, jobs: int) -> None:
    """Keep this process to its share of the cores, so that cells do not slow each other down.  Its
    run then has a worker for each core of the share."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[: machine.processors()]
        os.sched_setaffinity(0, cores[place::jobs] or [cores[place % len(cores)]])


def _measure(folder: Path, jobs: int) -> None:
    """What a run does not tell of itself: its peak memory, workers' too, the day, and how many
    cells shared the machine.  The cell's own process writes it, for it may outlive a suite that is
    killed."""
    unit = 1 if sys.platform == "darwin" else 1024
    of = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak, before = unit * max(resource.getrusage(who).ru_maxrss for who in of), measured(folder)
    told = {
        "max_rss_bytes": max(peak, before.get("max_rss_bytes", 0)),
        "date": time.strftime("%Y-%m-%d"),
        "jobs": max(jobs, before.get("jobs", 0)),
    }
    write_object(folder / MEASURED, told)


def _command(cell: Cell, folder: Path, resumes: bool) -> list[str]:
    if resumes:
        free = {k: v for k, v in cell.values.items() if k in RESUMABLE and k != "run.rounds"}
        return ["resume", str(folder), *arguments(free)]
    place = [f"run.output-dir={folder.parent}", f"run.name={folder.name}"]
    return ["run", *place, *arguments(cell.values)]


def measured(folder: Path) -> dict[str, Any]:
    """What a cell's process measured; empty if it was killed."""
    return read_or_empty(folder / MEASURED)


def _outcome(folder: Path) -> str:
    accuracy = read_summary(folder).get("accuracy")
    return "done" if accuracy is None else f"accuracy {accuracy:.4f}"


@dataclass
class OpenSuite:
    """A suite and its folder: what `flatfed suite` does."""

    file: Path
    plan: Plan
    base: Path
    """The folder of its cells."""
    out: Path | None
    """As given on the command line."""
    taken: Mapping[str, Scalar]
    """Settings that an earlier call gave and this one did not."""
    jobs: int
    """How many cells run at once."""
    only: str = ""
    """Which of the missing cells to run, as a pattern of their names; all if it is empty."""

    def run(self) -> list[str]:
        """Run the cells that are missing; gives the names of those that failed.

        Raises SuiteError, before anything starts, where folders hold something else or another
        process is at work."""
        self.base.mkdir(parents=True, exist_ok=True)
        held = lock(self.base)
        if held is None:
            raise SuiteError(
                [f"{self.base}: another flatfed suite is running here; wait for it to end"]
            )
        with held:
            state = look(self.plan, self.base)
            state.check()
            if self.only:
                state.left = [c for c in state.left if fnmatchcase(c.name, self.only)]
            self._remember(ran=bool(state.left))
            print(f"{self.plan.suite.title}: {len(self.plan.cells)} cells, {len(state.done)} done, "
                  f"{len(state.left)} to run; results: {self.base}")  # fmt: skip
            if state.left and self.taken:
                told = ", ".join(arguments(self.taken))
                print(f"settings of the last call: {told}")
            runner = Runner(self.base, state, len(self.plan.cells), self.jobs)
            began = time.monotonic()
            try:
                return [cell.name for cell in runner.run()]
            finally:
                if state.left:
                    self._remember(ran=True, seconds=time.monotonic() - began)

    def _remember(self, *, ran: bool, seconds: float = 0.0) -> None:
        before = read_or_empty(self.base / REMEMBERED)
        told = {
            "command": self.command() if ran else before.get("command", self.command()),
            "settings": self.plan.overrides,
            "elapsed_s": round(before.get("elapsed_s", 0.0) + seconds, 1),
        }
        write_object(self.base / REMEMBERED, told)

    def command(self, *, places: bool = False) -> str:
        """The call that makes these cells; without `places`, those of this machine are left out
        or have a name that says what belongs there, and all cells are made."""
        words = ["flatfed", "suite", str(self.file)]
        words += ["--reduced"] if self.plan.reduced else []
        words += ["--jobs", str(self.jobs)] if self.jobs > 1 else []
        words += ["--cells", self.only] if self.only and places else []
        words += ["--out", str(self.out)] if self.out and places else []
        source = next((str(c.values.get("data.source")) for c in self.plan.cells), "data")
        for key, value in self.plan.overrides.items():
            if not places and key == "data.path":
                value = placeholder(source)
            if places or key not in ("data.cache-dir", "client.state-dir"):
                words += arguments({key: value})
        return shlex.join(words)

    def table(self, publish: Path | None = None) -> dict[str, Any]:
        """The table, as JSON has it, of the cells that are there, and of those in the table that
        `publish` has.  Raises SuiteError for folders that hold something else, and as `_keep`."""
        look(self.plan, self.base).check()
        remembered = read_or_empty(self.base / REMEMBERED)
        told = remembered.get("command") or self.command()
        others = [key for key in deciding(self.plan.overrides) if key not in ROUNDING]
        table = suite_table.gather(self.plan, self.base, told, measured, code_of, others)
        table["elapsed_s"] = remembered.get("elapsed_s")
        for cell in table["cells"]:
            if cell["status"] == "completed":
                cell["settings"] = deciding(read_object(self.base / cell["cell"] / CONFIG))
        if publish:
            self._keep(table, self._page(publish).with_suffix(".json"))
        return suite_table.with_shared_settings(table)

    def _keep(self, table: dict[str, Any], published: Path) -> None:
        """Put runs that were published before, and whose folders are not here, into the table, as
        far as they are of the suite's settings; prints what became of them.  Raises SuiteError for
        a file that cannot be read."""
        kept, there = [], {}
        if published.exists():
            try:
                there = suite_table.completed(read_object(published))
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                raise SuiteError(
                    [f"{published}: cannot be read ({why}); repair it, or move it away"]
                ) from error
        for cell, told in zip(self.plan.cells, table["cells"], strict=True):
            if told["status"] == "completed" or cell.name not in there:
                continue
            earlier = there[cell.name]
            config = resolve(cell.values, absolute_paths=False).flat()
            if not earlier["settings"]:
                print(f"{cell.name}: not kept from {published}, which lacks its settings")
            elif problem := unlike(config, earlier["settings"], ROUNDING):
                print(f"{cell.name}: not kept from {published}: {problem}")
            else:
                kept.append(cell.name)
                told.clear()
                told.update(earlier)
        if kept:
            print(f"kept from {published}, as {self.base} lacks them: {', '.join(kept)}")
            table["elapsed_s"] = None  # theirs is not known run by run

    def _page(self, publish: Path) -> Path:
        return publish / f"{self.plan.folder_name}.md"

    def write(self, table: Mapping[str, Any], publish: Path | None) -> list[Path]:
        """table.md, table.json and report.html in the suite's folder, or the page in `publish`;
        gives their paths."""
        if publish:
            return suite_page.write(table, self._page(publish))
        self.base.mkdir(parents=True, exist_ok=True)
        written = suite_page.write(table, self.base / "table.md")
        done = [c["cell"] for c in table["cells"] if c["status"] == "completed"]
        if done:
            from fl_report import page

            folders = [self.base / name for name in done]
            told = {"title": table["title"], "opening": suite_page.opening(table)}
            written.append(page.write(folders, self.base / REPORT, anyway=True, **told))
        return written

    def log(self, name: str) -> Path:
        """The file of what a cell's process printed."""
        return self.base / LOGS / f"{name}.txt"


def open_suite(
    file: Path,
    overrides: dict[str, Scalar],
    reduced: bool,
    out: Path | None,
    jobs: int,
    only: str = "",
) -> OpenSuite:
    """The suite of a file, with every cell's configuration checked.  Settings of earlier calls in
    this folder hold until they are given anew.  Raises SuiteError with every mistake."""
    name = f"{file.stem}-reduced" if reduced else file.stem
    base = absolute_path(out or Path("results", "suites")) / name
    remembered = read_or_empty(base / REMEMBERED).get("settings", {})
    taken = {key: value for key, value in remembered.items() if key not in overrides}
    plan = load(file, reduced=reduced, overrides=remembered | overrides)
    if only and not any(fnmatchcase(cell.name, only) for cell in plan.cells):
        more = ", ..." if len(plan.cells) > TOLD else ""
        names = ", ".join(cell.name for cell in plan.cells[:TOLD]) + more
        raise SuiteError([f"--cells {only}: no cell has such a name; they are {names}"])
    return OpenSuite(file, plan, base, out, taken, jobs, only)
