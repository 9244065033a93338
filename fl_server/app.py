"""The ServerApp: checks, roll call, and the round loop that every engine and strategy shares."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import torch
from flwr.app import ConfigRecord
from flwr.serverapp import ServerApp

from fl_common import assembly, wire
from fl_common.config import methods, resolve
from fl_common.layout import Layout, concatenate, tensors_of
from fl_server.evaluation import Evaluator
from fl_server.progress import Progress
from fl_server.recorder import Recorder, folder_error, results_folder
from fl_server.roster import Cohort, Exchange, RunFailed, draw, roll_call

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flwr.app import Context
    from flwr.serverapp import Grid

    from fl_common.config import CoreConfig
    from fl_common.data.sources import Dataset
    from fl_common.layout import Flat
    from fl_server.roster import Member

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from checks to results.  Raises after writing `status: failed`, for whatever
    reason, because Flower takes `sys.exit` for success."""
    values = dict(context.run_config)
    folder = _folder_of(values)
    problem = folder_error(folder)
    if problem:
        raise RunFailed(problem)
    recorder = Recorder(folder)
    try:
        config = resolve(values)
        engine = engine_of(grid)
        recorder.begin(config, {**config.flat(), "engine.name": engine}, engine)
        progress = Progress(config.run.rounds, bar=engine == "inprocess")
        progress.note(f"results: {folder}")
        federate(grid, config, recorder, progress)
    except BaseException as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        recorder.fail(reason or type(error).__name__)
        print(f"run failed: {reason}\nresults: {folder}", flush=True)
        raise


def _folder_of(values: Mapping[str, Any]) -> Path:
    """The results folder even of a configuration that is wrong elsewhere."""
    base, name = (values.get(key) for key in ("run.output-dir", "run.name"))
    base = base if isinstance(base, str) and Path(base).is_absolute() else ""
    return results_folder(base, name if isinstance(name, str) else "")


def engine_of(grid: Grid) -> str:
    """Which engine runs us: the grid's class says so, whatever the configuration says."""
    return {"InProcessGrid": "inprocess", "InMemoryGrid": "ray"}.get(type(grid).__name__, "grpc")


def federate(grid: Grid, config: CoreConfig, recorder: Recorder, progress: Progress) -> None:
    """All rounds of a run, from the roll call to the final model."""
    try:
        members = roll_call(grid, config, nodes_may_come=engine_of(grid) == "grpc")
        determinism.prepare_process(config.train.threads, config.train.deterministic)
        data = assembly.load_data(config)
        recorder.members(members, data.classes)
        model, layout = _initial_model(config, data)
        progress.note(_opening(config, members, model))
        model = _rounds(grid, config, members, model, Evaluator(config, data), recorder, progress)
        summary = recorder.finish(layout.named(model))
    finally:
        progress.stop()
    progress.note(_closing(summary, recorder.folder))


def _initial_model(config: CoreConfig, data: Dataset) -> tuple[Flat, Layout]:
    net = assembly.new_model(config, data, torch.device("cpu"))
    return {k: concatenate(t.values()) for k, t in tensors_of(net).items()}, Layout.of(net)


def _rounds(
    grid: Grid,
    config: CoreConfig,
    members: Sequence[Member],
    model: Flat,
    evaluate: Evaluator,
    recorder: Recorder,
    progress: Progress,
) -> Flat:
    """The round loop: draw a cohort, push the strategy's messages, and hand each reply on to the
    strategy in partition order, as it comes.  Gives the final model."""
    method = methods("strategies")[config.strategy.name]
    strategy = method(config.params_of(method.name))
    for server_round in range(1, config.run.rounds + 1):
        started = time.perf_counter()
        cohort = [members[i] for i in draw(config.clients, config.run.seed, server_round)]
        names = [member.partition for member in cohort]
        exchange = Exchange(grid, config.clients.deadline_s)
        arrays = wire.pack(model)
        messages = strategy.configure_train(
            server_round, arrays, ConfigRecord(), Cohort(grid, cohort)
        )
        arrays, metrics = strategy.aggregate_train(server_round, exchange.replies(messages, names))
        for name, reason in sorted(exchange.failed.items()):
            progress.note(f"round {server_round}, client {name}: {reason}")
        if arrays is None or len(exchange.accepted) < config.clients.min_replies:
            raise RunFailed(
                f"round {server_round}: {len(exchange.accepted)} of {len(cohort)} clients "
                f"replied, fewer than clients.min-replies = {config.clients.min_replies}; "
                + "; ".join(dict.fromkeys(exchange.failed.values()))
            )
        model = wire.unpack(arrays)
        row = {"round": server_round}
        if server_round % config.eval.every == 0 or server_round == config.run.rounds:
            row["accuracy"], row["loss"] = evaluate(model)
        row |= {
            "client_loss": metrics["loss"],
            "cohort": names,
            "replies": sorted(exchange.accepted),
            "failed": {str(name): reason for name, reason in sorted(exchange.failed.items())},
            "bytes_up": exchange.bytes_up,
            "bytes_down": exchange.bytes_down,
            "seconds": round(time.perf_counter() - started, 4),
            "client_cpu_s": round(sum(m["cpu-s"] for m in exchange.accepted.values()), 4),
        }
        recorder.row(row)
        progress.row(row)
    return model


def _opening(config: CoreConfig, members: Sequence[Member], model: Flat) -> str:
    method = "+".join([config.strategy.name, *config.regularizer_names])
    samples = sum(member.samples for member in members)
    return (
        f"{method} on {config.data.source}: {len(members)} clients, {samples} samples, "
        f"{config.cohort_size} clients a round; {config.model.name} with "
        f"{model['params'].numel():,} parameters"
    )


def _closing(summary: Mapping[str, Any], folder: Path) -> str:
    return (
        f"accuracy {summary['accuracy']:.4f} (best {summary['best_accuracy']:.4f}) after "
        f"{summary['rounds']} rounds in {summary['wall_s']:.1f} s; "
        f"model_sha256 {summary['model_sha256'][:16]}...\nresults: {folder}"
    )
