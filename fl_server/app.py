"""The ServerApp: checks, roll call, rounds, results."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from fl_common import determinism  # noqa: F401  # isort: skip  (sets MKL's environment first)
import torch
from flwr.serverapp import ServerApp
from flwr.supercore.exit.exit_handler import add_exit_handler

from fl_common import wire
from fl_common.checks import in_process_only, unused
from fl_common.config import ConfigError, methods, resolve
from fl_common.layout import on
from fl_common.local import Work, local_methods
from fl_server import tracking
from fl_server.exchange import HELD_BYTES, Exchange, RunFailed, Unresumable, by_reason
from fl_server.keys import KeysError, read_keys
from fl_server.progress import Progress
from fl_server.recorder import STOPPED, Recorder, folder_error, results_folder, resume_error
from fl_server.roster import Roster
from fl_server.rounds import Rounds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flwr.app import Context
    from flwr.serverapp import Grid

    from fl_common.config import CoreConfig
    from fl_common.layout import Flat

app = ServerApp()

ENGINES = {"InProcessGrid": "inprocess", "InMemoryGrid": "ray"}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from checks to results.  Raises after writing `status: failed`, for whatever
    reason, because Flower takes `sys.exit` for success."""
    values = dict(context.run_config)
    folder = _folder_of(values)
    resume = values.get("run.resume") is True
    problem = resume_error(folder, values) if resume else folder_error(folder)
    try:
        if problem:
            raise RunFailed(problem)
        recorder = Recorder(folder, resume=resume)
    except (OSError, RunFailed) as error:
        error = _for_its_user(error, folder)
        print(f"run failed: {error}", flush=True)
        raise error
    config, engine = None, engine_of(grid)
    if engine == "grpc":
        # Flower ends a stopped process by force 5 s after its signal; the exception that it raises
        # comes here after 3 s or more, once the last lines are on their way.
        add_exit_handler(recorder.stopped, run_before_force_exit=True)
    try:
        config = resolve(values)
        # Plain `flwr run` may say engine.name=inprocess.
        if wrong := tracking.missing(config) + in_process_only(config, engine):
            raise ConfigError(wrong)
        recorder.begin(config, {**config.flat(), "engine.name": engine}, engine)
        recorder.clients_apart = lambda: getattr(grid, "clients_apart", True)
        progress = Progress(config.run.rounds, bar=engine == "inprocess")
        progress.note(f"results: {folder}")
        federate(grid, config, recorder, progress)
    except BaseException as error:
        # Flower stops a run by raising SystemExit in its ServerApp.
        ended = {KeyboardInterrupt: "interrupted", SystemExit: STOPPED}.get(type(error))
        error = _for_its_user(error, folder)
        reason = ended or str(error) or type(error).__name__
        recorder.fail(reason)
        if recorder.written and recorder.summary["status"] == "completed":
            print(f"{reason} while the pictures were drawn; the results are complete, and\n"
                  f"flatfed report {quote(str(folder))} draws them", flush=True)  # fmt: skip
            raise error
        print(f"run failed: {reason}\nresults: {folder}", flush=True)
        hopeful = recorder.checkpoints.rounds and not isinstance(error, Unresumable)
        if hopeful and not (config and _unresumable(config, engine)):
            print(f"continue it with: flatfed resume {quote(str(folder))}", flush=True)
        raise error


def _for_its_user(error: BaseException, folder: Path) -> BaseException:
    """The error to raise: what a disk refused, as one line instead of a traceback."""
    if not isinstance(error, OSError):
        return error
    return RunFailed(f"{error.filename or folder}: {error.strerror or error}")


def _folder_of(values: Mapping[str, Any]) -> Path:
    """The results folder even of a configuration that is wrong elsewhere."""
    base, name = (values.get(key) for key in ("run.output-dir", "run.name"))
    base = base if isinstance(base, str) and Path(base).is_absolute() else ""
    return results_folder(base, name if isinstance(name, str) else "")


def engine_of(grid: Grid) -> str:
    """Which engine runs us: the grid's class says so, whatever the configuration says."""
    for cls in type(grid).__mro__:
        if cls.__name__ in ENGINES:
            return ENGINES[cls.__name__]
    return "grpc"


