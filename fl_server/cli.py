"""The `flatfed` command: one front door to every engine.

Exit codes: 0 done, 2 a mistake in the call (nothing was started), 3 the run failed, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from rich.console import RenderableType

    from fl_common.config import CoreConfig, Scalar
    from fl_report.cost import Plan
    from fl_server.flower_run import FlowerStatus

OK, USAGE, FAILED, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143

EXAMPLES = """\
examples:
  flatfed run
      ten clients train on real handwritten digits, in this process
  flatfed run strategy.name=fedprox fedprox.mu=0.01 clients.per-round=5 run.rounds=20
  flatfed run data.source=cifar10 data.path=CIFAR10_DIR model.name=lenet64 clients.number=100
  flatfed run engine.name=ray
      the same run, with the same result, on Flower's simulation
  flatfed up --clients 4 && flatfed run engine.name=grpc clients.number=4 && flatfed down
      the same between processes, as between machines
  flatfed resume results/NAME
      continue a run that was interrupted, from its newest checkpoint
  flatfed config
      every key with its default and meaning
  flatfed flatness results/NAME results/OTHER
      how flat the loss is at their final models
  flatfed suite experiments/smoke.toml
      a table of methods over seeds, beside the published one where there is one
  flatfed cost data.source=cifar10 model.name=resnet8 clients.number=40 run.rounds=25
      what partial updates save; `flatfed groups resnet8` lists their groups
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="flatfed",
        description="Federated learning for clients whose data differ.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument(
        "values", nargs="*", metavar="key=value", help="a setting, e.g. train.lr=0.05"
    )
    settings.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        action="append",
        default=[],
        help="settings from a file, of several the later wins; key=value wins over all",
    )
    raw = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    run = commands.add_parser("run", parents=[settings], help="train a model", **raw)
    run.set_defaults(function=_run)
    of_run = argparse.ArgumentParser(add_help=False)
    of_run.add_argument("folder", type=Path, metavar="DIR", help="the run's results folder")
    again = commands.add_parser(
        "resume",
        parents=[of_run, settings],
        help="continue a run that ended early, from its checkpoint",
    )
    again.set_defaults(function=_resume)
    of_runs = argparse.ArgumentParser(add_help=False)
    of_runs.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="results folders")
    of_runs.set_defaults(values=[])
    compare = commands.add_parser(
        "compare", parents=[of_runs], help="a table, and a picture, of several runs"
    )
    compare.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the accuracies")
    compare.add_argument("--anyway", action="store_true", help="runs of different data too")
    compare.set_defaults(function=_compare)
    norms = commands.add_parser(
        "grad-norm",
        parents=[of_runs],
        help="how the gradient's norm jumps when models are averaged",
        description="For runs with eval.grad-norm=true: the norm of the local gradient in "
        "the first quarter of a round over that in the last quarter of the one before.",
    )
    norms.add_argument("--picture", type=Path, metavar="FILE.png", help="draw it, step by step")
    norms.set_defaults(function=_grad_norm)
    report = commands.add_parser(
        "report", parents=[of_runs], help="one HTML page of a run, or of several side by side"
    )
    report.add_argument("--out", type=Path, metavar="FILE.html", help="where (default: report.html "
        "in the run's folder, or here for several)")  # fmt: skip
    report.add_argument("--target", type=float, metavar="ACCURACY", help="tell the rounds, bytes "
        "and seconds to it, 0-1 (default: 90 %% of the best)")  # fmt: skip
    report.add_argument("--anyway", action="store_true", help="runs of different data too")
    report.set_defaults(function=_report)
    _add_flatness_command(commands, of_runs)
    _add_suite_command(commands)
    config = commands.add_parser(
        "config", parents=[settings], help="print all settings with their meaning, as TOML"
    )
    config.add_argument(
        "--write-pyproject",
        action="store_true",
        help="write the defaults into ./pyproject.toml, where Flower looks for them",
    )
    config.set_defaults(function=_config)
    _add_cost_commands(commands, settings)
    _add_federation_commands(commands)
    _add_key_commands(commands)
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on settings that stand behind an option: they are settings all the same.
    if any(item.startswith("-") for item in rest) or not hasattr(args, "values"):
        parser.parse_args(argv)
    else:
        args.values += rest
    try:
        return args.function(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _add_flatness_command(
    commands: argparse._SubParsersAction, of_runs: argparse.ArgumentParser
) -> None:
    flatness = commands.add_parser(
        "flatness",
        parents=[of_runs],
        help="how flat the loss is where runs have ended, side by side",
        description="Eigenvalues and trace of the Hessian of the test loss at the final models of "
        "runs, into a table and each DIR/flatness.json. A run with flatness.every records the "
        "same as it goes.",
    )
    add = flatness.add_argument
    add("--samples", type=int, default=1024, metavar="N", help="test samples that it is measured "
        "on, drawn once, and at most of its own that a client's diagonal is made from "
        "(default: 1024)")  # fmt: skip
    add("--top", type=int, default=5, metavar="K", help="largest eigenvalues (default: 5)")
    add("--probes", type=int, default=32, metavar="N", help="random vectors for the trace: its "
        "error falls as their root (default: 32)")  # fmt: skip
    add("--density", action="store_true", help="the density of all eigenvalues, and its picture")
    add("--layers", action="store_true", help="lambda_max, trace and activation norms of every "
        "layer, as a table and bars; as much work again for each layer")  # fmt: skip
    add("--landscape", action="store_true", help="the loss over a plane of two random directions, "
        "as contours and surface; 441 passes over the samples")  # fmt: skip
    add("--match", action="store_true", help="H_N and H_D, FedAlign's measures of how unlike the "
        "clients' Hessians are, over the run's own partitions")  # fmt: skip
    add("--match-probes", type=int, metavar="N", help="random vectors of each client's diagonal, "
        "an even number (default: 200)")  # fmt: skip
    add("--engine", choices=("own", "pyhessian"), default="own", help="whose eigenvalues, trace "
        "and density; pyhessian: `pip install 'flatfed[pyhessian]'` (default: own)")  # fmt: skip
    add("--data-path", type=Path, metavar="PATH", help="where the data are now, if no longer at "
        "the runs' data.path")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the samples and random vectors, the "
        "same for all runs; equal seeds give equal bits (default: 0)")  # fmt: skip
    add("--pictures", type=Path, metavar="FOLDER", help="where pictures go, those of all runs in "
        "one (default: each run's into its own folder)")  # fmt: skip
    flatness.set_defaults(function=_flatness)


