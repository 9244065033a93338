"""A run's results folder: config.json, clients.json, history.jsonl, summary.json,
model.safetensors, checkpoints/, and with `run.pictures` curves.png, clients.png and report.html."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import IO, TYPE_CHECKING, Any

from fl_common import machine
from fl_common.config import shown
from fl_common.files import (
    lock,
    read_object,
    read_or_empty,
    remove_unfinished,
    unwritable,
    write_atomically,
    write_object,
)
from fl_common.fingerprint import code_sha256, installed
from fl_common.results import (
    CHECKPOINTS,
    CLIENTS,
    CONFIG,
    HISTORY,
    MODEL,
    REPORT,
    SUMMARY,
    checkpoints,
)
from fl_common.wire import model_sha256
from fl_report.series import FAILURES
from fl_server.checkpoint import Checkpoints
from fl_server.exchange import RunFailed, Unresumable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from fl_common.config import CoreConfig, Scalar
    from fl_server.roster import Member
    from fl_server.tracking import Tracking

STOPPED = "stopped"
"""The error in the summary of a run that was told to end."""
GATHERED = ("memory_given_back", "flatness_bytes_down", "flatness_bytes_up")
"""What the summary gathers from round to round and no row of the history has."""


def default_output_dir() -> Path:
    """Where plain `flwr run` leaves results: its working directory is not the user's."""
    return Path(os.environ.get("FLATFED_RESULTS") or Path.home() / "flatfed-results")


def timestamp() -> str:
    """A folder name that sorts by time: 20260131-235959-123."""
    now = time.time()
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(now)) + f"-{int(now % 1 * 1000):03d}"


def results_folder(output_dir: str, name: str) -> Path:
    """Where a run's results go; "" are the default folder and a timestamp."""
    base = Path(output_dir) if output_dir else default_output_dir()
    return base / (name or timestamp())


def folder_error(folder: Path) -> str | None:
    """Why results cannot go to `folder`, as one line; None if they can."""
    exists = False
    try:
        exists = folder.exists()
    except OSError as error:  # `unwritable` tells any other, of the folder above
        if error.errno == errno.ENAMETOOLONG:
            return f"run.name: {folder.name[:40]}...: {error.strerror}; give a shorter one"
    if exists:
        resume = f"; to continue that run: flatfed resume {quote(str(folder))}"
        return (
            f"run.name: {folder} exists and is not overwritten; give another run.name or "
            "run.output-dir, or leave run.name empty for a timestamp"
            + (resume if checkpoints(folder) else "")
        )
    if problem := unwritable(folder.parent):
        return f"run.output-dir: {problem}; choose another folder"
    return None


RESUMABLE = (
    "run.rounds", "run.resume", "run.name", "run.output-dir", "clients.deadline-s",
    "clients.return-s", "clients.min-replies", "clients.max-failed-rounds", "data.path",
    "data.cache-dir", "client.state-dir", "engine.name", "engine.connection", "engine.workers",
    "engine.client-gpus", "tracking.to", "clients.keys",
)  # fmt: skip
"""Settings that a resumed run may change: they do not change what a round computes."""


