"""The commands that look at results, make tables of them, or say what a run would cost; each gives
its exit code."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fl_common.results import REPORT
from fl_server.console import FAILED, INTERRUPTED, OK, TERMINATED, complain, settings_of, show

if TYPE_CHECKING:
    from types import ModuleType

    from fl_common.config import Scalar
    from fl_flatness.finished import Options
    from fl_flatness.report import Measured
    from fl_report.cost import Plan


def compare(args: argparse.Namespace) -> int:
    from fl_report import compare

    return _show_runs(args, compare, anyway=args.anyway)


def report(args: argparse.Namespace) -> int:
    from fl_report import compare, page, terminal

    folders = _folders(args)
    out = args.out or (folders[0] if len(folders) == 1 else Path()) / REPORT
    try:
        page.write(folders, out, args.target, anyway=args.anyway)
        table = terminal.text(page.summary_table(compare.read(folders), args.target))
    except OSError as error:
        remedy = "" if args.out else "; give another place with --out FILE.html"
        return complain([f"{error.filename or out}: {error.strerror or error}{remedy}"])
    except ValueError as error:
        return complain([str(error)])
    print(f"{table}\nreport: {out}")
    return OK


def suite(args: argparse.Namespace) -> int:
    from fl_common.config import absolute_paths
    from fl_report import suite_page
    from fl_report.suite import SuiteError
    from fl_server import suites

    given, errors = settings_of(args)
    if args.device is not None:
        if "train.device" in given:
            errors.append("train.device: given twice, by --device too")
        given["train.device"] = args.device
    if args.cells and (args.table or args.publish):
        errors.append("--cells: chooses what runs; leave it out with --table and --publish")
    if args.jobs < 1:
        errors.append(f"--jobs {args.jobs}: must be at least 1")
    if errors:
        return complain(errors)
    try:
        settings = absolute_paths(given)
        suite = suites.open_suite(
            args.file, settings, args.reduced, args.out, args.jobs, args.cells
        )
    except SuiteError as error:
        return complain(error.errors)
    failed: list[str] = []
    code = OK
    try:
        if not (args.table or args.publish):
            failed = suite.run()
        table = suite.table(args.publish)
        show(suite_page.terminal(table))
        for path in suite.write(table, args.publish):
            print(path)
        if args.publish and (index := args.publish / "README.md").exists():
            call = "python -m fl_report.suite_index"
            if call in index.read_text():
                print(f"and now the index: {call} > {index}")
    except BrokenPipeError:
        raise
    except (OSError, SuiteError) as error:  # a full disk may be why cells failed, too
        code = complain(str(error).splitlines())
    except (KeyboardInterrupt, SystemExit) as end:
        print(f"interrupted; continue with: {suite.command(places=True)}", file=sys.stderr)
        return TERMINATED if isinstance(end, SystemExit) else INTERRUPTED
    for name in failed:
        print(f"error: {name} failed; its log: {suite.log(name)}", file=sys.stderr)
    return FAILED if failed else code


def grad_norm(args: argparse.Namespace) -> int:
    from fl_report import grad_norm

    # Each run is compared with itself, so that their data need not be the same.
    return _show_runs(args, grad_norm, anyway=True)


def _show_runs(args: argparse.Namespace, report: ModuleType, *, anyway: bool) -> int:
    from fl_report.compare import read
    from fl_report.settings import different_data

    if args.picture and args.picture.suffix not in ("", ".png", ".pdf", ".svg", ".jpg"):
        return complain([f"--picture {args.picture}: give a name that ends in .png, .pdf, .svg "
            "or .jpg"])  # fmt: skip
    try:
        runs = read(_folders(args))
        if not anyway and (problem := different_data(runs)):
            raise ValueError(problem)
        table = report.table(runs)
        if args.picture:
            report.draw(runs, args.picture)
    except (OSError, ValueError) as error:
        return complain([str(error)])
    show(table)
    return OK


def _folders(args: argparse.Namespace) -> list[Path]:
    """The results folders, those that stand behind an option too."""
    return [*args.folders, *map(Path, args.values)]


def flatness(args: argparse.Namespace) -> int:
    from fl_flatness import finished, report
    from fl_flatness.stored import Stored
    from fl_report.compare import read

    options, errors = _flatness_options(args)
    if errors:
        return complain(errors)
    try:
        runs = read(_folders(args))
        loaded = [Stored.load(folder, args.data_path) for folder in _folders(args)]
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        return complain([str(error)])
    if args.match and (problems := list(filter(None, map(finished.unmatched, loaded)))):
        return complain(problems)
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
        _show_flatness(measured, args)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return OK


def _flatness_options(args: argparse.Namespace) -> tuple[Options, list[str]]:
    """What to measure, and the mistakes in that."""
    from fl_flatness import finished

    probes = finished.MATCH_PROBES if args.match_probes is None else args.match_probes
    options = finished.Options(
        samples=args.samples, top=args.top, probes=args.probes, density=args.density,
        layers=args.layers, landscape=args.landscape, line=args.line,
        directions=args.directions or "random", match=args.match, match_probes=probes,
        engine=args.engine, seed=args.seed,
    )  # fmt: skip
    errors = options.errors()
    if args.match_probes is not None and not args.match:
        errors.append(f"--match-probes {args.match_probes}: has no effect without --match")
    if args.directions and not (args.landscape or args.line):
        errors.append(
            f"--directions {args.directions}: has no effect without --landscape or --line"
        )
    return options, errors


def _show_flatness(measured: list[Measured], args: argparse.Namespace) -> None:
    """Print the tables, draw the pictures.  Raises OSError."""
    from fl_flatness import report

    show(report.table(measured))
    if args.layers:
        for one in measured:
            print()
            show(report.layer_table(one))
    alone = [([one], one.folder) for one in measured]
    for those, folder in [(measured, args.pictures)] if args.pictures else alone:
        for picture in report.draw(those, folder):
            print(picture)


def groups(args: argparse.Namespace) -> int:
    from fl_common.models.catalogue import MODELS

    # As a setting like any other, it is refused if it is given twice.
    args.values = [f"model.name={args.model}", *args.values]
    info = MODELS.get(args.model)
    takes_text = info is not None and info.input == "tokens"
    plan = _plan(args, {"data.source": "synthetic-text" if takes_text else "synthetic"})
    from fl_report.cost import groups_table

    show(groups_table(plan))
    return OK


def cost(args: argparse.Namespace) -> int:
    import json

    from fl_common.data.catalogue import SOURCES

    plan = _plan(args, {})
    config, samples = plan.config, args.samples
    if config.strategy.name != "fedpart":
        return complain([f"strategy.name = {config.strategy.name}: has no partial updates; "
            "leave it out: full updates are shown beside fedpart's anyway"])  # fmt: skip
    if samples is None:
        source = SOURCES.get(config.data.source)
        if source is None or source.train_size is None or config.data.partition == "local":
            return complain(["--samples: not known without the data; give those of a client"])
        samples = source.train_size / config.clients.number
        samples = min(samples, config.data.max_samples or samples)
    elif not 1 <= samples < float("inf"):
        return complain([f"--samples {samples:g}: must be at least 1"])
    from fl_report.cost import cost_table, report
    from fl_server.roster import draw

    try:
        told = report(plan, samples, lambda t: draw(config.clients, config.run.seed, t))
    except ValueError as error:
        return complain([str(error)])
    if args.json:
        print(json.dumps(told.as_json(), indent=2))
    else:
        show(cost_table(told))
    return OK


def _plan(args: argparse.Namespace, defaults: dict[str, Scalar]) -> Plan:
    """The model and groups that settings and options ask for; `defaults` go under the settings.
    Raises ConfigError."""
    from fl_common.config import ConfigError, resolve

    given, errors = settings_of(args)
    shape, classes = None, args.classes
    if args.shape is not None:
        try:
            shape = tuple(int(side) for side in args.shape.split(","))
        except ValueError:
            shape = ()
        if len(shape) not in (1, 2, 3) or min(shape) < 1:
            errors.append(
                f"--shape {args.shape}: write an image as C,H,W, e.g. 3,32,32, features as F, L of "
                "V token ids as V,L"
            )
    if classes is not None and classes < 1:
        errors.append(f"--classes {classes}: must be at least 1")
    if shape is not None or classes is not None:
        defaults = {"data.source": "folder"}  # a source of which nothing is known beforehand
    elif ":" in str(given.get("data.source", "")):
        errors.append("--shape: not known without the data; give that of a sample, and --classes")
    # Nodes elsewhere have the data: none is read here, and a missing data.path is no mistake.
    engine = {
        "engine.name": "grpc", "engine.workers": "auto", "engine.cohort": "1",
        "engine.client-gpus": 0.0,
    }  # fmt: skip
    values = {"strategy.name": "fedpart"} | defaults | given | engine
    config = resolve(values, absolute_paths=False, also=errors)
    from fl_common.determinism import prepare_process
    from fl_report.cost import Plan

    prepare_process()
    try:
        return Plan.of(config, shape, classes)
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error