def _add_suite_command(commands: argparse._SubParsersAction) -> None:
    suite = commands.add_parser(
        "suite",
        help="run a paper's table, and show it beside the published one",
        description="Runs the cells of a suite (experiments/*.toml) that are not there yet, then "
        "prints and writes published | ours | difference, and a page of all runs. Called again, "
        "it goes on where it ended.",
    )
    add = suite.add_argument
    add("file", type=Path, metavar="FILE.toml", help="the suite; docs/suites.md has the format")
    add("values", nargs="*", metavar="key=value", help="a setting of every cell, e.g. data.path=D")
    add("--reduced", action="store_true", help="as its [reduced] says, to fit a CPU")
    add("--device", metavar="NAME", help="auto, cpu, cuda or cuda:K")
    add("--jobs", type=int, default=1, metavar="N", help="cells at once (default: 1)")
    add("--out", type=Path, metavar="DIR", help="where the suites' folders are made (default: "
        "results/suites)")  # fmt: skip
    add("--table", action="store_true", help="make the table of what is there; run nothing")
    add("--publish", type=Path, metavar="DIR", help="the same, into DIR/NAME.md and .json")
    suite.set_defaults(function=_suite, config=[])


def _add_cost_commands(
    commands: argparse._SubParsersAction, settings: argparse.ArgumentParser
) -> None:
    of_data = argparse.ArgumentParser(add_help=False)
    of_data.add_argument("--shape", metavar="C,H,W", help="a sample, (C, H, W) or (F,), where "
        "data.source does not say (default: 3,32,32)")  # fmt: skip
    of_data.add_argument("--classes", type=int, metavar="N", help="where data.source does not say "
        "(default: 10)")  # fmt: skip
    of_model = argparse.ArgumentParser(add_help=False)
    of_model.add_argument("model", metavar="MODEL", help="its name, or package.module:Name")
    groups = commands.add_parser(
        "groups",
        parents=[of_model, settings, of_data],
        help="list the groups of layers that partial updates train by turns",
        description="The groups of a model: what trains and travels together in a round of "
        "strategy.name=fedpart. fedpart.groups sets others, model.norm and model.head count, "
        "and data.source gives the shape of a sample and the classes.",
    )
    groups.set_defaults(function=_groups)
    cost = commands.add_parser(
        "cost",
        parents=[settings, of_data],
        help="bytes and multiply-adds of partial updates beside full ones",
        description="What a run with strategy.name=fedpart and these settings costs, beside full "
        "updates: as published (Wang et al., NeurIPS 2024) and as it is. Nothing is trained.",
    )
    cost.add_argument("--samples", type=float, metavar="N", help="training samples of a client "
        "(default: those of data.source over clients.number)")  # fmt: skip
    cost.add_argument("--json", action="store_true", help="print JSON: exact numbers")
    cost.set_defaults(function=_cost)