def stored_config(folder: Path) -> dict[str, Scalar]:
    """The settings of the run in this folder.  Raises RunFailed."""
    try:
        return read_object(folder / CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        raise RunFailed(f"{folder}: there is no run to resume (no {CONFIG})") from None
    except (OSError, ValueError) as error:
        raise RunFailed(f"{folder / CONFIG}: cannot be read: {error}") from None


def record_setting(folder: Path, key: str, value: Scalar) -> None:
    """Store a setting that a run chose itself, so that it has the same when it is resumed."""
    write_object(folder / CONFIG, {**stored_config(folder), key: value})


def resume_error(folder: Path, values: Mapping[str, Any]) -> str | None:
    """Why the run in `folder` cannot go on with these settings, as one line."""
    try:
        stored = stored_config(folder)
    except RunFailed as error:
        return str(error)
    try:
        _lock(folder).close()
    except RunFailed as error:
        return f"{error}; wait for it to end"
    except OSError:  # the first write tells it
        pass
    for key, value in values.items():
        # A count that a file gives as a number is stored as text.
        if key not in RESUMABLE and key in stored and stored[key] not in (value, str(value)):
            now, was = (v if isinstance(v, str) else shown(v) for v in (value, stored[key]))
            return (
                f"{key} = {now}: the run in {folder} has {was}, and a resumed run keeps its "
                "settings; leave it out"
            )
    rounds, reached = values.get("run.rounds", stored.get("run.rounds")), read_summary(folder)
    # The last row of a run that ended early may be of a round that does not count; how far it came
    # is for its checkpoint to say.
    done = reached.get("rounds", 0) if reached.get("status") == "completed" else 0
    if isinstance(rounds, int) and done > rounds:
        return f"run.rounds = {rounds}: {done} rounds are already done"
    return None


def read_summary(folder: Path) -> dict[str, Any]:
    """What the run in this folder came to; empty if nothing can be read."""
    return read_or_empty(folder / SUMMARY)


def _lock(folder: Path) -> IO[bytes]:
    """The lock on a run's folder.  Raises RunFailed if another process has it, OSError."""
    if held := lock(folder):
        return held
    raise RunFailed(f"{folder}: another process is working on this run")


def ended(folder: Path, reason: str, wait: float = 0.0) -> None:
    """Mark a run whose process ended without a word as failed in its summary, unless another
    process is still at work on it when `wait` seconds are over."""
    deadline = time.monotonic() + wait
    with suppress(OSError):
        while read_summary(folder).get("status") == "running":
            try:
                held = _lock(folder)
            except RunFailed:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)
                continue
            with held:
                summary = read_summary(folder)  # as the other process left it
                if summary.get("status") == "running":
                    failed = summary | {"status": "failed", "error": reason}
                    write_object(folder / SUMMARY, failed)