def federate(grid: Grid, config: CoreConfig, recorder: Recorder, progress: Progress) -> None:
    """All rounds of a run, from the roll call to the final model."""
    try:
        engine, clients = engine_of(grid), config.clients
        exchange = Exchange(grid, clients.deadline_s, progress.note)
        if engine == "grpc":
            exchange.held_bytes = HELD_BYTES
            wire.receive_in_pieces()
        keys = _keys(clients.keys, engine) if clients.keys else None
        roster = Roster(exchange, clients.number, clients.return_s, keys)
        roster.assemble(nodes_may_come=engine == "grpc")
        exchange.locate = roster.locate
        first = roster.members[0]
        _check_data(config, roster)
        run = Rounds(config, exchange, roster, recorder, progress)
        progress.note(_opening(config, roster, run.model))
        if config.run.resume:
            run.resume()
            progress.resumed(run.done)
        else:
            recorder.checkpoints.write(run.checkpoint())
        recorder.members([roster.members[i] for i in sorted(roster.members)], first.classes)
        works = [Work.of(config, 1, n, sum(run.samples)) for n in run.samples]
        warnings = unused(config) + run.strategy.warnings(config, run.model, works)
        for name in config.regularizer_names:
            warnings += methods("regularizers")[name].warnings(config)
        for warning in [*warnings, *_alike(config, roster), *_unresumable(config, engine)]:
            progress.note(f"warning: {warning}")
        recorder.track(config, progress.note)
        run.play()
        layout = run.evaluator.layout
        model = layout.named(on(torch.device("cpu"), run.model))
        del run  # the test set is not in memory while pictures are drawn
        summary = recorder.finish(model)
    finally:
        progress.stop()
    progress.note(recorder.shown())
    progress.note(_closing(summary, recorder.folder))


def _unresumable(config: CoreConfig, engine: str) -> list[str]:
    """Why this run could not go on after a crash, a line each.  Nodes of a federation (by plain
    `flwr run` too, whatever engine.name says) have state directories of their own."""
    if config.client.state_dir or engine == "grpc":
        return []
    known = local_methods(config, {wire.SAMPLES: config.clients.number}, 1, 1)
    if config.train.keeps_state:
        return ["train.keep-optimizer without client.state-dir: this run cannot be resumed"]
    if any(method.memory for method in known) and not config.server.ledger:
        return ["server.ledger=false without client.state-dir: this run cannot be resumed"]
    return []


def _keys(path: str, engine: str) -> dict[int, str]:
    """The clients' public keys.  Raises RunFailed."""
    if engine != "grpc":
        raise RunFailed(
            f"clients.keys: the nodes of engine.name={engine} have no keys; leave it out"
        )
    try:
        return read_keys(Path(path))
    except KeysError as error:
        raise RunFailed(f"clients.keys: {error}") from error


def _check_data(config: CoreConfig, roster: Roster) -> None:
    """All clients hold partitions of one data set, or each has its own.  Raises RunFailed."""
    members = [roster.members[i] for i in sorted(roster.members)]
    sets = {member.data for member in members}
    if config.data.partition == "local" and len(members) > 1 == len(sets):
        raise RunFailed(
            "data.partition = local: all clients hold the same data; give each node its own "
            "data-path, or choose another data.partition"
        )
    if config.data.partition != "local" and len(sets) > 1:
        other = next(m.partition for m in members if m.data != members[0].data)
        raise RunFailed(
            f"data.partition = {config.data.partition}: client {other} has another data set than "
            "client 0 (other files or another version); give all nodes the same, or set "
            "data.partition=local"
        )


def _alike(config: CoreConfig, roster: Roster) -> list[str]:
    """Clients that train on the same data, where each should have its own."""
    if config.data.partition != "local":
        return []
    data = {i: roster.members[i].data for i in sorted(roster.members)}
    return [
        f"{who} hold the same data, which counts once for each; give each node its own data-path"
        for _, who in by_reason(data, "client")
        if who.startswith("clients")
    ]


def _opening(config: CoreConfig, roster: Roster, model: Flat) -> str:
    method = "+".join([config.strategy.name, *config.regularizer_names])
    samples = sum(member.samples for member in roster.members.values())
    return (
        f"{method} on {config.data.source}: {len(roster.members)} clients, {samples} samples, "
        f"{config.cohort_size} clients a round; {config.model.name} with "
        f"{model['params'].numel():,} parameters"
    )


def _closing(summary: Mapping[str, Any], folder: Path) -> str:
    rounds = summary["rounds"]
    return (
        f"accuracy {summary['accuracy']:.4f} (best {summary['best_accuracy']:.4f}) after "
        f"{rounds} round{'s' * (rounds != 1)} in {summary['wall_s']:.1f} s; "
        f"model_sha256 {summary['model_sha256'][:16]}...\nresults: {folder}"
    )