def _add_federation_commands(commands: argparse._SubParsersAction) -> None:
    of_node = argparse.ArgumentParser(add_help=False)
    add = of_node.add_argument
    add("values", nargs="*", metavar="key=value", help="further node-config keys")
    add("--insecure", action="store_true", help="no TLS: only on a network that you trust")
    add("--device", metavar="NAME", help="auto, cpu, cuda or cuda:K")
    add("--threads", type=int, metavar="N", help="torch threads")
    add("--poll-interval", type=float, default=0.2, metavar="S", help="pause between two questions "
        "for work [s] (default: 0.2)")  # fmt: skip
    add("--no-preload", action="store_true", help="import torch anew for every message")
    add("--worker", action="store_true", help="keep a resident trainer, with model, data and "
        "device, between messages; of use with a GPU above all")  # fmt: skip

    up = commands.add_parser("up", parents=[of_node], help="start a federation on this machine")
    up.add_argument("--clients", type=int, required=True, metavar="N", help="how many nodes")
    up.add_argument("--data-path", type=Path, action="append", default=[], metavar="PATH",
        help="the nodes' data: once for all, or once for each")  # fmt: skip
    up.set_defaults(function=_up)

    down = commands.add_parser("down", help="end the federation that `flatfed up` started")
    down.set_defaults(function=_down)

    node = commands.add_parser("node", parents=[of_node], help="take part in a federation")
    add = node.add_argument
    add("--superlink", required=True, metavar="HOST:PORT", help="the server's port for nodes")
    add("--partition", type=int, metavar="N", help="this node's number, from 0 on")
    add("--root-certificates", type=Path, metavar="FILE", help="the CA of the server (ca.crt)")
    add("--auth-key", type=Path, metavar="FILE", help="this node's private key")
    add("--trusted-entities", type=Path, metavar="FILE", help="run only apps that have a signature "
        "of one of these, by Flower's hub (docs/security.md)")  # fmt: skip
    add("--data-path", type=Path, metavar="PATH", help="this node's data")
    add("--state-dir", type=Path, metavar="PATH", help="where this node keeps what it remembers "
        "between rounds (default: $FLATFED_HOME/state or ~/.flatfed/state)")  # fmt: skip
    add("--port", type=int, default=0, metavar="N", help="of the node's own loopback API")
    add("--wait", type=float, default=3.0, metavar="S",
        help="how long the server may take to come up [s] (default: 3)")  # fmt: skip
    node.set_defaults(function=_node)

    worker = commands.add_parser("worker", help="be a node's resident trainer",
        description="Holds model, data and device for a node that is started with --node-config "
        "worker-socket=PATH; `flatfed node --worker` starts one by itself.")  # fmt: skip
    worker.add_argument("--socket", type=Path, required=True, metavar="PATH", help="where the "
        "node's messages come in; for this user alone")  # fmt: skip
    worker.set_defaults(function=_worker, values=[])