class Recorder:
    """Writes as the run goes, so that whatever ends it, what was reached can be found."""

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        """A new folder, or, with `resume`, one that is there.  Raises RunFailed if another
        process is at work in it."""
        folder.mkdir(parents=True, exist_ok=resume)
        self.folder = folder
        self._lock = _lock(folder)
        remove_unfinished(folder)
        self.checkpoints = Checkpoints(folder / CHECKPOINTS)
        self.rows: list[dict[str, Any]] = []
        """The history's rows, less what they have of every client: see `_brief`."""
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self._client_cpu_s = 0.0
        """Of the rounds played since this process began."""
        self.clients_apart: Callable[[], bool] = lambda: False
        """Whether clients work in other processes than this."""
        self.earlier = {"wall_s": 0.0, "cpu_s": 0.0}
        """What this run took before it was resumed."""
        self._before = read_summary(folder) if resume else None
        """The summary of a run that is to be resumed, until anything of it is touched."""
        self.summary: dict[str, Any] = {**(self._before or {}), "status": "running"}
        for key in ("error", "model_sha256"):  # an earlier end wrote them
            self.summary.pop(key, None)
        self.labels: dict[str, Any] = {}
        self._tracking: Tracking | None = None
        self._config: dict[str, Scalar] = {}
        self.written = False
        """Whether the summary tells of the end."""
        self._length, self._digest = 0, hashlib.sha256()
        """Bytes and SHA-256 of the history's rows so far."""

    def begin(self, config: CoreConfig, values: Mapping[str, Scalar], engine: str) -> None:
        """Take down what is known before the roll call.  It is written at once, unless a run is to
        be resumed: that one's files stay until its checkpoint was read.  `values`: the settings as
        the run uses them.  Raises OSError."""
        self._config = {**values, "run.resume": False}
        if self._before is None:
            self._write_beginning()
        self.summary |= {
            "strategy": config.strategy.name,
            "regularizers": list(config.regularizer_names),
            "engine": engine,
            "seed": config.run.seed,
            "device": _device(config),
            "versions": installed(),
            "code": code_sha256(),
        }

    def _write_beginning(self) -> None:
        write_object(self.folder / CONFIG, self._config)
        write_object(self.folder / SUMMARY, self.summary)

    def track(self, config: CoreConfig, note: Callable[[str], None]) -> None:
        """Tell `tracking.to` every round from now on, and first the earlier ones that it lacks."""
        if config.tracking.names:
            from fl_server.tracking import Tracking

            experiment = self.summary["experiment"]
            history = (self.folder / HISTORY).read_bytes() if self.rows else b""
            rows = [json.loads(line) for line in history.splitlines()]
            self._tracking = Tracking(config, self.folder, experiment, rows, note)

    def row(self, row: dict[str, Any], *, done: bool = True) -> None:
        """One round, appended to the history and flushed.  Trackers, which take each round once,
        are not told of one that is not done: a resumed run plays it again."""
        # JSON has no NaN and no infinity.
        lost = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        row |= dict.fromkeys(lost)
        line = left = (json.dumps(row) + "\n").encode()
        before = len(self.rows)
        # Unbuffered: closing the file must not write what a full disk has refused.
        with (self.folder / HISTORY).open("ab", buffering=0) as file:
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
                self._add(row, line)
            except OSError:
                os.truncate(file.fileno(), self._length)
                raise
            except BaseException:  # Ctrl-C: the row is written whole, and counts, or not at all
                if left:
                    os.truncate(file.fileno(), self._length)
                elif len(self.rows) == before:
                    self._add(row, line)
                raise
        if self._tracking and done:
            self._tracking.row(row)

    def _add(self, row: dict[str, Any], line: bytes) -> None:
        self.rows.append(_brief(row))
        self._client_cpu_s += row["client_cpu_s"] or 0.0
        self._length += len(line)
        self._digest.update(line)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of the results: how far the history goes, the time it took, and
        what the summary gathers."""
        history = {"bytes": self._length, "sha256": self._digest.hexdigest()}
        gathered = {key: self.summary[key] for key in GATHERED if key in self.summary}
        return {"history": history, "gathered": gathered, **self._times()}

    def rewind(self, server_round: int, facts: Mapping[str, Any]) -> None:
        """Go back to where this round's checkpoint, with these `facts`, was written; later rounds
        are played again.

        Raises RunFailed if the history is not what it was, or if nothing is left to play and the
        last round's model was not evaluated.
        """
        path, length = self.folder / HISTORY, facts["history"]["bytes"]
        text = path.read_bytes()[:length] if path.exists() else b""
        self._digest = hashlib.sha256(text)
        if self._digest.hexdigest() != facts["history"]["sha256"]:
            raise Unresumable(
                f"{path}: its first {length} bytes are not what round {server_round} left; "
                "this run cannot be resumed"
            )
        rows = [_brief(json.loads(line)) for line in text.splitlines()]
        if server_round == self._config["run.rounds"] and "accuracy" not in rows[-1]:
            raise RunFailed(
                f"run.rounds = {server_round}: round {server_round} is already done and was not "
                f"evaluated (eval.every = {self._config['eval.every']}); give a larger number"
            )
        if path.exists():
            os.truncate(path, length)
        self._length, self.rows = length, rows
        self.earlier = {key: facts[key] for key in self.earlier}
        for key in GATHERED:
            self.summary.pop(key, None)
        self.summary |= facts.get("gathered", {})
        self.summary["resumed_after_rounds"] = [
            *self.summary.get("resumed_after_rounds", ()), server_round
        ]  # fmt: skip
        self._before = None
        (self.folder / MODEL).unlink(missing_ok=True)  # of fewer rounds
        self._write_beginning()

    def members(self, members: Sequence[Member], classes: Sequence[str]) -> None:
        """Who takes part: samples and label counts of every client."""
        self.summary |= {"clients": len(members), "data_sha256": _data_of(members)}
        self.labels = {
            "classes": list(classes),
            "samples": [member.samples for member in members],
            "label_counts": [list(member.label_counts) for member in members],
        }
        write_object(self.folder / CLIENTS, self.labels)

    def restored(self, server_round: int, sizes: Mapping[int, int]) -> None:
        """Clients that had lost their memory, or a part of the model, and the bytes of the message
        that gave it back."""
        told = [
            {"round": server_round, "client": name, "bytes": size}
            for name, size in sorted(sizes.items())
        ]
        # A new list: a checkpoint that is not written yet may have the old one.
        self.summary["memory_given_back"] = [*self.summary.get("memory_given_back", ()), *told]

    def measured(self, down: int, up: int) -> None:
        """Add bytes that were sent only to measure flatness."""
        for key, size in (("flatness_bytes_down", down), ("flatness_bytes_up", up)):
            self.summary[key] = self.summary.get(key, 0) + size

    def finish(self, model: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The final model, the pictures and the summary of a completed run."""
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in model.items()}
        write_atomically(self.folder / MODEL, save(tensors))
        self.summary |= {"status": "completed", "model_sha256": model_sha256(tensors)}
        return self._close()

    def shown(self) -> str:
        """The results, as the terminal shows them."""
        from fl_report import terminal
        from fl_report.compare import Run

        strategy, config = str(self.summary["strategy"]), self._config
        run = Run(strategy, self.summary, self.rows, config, self.labels)
        return terminal.text(terminal.one_run(run))

    def fail(self, reason: str) -> None:
        """Write the summary, and the pictures so far, of a run that ended early; one that was to be
        resumed and was not touched stays as it was, and so does one that is completed but for its
        pictures."""
        if self._before is not None or read_summary(self.folder).get("status") == "completed":
            return
        self.summary |= {"status": "failed", "error": reason}
        try:
            self._close()
        except OSError as error:  # the disk may be what failed; the caller tells the reason
            print(f"{SUMMARY} could not be written: {error.strerror}", flush=True)

    def stopped(self) -> None:
        """Write down at once that a run under way is being stopped, be it in the middle of `fail`:
        Flower refuses a stopped run's calls, and may do so before its signal comes.  The pictures
        are for `fail`."""
        if self._before is None and read_summary(self.folder).get("status") == "running":
            if self.summary["status"] != "completed":
                self.summary |= {"status": "failed", "error": STOPPED}
            self._write_end()

    def _close(self) -> dict[str, Any]:
        self._write_end()
        if self._tracking:
            self._tracking.close(self.summary)
        if self._config.get("run.pictures", True):
            self._draw()
        return self.summary

    def _write_end(self) -> None:
        evaluated = [row for row in self.rows if row.get("accuracy") is not None]
        if evaluated:
            self.summary |= {
                "accuracy": evaluated[-1]["accuracy"],
                "best_accuracy": max(row["accuracy"] for row in evaluated),
                "loss": evaluated[-1]["loss"],
            }
        self.summary |= {
            "rounds": len(self.rows),
            "bytes_up": sum(row["bytes_up"] for row in self.rows),
            "bytes_down": sum(row["bytes_down"] for row in self.rows),
            **self._times(),
        }
        write_object(self.folder / SUMMARY, self.summary)
        self.written = True

    def _times(self) -> dict[str, float]:
        """Seconds so far, before a resume too; the clients' processor time is part of it."""
        wall, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        if self.clients_apart():
            cpu += self._client_cpu_s
        return {
            "wall_s": round(self.earlier["wall_s"] + wall, 3),
            "cpu_s": round(self.earlier["cpu_s"] + cpu, 3),
        }

    def _draw(self) -> None:
        """The pictures, last: matplotlib is not in memory while rounds run."""
        from fl_report import page
        from fl_report.plots import curves, label_distribution

        try:
            if self.rows:
                curves(self.rows, self.folder / "curves.png")
            if self.labels:
                counts, classes = self.labels["label_counts"], self.labels["classes"]
                label_distribution(counts, classes, self.folder / "clients.png")
            page.write([self.folder], self.folder / REPORT)
        except (OSError, ValueError) as error:  # a run is no worse for its pictures
            print(f"pictures and {REPORT}: {error}", flush=True)


def _brief(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's numbers, and who was refused: all that is needed at a run's end.  Thousands of rows
    with a number for each of a thousand clients would fill the memory."""
    return {k: v for k, v in row.items() if k in FAILURES or not isinstance(v, list | dict)}


def _data_of(members: Sequence[Member]) -> str:
    """Digest of the data set, or of all of them where clients have their own."""
    first, *others = sorted({member.data for member in members})
    return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first


def _device(config: CoreConfig) -> str:
    """Where this process evaluates, and the clients in it train: "cpu (2 processors, AMD EPYC
    7B13)", "NVIDIA H200 (cuda:0)"."""
    import torch

    from fl_common.assembly import training_device

    try:
        device = training_device(config)
    except ValueError:  # this machine has no such device: whoever needs it says so
        return config.train.device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    count = machine.processors()
    return f"{device} ({count} processor{'s' * (count != 1)}, {machine.processor()})"
