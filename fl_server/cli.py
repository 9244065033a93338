"""The `flatfed` command: one front door to every engine.

Exit codes: 0 done, 2 a mistake in the call (nothing was started), 3 the run failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_common.config import CoreConfig, Scalar

OK, USAGE, FAILED, INTERRUPTED = 0, 2, 3, 130

EXAMPLES = """\
examples:
  flatfed run
      ten clients train on real handwritten digits, in this process
  flatfed run strategy.name=fedprox fedprox.mu=0.01 clients.per-round=5 run.rounds=20
  flatfed run data.source=cifar10 data.path=CIFAR10_DIR model.name=lenet64 clients.number=100
  flatfed run engine.name=ray
      the same run, with the same result, on Flower's simulation
  flatfed config
      every key with its default and meaning
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
        "--config", type=Path, metavar="FILE.toml", help="settings from a file; key=value wins"
    )
    raw = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    run = commands.add_parser("run", parents=[settings], help="train a model", **raw)
    run.set_defaults(function=_run)
    config = commands.add_parser(
        "config", parents=[settings], help="print all settings with their meaning, as TOML"
    )
    config.add_argument(
        "--write-pyproject",
        action="store_true",
        help="write the defaults into ./pyproject.toml, where Flower looks for them",
    )
    config.set_defaults(function=_config)
    args = parser.parse_args(argv)
    try:
        return args.function(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def entry_point() -> None:
    sys.exit(main())


def _complain(lines: Sequence[str]) -> int:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return USAGE


def _settings(args: argparse.Namespace) -> dict[str, Scalar]:
    """The values of the file and of the command line over it.  Raises ConfigError."""
    from fl_common.config import ConfigError, flatten, from_text

    errors, values = [], {}
    if args.config:
        import tomllib

        try:
            values = flatten(tomllib.loads(args.config.read_text()))
        except OSError as error:
            errors.append(f"--config {args.config}: {error.strerror}")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            errors.append(f"--config {args.config}: not a TOML file: {error}")
    given: dict[str, str] = {}
    for item in args.values:
        key, equals, value = item.partition("=")
        if not equals:
            errors.append(f"{item}: settings are written key=value")
        elif key in given:
            errors.append(f"{key}: given twice, {given[key]!r} and {value!r}")
        given[key] = value
    if errors:
        raise ConfigError(errors)
    return values | from_text(given)


def _config(args: argparse.Namespace) -> int:
    from fl_common.config import ConfigError, resolve
    from fl_common.pyproject import as_toml, write_pyproject

    try:
        config = resolve(_settings(args), absolute_paths=False)
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


def _run(args: argparse.Namespace) -> int:
    from fl_common.config import ConfigError, absolute_paths, resolve
    from fl_server.recorder import folder_error, results_folder, timestamp

    try:
        values = absolute_paths(_settings(args))
        values["run.output-dir"] = values.get("run.output-dir") or str(Path.cwd() / "results")
        values["run.name"] = values.get("run.name") or timestamp()
        config = resolve(values)
    except ConfigError as error:
        return _complain(error.errors)
    folder = results_folder(config.run.output_dir, config.run.name)
    if problem := folder_error(folder):
        return _complain([problem])
    engine = _run_inprocess if config.engine.name == "inprocess" else _run_ray
    return engine(config, folder)


def _run_inprocess(config: CoreConfig, folder: Path) -> int:
    from flwr.app import Context, RecordDict

    from fl_client.app import app as client_app
    from fl_common.data.errors import DataError
    from fl_server.app import app as server_app
    from fl_server.inprocess import InProcessGrid
    from fl_server.roster import RunFailed

    values = config.flat()
    grid = InProcessGrid(client_app, config.clients.number, values)
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
    return OK


def _run_ray(config: CoreConfig, folder: Path) -> int:
    import json

    from fl_server.bundle import app_directory
    from fl_server.flower_run import run_simulation
    from fl_server.recorder import SUMMARY

    try:
        with app_directory() as app_dir:
            status = run_simulation(app_dir, config.flat(), clients=config.clients.number)
    except RuntimeError as error:
        print(f"error: the run failed: {error}", file=sys.stderr)
        return FAILED
    summary = folder / SUMMARY
    reached = json.loads(summary.read_text())["status"] if summary.exists() else "no summary"
    if status.completed and reached == "completed":
        return OK
    why = f"{status.status} {status.details}".strip()
    print(f"error: the run failed: {reached}; Flower says {why}", file=sys.stderr)
    return FAILED