def _add_key_commands(commands: argparse._SubParsersAction) -> None:
    certs = commands.add_parser(
        "certs",
        help="make certificates and keys for a federation",
        description="A CA, the server's certificate, a key per node, and keys.json, the public "
        "keys by partition (clients.keys). Called again, it keeps the CA and all keys, adds nodes "
        "up to --nodes, and with --host makes a new server certificate.",
    )
    add = certs.add_argument
    add("folder", type=Path, metavar="DIR", help="a folder of its own, for you alone")
    add("--host", action="append", default=[], metavar="NAME", help="a name or IP address by which "
        "nodes and users reach the server; may be given several times")  # fmt: skip
    add("--nodes", type=int, default=0, metavar="N", help="keys for partitions 0 to N-1")
    add("--days", type=float, default=365, metavar="D", help="how long the server's certificate "
        "holds (default: 365)")  # fmt: skip
    certs.set_defaults(function=_certs, values=[])

    register = commands.add_parser(
        "register", help="tell a SuperLink which nodes' keys it may let in"
    )
    add = register.add_argument
    add("keys", type=Path, metavar="keys.json", help="public keys by partition, of `flatfed certs`")
    add("connection", metavar="CONNECTION", help="the SuperLink's name in Flower's configuration")
    add("--remove", action="store_true", help="unregister all other nodes")
    register.set_defaults(function=_register, values=[])


def entry_point() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # progress is to be read now, through a pipe too
    sys.exit(main())


def _complain(lines: Sequence[str]) -> int:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return USAGE


def _settings(args: argparse.Namespace) -> tuple[dict[str, Scalar], list[str]]:
    """The values of the file and of the command line over it, and what is no setting."""
    from fl_common.config import flatten, from_text

    errors: list[str] = []
    values: dict[str, Scalar] = {}
    for file in args.config:
        import tomllib

        try:
            values |= flatten(tomllib.loads(file.read_text()))
        except OSError as error:
            errors.append(f"--config {file}: {error.strerror}")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            errors.append(f"--config {file}: not a TOML file: {error}")
    given: dict[str, str] = {}
    for item in args.values:
        key, equals, value = item.partition("=")
        if not equals:
            errors.append(f"{item}: settings are written key=value")
            continue
        if key in given:
            errors.append(f"{key}: given twice, {given[key]!r} and {value!r}")
        given[key] = value
    return values | from_text(given), errors


def _config(args: argparse.Namespace) -> int:
    from fl_common.config import ConfigError, resolve
    from fl_common.pyproject import as_toml, write_pyproject

    try:
        values, errors = _settings(args)
        config = resolve(values, absolute_paths=False, also=errors)
    except ConfigError as error:
        return _complain(error.errors)
    if not args.write_pyproject:
        print(as_toml(config.flat()), end="")
        return OK
    if args.values or args.config:
        return _complain(["--write-pyproject writes the defaults; give no settings with it"])
    try:
        write_pyproject(Path("pyproject.toml"))
    except (OSError, ValueError) as error:
        return _complain([f"--write-pyproject: {error}"])
    return OK


def _compare(args: argparse.Namespace) -> int:
    from fl_report import compare

    return _show_runs(args, compare, anyway=args.anyway)


def _report(args: argparse.Namespace) -> int:
    from fl_report import compare, page, terminal

    folders = _folders(args)
    out = args.out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    try:
        page.write(folders, out, args.target, anyway=args.anyway)
        print(terminal.text(page.summary_table(compare.read(folders), args.target)))
    except (OSError, ValueError) as error:
        return _complain([str(error)])
    print(f"report: {out}")
    return OK


def _suite(args: argparse.Namespace) -> int:
    from fl_common.config import absolute_paths
    from fl_report.suite import SuiteError
    from fl_server import suites

    given, errors = _settings(args)
    if args.device is not None:
        if "train.device" in given:
            errors.append("train.device: given twice, by --device too")
        given["train.device"] = args.device
    if args.jobs < 1:
        errors.append(f"--jobs {args.jobs}: must be at least 1")
    if errors:
        return _complain(errors)
    try:
        suite = suites.open_suite(args.file, absolute_paths(given), args.reduced, args.out)
    except SuiteError as error:
        return _complain(error.errors)
    failed: list[str] = []
    try:
        if not (args.table or args.publish):
            failed = suite.run(args.jobs)
        table = suite.table()
        _print(suite.picture(table))
        for path in suite.write(table, args.publish):
            print(path)
    except (OSError, SuiteError) as error:
        return _complain(str(error).splitlines())
    except KeyboardInterrupt:
        print(f"interrupted; go on with: {suite.command(places=True)}", file=sys.stderr)
        return INTERRUPTED
    for name in failed:
        print(f"error: {name} failed; its log: {suite.log(name)}", file=sys.stderr)
    return FAILED if failed else OK


def _grad_norm(args: argparse.Namespace) -> int:
    from fl_report import grad_norm

    # Each run is compared with itself, so that their data need not be the same.
    return _show_runs(args, grad_norm, anyway=True)


def _show_runs(args: argparse.Namespace, report: ModuleType, *, anyway: bool) -> int:
    from fl_report.compare import read
    from fl_report.settings import different_data

    try:
        runs = read(_folders(args))
        if not anyway and (problem := different_data(runs)):
            raise ValueError(problem)
        _print(report.table(runs))
        if args.picture:
            report.draw(runs, args.picture)
    except (OSError, ValueError) as error:
        return _complain([str(error)])
    return OK


def _folders(args: argparse.Namespace) -> list[Path]:
    """The results folders, those that stand behind an option too."""
    return [*args.folders, *map(Path, args.values)]


def _flatness(args: argparse.Namespace) -> int:
    from fl_flatness import finished, report
    from fl_flatness.stored import Stored
    from fl_report.compare import read

    probes = finished.MATCH_PROBES if args.match_probes is None else args.match_probes
    options = finished.Options(
        samples=args.samples, top=args.top, probes=args.probes, density=args.density,
        layers=args.layers, landscape=args.landscape, match=args.match, match_probes=probes,
        engine=args.engine, seed=args.seed,
    )  # fmt: skip
    errors = options.errors()
    if args.match_probes is not None and not args.match:
        errors.append(f"--match-probes {args.match_probes}: has no effect without --match")
    if errors:
        return _complain(errors)
    try:
        runs = read(_folders(args))
        loaded = [Stored.load(folder, args.data_path) for folder in _folders(args)]
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        return _complain([str(error)])
    if args.match and (problems := list(filter(None, map(finished.unmatched, loaded)))):
        return _complain(problems)
    measured: list[report.Measured] = []
    try:
        for run, one in zip(runs, loaded, strict=True):
            say = functools.partial(print, f"{run.label}:")
            try:
                found = finished.examine(one, options, say)
            except ValueError as error:
                print(f"error: {one.folder}: {error}", file=sys.stderr)
                return FAILED
            if "match_error" in found:
                say(f"no H_N and H_D: {found['match_error']}")
            say(finished.write(one.folder, found))
            measured.append(report.Measured(run.label, one.folder, run.rows, found))
        _print(report.table(measured))
        if args.layers:
            for one in measured:
                _print(report.layer_table(one))
        alone = [([one], one.folder) for one in measured]
        for those, folder in [(measured, args.pictures)] if args.pictures else alone:
            for picture in report.draw(those, folder):
                print(picture)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return OK


def _groups(args: argparse.Namespace) -> int:
    from fl_common.config import ConfigError
    from fl_common.models.catalogue import MODELS

    # A setting like any other: what is given twice is told.
    args.values = [f"model.name={args.model}", *args.values]
    info = MODELS.get(args.model)
    takes_text = info is not None and info.input == "tokens"
    try:
        plan = _plan(args, {"data.source": "synthetic-text" if takes_text else "synthetic"})
    except ConfigError as error:
        return _complain(error.errors)
    from fl_report.cost import groups_table

    _print(groups_table(plan))
    return OK


def _cost(args: argparse.Namespace) -> int:
    import json

    from fl_common.config import ConfigError
    from fl_common.data.catalogue import SOURCES

    try:
        plan = _plan(args, {})
    except ConfigError as error:
        return _complain(error.errors)
    config, samples = plan.config, args.samples
    if config.strategy.name != "fedpart":
        return _complain([f"strategy.name = {config.strategy.name}: has no partial updates; "
            "leave it out, full ones stand beside fedpart's anyway"])  # fmt: skip
    if samples is None:
        source = SOURCES.get(config.data.source)
        if source is None or source.train_size is None or config.data.partition == "local":
            return _complain(["--samples: not known without the data; give those of a client"])
        samples = source.train_size / config.clients.number
        samples = min(samples, config.data.max_samples or samples)
    elif not 1 <= samples < float("inf"):
        return _complain([f"--samples {samples:g}: must be at least 1"])
    from fl_report.cost import cost_table, report
    from fl_server.roster import draw

    try:
        told = report(plan, samples, lambda t: draw(config.clients, config.run.seed, t))
    except ValueError as error:
        return _complain([str(error)])
    if args.json:
        print(json.dumps(told.as_json(), indent=2))
    else:
        _print(cost_table(told))
    return OK


def _plan(args: argparse.Namespace, defaults: dict[str, Scalar]) -> Plan:
    """The model and groups that settings and options ask for; `defaults` go under the settings.
    Raises ConfigError."""
    from fl_common.config import ConfigError, resolve

    given, errors = _settings(args)
    shape, classes = None, args.classes
    if args.shape is not None:
        try:
            shape = tuple(int(side) for side in args.shape.split(","))
        except ValueError:
            shape = ()
        if len(shape) not in (1, 3) or min(shape) < 1:
            errors.append(f"--shape {args.shape}: write an image as C,H,W, e.g. 3,32,32, or F")
    if classes is not None and classes < 1:
        errors.append(f"--classes {classes}: must be at least 1")
    if shape is not None or classes is not None:
        defaults = {"data.source": "folder"}  # one's own, of which nothing is known beforehand
    # Nodes elsewhere have the data: none is read here, and a missing data.path is no mistake.
    values = {"strategy.name": "fedpart"} | defaults | given | {"engine.name": "grpc"}
    config = resolve(values, absolute_paths=False, also=errors)
    from fl_common.determinism import prepare_process
    from fl_report.cost import Plan

    prepare_process()
    try:
        return Plan.of(config, shape, classes)
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error


def _print(table: RenderableType) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _run(args: argparse.Namespace) -> int:
    from fl_common.config import ConfigError, absolute_paths, resolve
    from fl_server.recorder import (
        folder_error,
        read_summary,
        results_folder,
        resume_error,
        stored_config,
        timestamp,
    )

    try:
        given, errors = _settings(args)
        values = absolute_paths(given)
        values["run.output-dir"] = values.get("run.output-dir") or str(Path.cwd() / "results")
        resume = values.get("run.resume") is True
        if not resume:
            values["run.name"] = values.get("run.name") or timestamp()
        folder = results_folder(str(values["run.output-dir"]), str(values.get("run.name", "")))
        if resume and values.get("run.name"):
            if problem := resume_error(folder, values):
                return _complain([*errors, problem])
            values = {**stored_config(folder), **values}
        config = resolve(values, also=errors)
    except ConfigError as error:
        return _complain(error.errors)
    if resume:
        reached = read_summary(folder)
        if (reached.get("status"), reached.get("rounds")) == ("completed", config.run.rounds):
            print(f"{folder}: completed, all {config.run.rounds} rounds; nothing is left to do")
            return OK
    elif problem := folder_error(folder):
        return _complain([problem])
    if config.client.state_dir and config.engine.name != "grpc":
        from fl_client.node import NodeError, check_state_dir

        try:
            check_state_dir(Path(config.client.state_dir))
        except NodeError as error:
            return _complain([f"client.{error}"])
    if config.engine.name != "grpc":  # there, it is the server that needs them
        from fl_server.tracking import missing

        if problems := missing(config.tracking.names):
            return _complain(problems)
    engines = {"inprocess": _run_inprocess, "ray": _run_ray, "grpc": _run_grpc}
    return engines[config.engine.name](config, folder)


def _resume(args: argparse.Namespace) -> int:
    folder = args.folder.expanduser().absolute()
    place = [f"run.output-dir={folder.parent}", f"run.name={folder.name}", "run.resume=true"]
    args.values = [*place, *args.values]
    return _run(args)


def _run_inprocess(config: CoreConfig, folder: Path) -> int:
    from flwr.app import Context, RecordDict

    from fl_client.app import app as client_app
    from fl_common.data.errors import DataError
    from fl_server.app import app as server_app
    from fl_server.exchange import RunFailed
    from fl_server.inprocess import InProcessGrid
    from fl_server.recorder import record_setting
    from fl_server.workers import count

    try:
        workers = count(config)
    except ValueError as error:
        return _complain([str(error)])
    values = config.flat()

    def chosen(number: int, why: str) -> None:
        """A run that goes on later trains as many clients at once."""
        record_setting(folder, "engine.cohort", str(number))
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


def _run_ray(config: CoreConfig, folder: Path) -> int:
    from fl_server.bundle import app_directory
    from fl_server.flower_run import run_simulation
    from fl_server.progress import Screen

    try:
        with app_directory() as app_dir, Screen(config.run.rounds) as screen:
            status = run_simulation(
                app_dir, config.flat(), clients=config.clients.number, on_line=screen
            )
    except RuntimeError as error:
        return _failed(str(error))
    return _outcome(status, folder)


def _run_grpc(config: CoreConfig, folder: Path) -> int:
    from fl_server.bundle import app_directory
    from fl_server.federation import UsageError, connection
    from fl_server.flower_run import run_on_connection
    from fl_server.progress import Screen

    try:
        link = connection(config.engine.connection)
    except UsageError as error:
        return _complain([str(error)])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        with app_directory() as app_dir, Screen(config.run.rounds) as screen:
            status = run_on_connection(
                app_dir, config.flat(), link.name, flower_home=link.flower_home, on_line=screen
            )
    except RuntimeError as error:
        return _failed(str(error))
    return _outcome(status, folder, elsewhere=not link.on_this_machine)


def _outcome(status: FlowerStatus, folder: Path, *, elsewhere: bool = False) -> int:
    """What Flower and the results folder, unless it is on another machine, say of a run."""
    import json

    from fl_server.recorder import SUMMARY

    try:
        reached = json.loads((folder / SUMMARY).read_text())["status"]
    except OSError:
        reached = "completed" if elsewhere and status.completed else "no summary"
    if status.completed and reached == "completed":
        return OK
    why = f"{reached}; Flower says {status.status} {status.details}".strip()
    if reached == "running":  # nobody was left to say more
        why = f"its process ended; {why}\ncontinue it with: flatfed resume {folder}"
    return _failed(why)


def _failed(why: str) -> int:
    print(f"error: the run failed: {why}", file=sys.stderr)
    return FAILED


def _node(args: argparse.Namespace) -> int:
    from fl_client.node import Node, NodeError, check, serve

    try:
        config = _node_config(args)
        node = Node(
            superlink=args.superlink,
            config=config,
            root_certificates=args.root_certificates,
            auth_key=args.auth_key,
            insecure=args.insecure,
            port=args.port,
            poll_interval=args.poll_interval,
            wait=args.wait,
            preload=not args.no_preload,
            worker=args.worker,
            trusted_entities=args.trusted_entities,
        )
        check(node)
        return serve(node)
    except NodeError as error:
        return _complain([str(error)])


def _node_config(args: argparse.Namespace) -> dict[str, Scalar]:
    """Options and key=value as Flower's node config, paths absolute.  Raises NodeError."""
    from fl_client.node import NodeError, default_state_dir
    from fl_common.config import NODE_KEYS, from_text

    config: dict[str, Scalar] = {}
    for item in args.values:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise NodeError(f"{item}: node-config keys are written key=value")
        if key in NODE_KEYS:
            config[key] = from_text({NODE_KEYS[key]: text})[NODE_KEYS[key]]
        else:
            config[key] = int(text) if text.removeprefix("-").isdecimal() else text
    options = {
        "partition-id": args.partition,
        "data-path": args.data_path,
        "state-dir": args.state_dir,
        "device": args.device,
        "threads": args.threads,
    }
    for key, value in options.items():
        if value is not None and key in config:
            raise NodeError(f"{key}: given twice, {value} and {config[key]}")
        if value is not None:
            config[key] = value if isinstance(value, int) else str(value)
    config.setdefault("state-dir", str(default_state_dir()))
    for key in ("data-path", "state-dir", "worker-socket"):
        if key in config:
            config[key] = str(Path(str(config[key])).expanduser().absolute())
    return config


def _worker(args: argparse.Namespace) -> int:
    from fl_client.worker import run

    try:
        run(str(args.socket.expanduser().absolute()))
    except OSError as error:
        return _complain([f"--socket {args.socket}: {error.strerror or error}"])
    return OK


def _certs(args: argparse.Namespace) -> int:
    from fl_server.certificates import CA, CA_KEY, KEYS, NODES, SERVER, SERVER_KEY, issue
    from fl_server.keys import KeysError

    folder = args.folder.expanduser().absolute()
    try:
        found = issue(folder, args.host, args.nodes, days=args.days)
    except KeysError as error:
        return _complain([str(error)])
    print(f"{folder}:")
    ends = {name: f"until {end:%Y-%m-%d %H:%M} UTC" for name, end in found.ends.items()}
    names, count = ", ".join(found.hosts), f"{len(found.nodes)} nodes' keys"
    for name, what in (
        (CA, f"{ends[CA]}; to every node, and to whoever submits runs"),
        (CA_KEY, "signs; leaves this folder for a safe place only"),
        (SERVER, f"{ends[SERVER]}, for {names}; the SuperLink's --ssl-certfile"),
        (SERVER_KEY, "the SuperLink's --ssl-keyfile; stays on the server"),
        (NODES, f"{count}; I to the node of partition I alone (--auth-key); I.pub stays here"),
        (KEYS, "to the server: `flatfed register`, and the setting clients.keys"),
    ):
        print(f"  {'new' if name in found.made else 'old'} {name:<10} {what}")
    return OK


def _register(args: argparse.Namespace) -> int:
    import os

    from fl_server.federation import UsageError, connection
    from fl_server.flower_run import ENVIRONMENT, direct
    from fl_server.keys import KeysError, read_keys, register

    try:
        keys, link = read_keys(args.keys), connection(args.connection)
    except (KeysError, UsageError) as error:
        return _complain([str(error)])
    os.environ |= {**ENVIRONMENT, **direct(), "FLWR_HOME": str(link.flower_home)}
    try:
        register(keys, link, remove=args.remove)
    except KeysError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return OK


def _up(args: argparse.Namespace) -> int:
    from fl_server.federation import FederationError, UsageError, up

    options = list(args.values)
    for name in ("device", "threads", "poll_interval"):
        if (value := getattr(args, name)) is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    options += ["--no-preload"] * args.no_preload + ["--worker"] * args.worker
    try:
        up(
            args.clients,
            insecure=args.insecure,
            data_paths=[str(path) for path in args.data_path],
            node_options=options,
        )
    except UsageError as error:
        return _complain([str(error)])
    except FederationError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return OK


def _down(args: argparse.Namespace) -> int:
    from fl_server.federation import FederationError, UsageError, down

    try:
        down()
    except UsageError as error:
        return _complain([str(error)])
    except FederationError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return OK
