"""The `flatfed` command: one front door to every engine.

Exit codes: 0 done, 2 a mistake in the call (nothing was started), 3 the run failed, 130 Ctrl-C,
141 the reader of the output has gone, 143 SIGTERM to a run or a suite.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fl_common import processes
from fl_server import node_commands, result_commands, run_commands
from fl_server.console import INTERRUPTED, PIPE_CLOSED, complain

if TYPE_CHECKING:
    from collections.abc import Sequence


EXAMPLES = """\
examples:
  flatfed run
      ten clients train on real handwritten digits, on this machine
  flatfed run strategy.name=fedprox fedprox.mu=0.01 clients.per-round=5 run.rounds=20
  flatfed run data.source=cifar10 data.path=CIFAR10_DIR model.name=lenet64 clients.number=100
  flatfed run engine.name=ray
      the same run, with the same result, on Flower's simulation
  flatfed up --clients 4 && flatfed run engine.name=grpc clients.number=4 && flatfed down
      the same on separate processes, as it would be on several machines
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


class _Version(argparse.Action):
    """Prints what the machines of a federation compare, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fl_common.fingerprint import code_sha256, installed

        versions = ", ".join(f"{name} {version}" for name, version in installed().items())
        print(f"{versions}, code {code_sha256()[:12]}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; gives the exit code."""
    args = _parse(argv)
    if path := os.environ.get("PYTHONPATH"):  # for processes that start in other folders
        os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    try:
        code = args.function(args)
        sys.stdout.flush()
        return code
    except ValueError as error:
        from fl_common.config import ConfigError  # pydantic takes longer to import than --help

        if not isinstance(error, ConfigError):
            raise
        return complain(error.errors)
    except BrokenPipeError:  # the reader has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with what carries the command out as `function`.  Raises SystemExit."""
    parser = argparse.ArgumentParser(
        prog="flatfed",
        description="Federated learning for clients whose data differ.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print what is installed here")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument(
        "values",
        nargs="*",
        default=[],  # else argparse calls them required
        metavar="key=value",
        help="a setting, e.g. train.lr=0.05",
    )
    settings.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        action="append",
        default=[],
        help="settings from a file; may be given several times: a later file overrides earlier "
        "ones, key=value overrides all",
    )
    of_runs = argparse.ArgumentParser(add_help=False)
    of_runs.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="results folders")
    of_runs.set_defaults(values=[])
    _add_run_commands(commands, settings)
    _add_table_commands(commands, of_runs)
    _add_flatness_command(commands, of_runs)
    _add_suite_command(commands)
    _add_config_command(commands, settings)
    _add_cost_commands(commands, settings)
    _add_federation_commands(commands)
    _add_key_commands(commands)
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on settings that stand behind an option: they are settings all the same.
    if not hasattr(args, "values"):
        parser.parse_args(argv)
    elif any(item.startswith("-") for item in rest):
        hint = "" if hasattr(args, "folders") else "; settings are written key=value"
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    else:
        args.values += rest
    return args


def _add_run_commands(
    commands: argparse._SubParsersAction, settings: argparse.ArgumentParser
) -> None:
    raw = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    run = commands.add_parser("run", parents=[settings], help="train a model", **raw)
    run.set_defaults(function=run_commands.run)
    of_run = argparse.ArgumentParser(add_help=False)
    of_run.add_argument("folder", type=Path, metavar="DIR", help="the run's results folder")
    again = commands.add_parser(
        "resume",
        parents=[of_run, settings],
        help="continue a run that ended early, from its newest checkpoint",
    )
    again.set_defaults(function=run_commands.resume)


def _add_table_commands(
    commands: argparse._SubParsersAction, of_runs: argparse.ArgumentParser
) -> None:
    compare = commands.add_parser(
        "compare", parents=[of_runs], help="compare several runs in a table, and in a picture"
    )
    compare.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the accuracies too")
    compare.add_argument("--anyway", action="store_true", help="compare runs of different data too")
    compare.set_defaults(function=result_commands.compare)
    norms = commands.add_parser(
        "grad-norm",
        parents=[of_runs],
        help="how the gradient's norm jumps when models are averaged",
        description="For runs with eval.grad-norm=true: the norm of the local gradient in "
        "the first quarter of a round, divided by that in the last quarter of the round before.",
    )
    norms.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="draw the norm, step by step"
    )
    norms.set_defaults(function=result_commands.grad_norm)
    report = commands.add_parser(
        "report", parents=[of_runs], help="make one HTML page of a run, or of several side by side"
    )
    report.add_argument("--out", type=Path, metavar="FILE.html", help="where to write it (default: "
        "report.html in the run's folder, or here if there are several)")  # fmt: skip
    report.add_argument("--target", type=float, metavar="ACCURACY", help="show the rounds, bytes "
        "and seconds it took to reach this, 0-1 (default: 90 %% of the best)")  # fmt: skip
    report.add_argument("--anyway", action="store_true", help="report runs of different data too")
    report.set_defaults(function=result_commands.report)


def _add_flatness_command(
    commands: argparse._SubParsersAction, of_runs: argparse.ArgumentParser
) -> None:
    flatness = commands.add_parser(
        "flatness",
        parents=[of_runs],
        help="measure how flat the loss is at the final models of runs",
        description="Eigenvalues and trace of the Hessian of the test loss at the final models of "
        "runs, as a table and in each DIR/flatness.json. A run with flatness.every records the "
        "same while it trains.",
    )
    add = flatness.add_argument
    add("--samples", type=int, default=1024, metavar="N", help="test samples to measure on, "
        "drawn once; also the most samples for a client's diagonal (default: 1024)")  # fmt: skip
    add(
        "--top",
        type=int,
        default=5,
        metavar="K",
        help="how many of the largest eigenvalues (default: 5)",
    )
    add("--probes", type=int, default=32, metavar="N", help="random vectors for the trace; its "
        "error falls with the square root of their number (default: 32)")  # fmt: skip
    add(
        "--density", action="store_true", help="also the density of all eigenvalues, with a picture"
    )
    add("--layers", action="store_true", help="also lambda_max, trace and activation norms of "
        "every layer, as a table and bars; each layer costs about as much again")  # fmt: skip
    add("--landscape", action="store_true", help="also draw the loss over a plane of two "
        "directions, as contours and as a surface; 441 passes over the samples")  # fmt: skip
    add("--line", action="store_true", help="also draw the loss along the first of these "
        "directions, all runs in one picture; 41 passes over the samples")  # fmt: skip
    add("--directions", choices=("random", "eigenvectors"), help="for --landscape and "
        "--line: random, each filter scaled to the length of the model's, or the top eigenvectors, "
        "of length 1 (default: random)")  # fmt: skip
    add("--match", action="store_true", help="also H_N and H_D, FedAlign's measures of how much "
        "the clients' Hessians differ, over the run's own partitions")  # fmt: skip
    add("--match-probes", type=int, metavar="N", help="random vectors for each client's "
        "diagonal, an even number (default: 200)")  # fmt: skip
    add("--engine", choices=("own", "pyhessian"), default="own", help="what computes "
        "eigenvalues, trace and density; pyhessian needs `pip install "
        "'flatfed[pyhessian]'` (default: own)")  # fmt: skip
    add("--data-path", type=Path, metavar="PATH", help="where the data are now, if they are no "
        "longer at the runs' data.path")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="seed of the samples and random vectors, "
        "the same for all runs; the same seed gives the same bits (default: 0)")  # fmt: skip
    add("--pictures", type=Path, metavar="FOLDER", help="one folder for the pictures of all "
        "runs (default: each run's own folder)")  # fmt: skip
    flatness.set_defaults(function=result_commands.flatness)


def _add_suite_command(commands: argparse._SubParsersAction) -> None:
    suite = commands.add_parser(
        "suite",
        help="run the table of a paper, and show it beside the published one",
        description="Runs the cells of a suite (experiments/*.toml) that are missing, then prints "
        "and writes published | ours | difference, and a page of all runs. Called again, it "
        "continues where it stopped.",
    )
    add = suite.add_argument
    add("file", type=Path, metavar="FILE.toml", help="the suite; docs/suites.md has the format")
    add("values", nargs="*", metavar="key=value", help="a setting of every cell, e.g. data.path=D")
    add(
        "--reduced",
        action="store_true",
        help="the smaller version in its [reduced], which fits a CPU",
    )
    add("--device", metavar="NAME", help="auto, cpu, cuda or cuda:K")
    add("--jobs", type=int, default=1, metavar="N", help="cells to run at once (default: 1)")
    add("--cells", default="", metavar="PATTERN", help="run only missing cells with such names, "
        "e.g. '*_seed2' (default: all)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="where the suites' folders are made (default: "
        "results/suites)")  # fmt: skip
    add(
        "--table",
        action="store_true",
        help="make the table of the runs that are there; run nothing",
    )
    add(
        "--publish",
        type=Path,
        metavar="DIR",
        help="the same, and write it to DIR: NAME.md, NAME.json and a picture",
    )
    suite.set_defaults(function=result_commands.suite, config=[])


def _add_config_command(
    commands: argparse._SubParsersAction, settings: argparse.ArgumentParser
) -> None:
    config = commands.add_parser(
        "config", parents=[settings], help="print all settings with their meaning, as TOML"
    )
    config.add_argument(
        "--write-pyproject",
        action="store_true",
        help="write the defaults into ./pyproject.toml, where Flower looks for them",
    )
    config.set_defaults(function=run_commands.config)


def _add_cost_commands(
    commands: argparse._SubParsersAction, settings: argparse.ArgumentParser
) -> None:
    of_data = argparse.ArgumentParser(add_help=False)
    of_data.add_argument("--shape", metavar="C,H,W", help="shape of a sample, (C, H, W), (F,), or "
        "(V, L) of token ids, if data.source does not say (default: 3,32,32)")  # fmt: skip
    of_data.add_argument("--classes", type=int, metavar="N", help="number of classes, if "
        "data.source does not say (default: 10)")  # fmt: skip
    of_model = argparse.ArgumentParser(add_help=False)
    of_model.add_argument("model", metavar="MODEL", help="its name, or package.module:Name")
    groups = commands.add_parser(
        "groups",
        parents=[of_model, settings, of_data],
        help="list the groups of layers that partial updates train in turn",
        description="The groups of a model: what is trained and sent together in a round of "
        "strategy.name=fedpart. fedpart.groups sets other ones, model.norm and model.head are "
        "respected, and data.source gives the shape of a sample and the classes.",
    )
    groups.set_defaults(function=result_commands.groups)
    cost = commands.add_parser(
        "cost",
        parents=[settings, of_data],
        help="bytes and multiply-adds of partial updates, beside those of full ones",
        description="What a run with strategy.name=fedpart and these settings costs, beside one "
        "with full updates: as the paper counts (Wang et al., NeurIPS 2024) and as it really is. "
        "Nothing is trained.",
    )
    cost.add_argument("--samples", type=float, metavar="N", help="training samples of a client "
        "(default: those of data.source, divided by clients.number)")  # fmt: skip
    cost.add_argument("--json", action="store_true", help="print exact numbers, as JSON")
    cost.set_defaults(function=result_commands.cost)


def _add_federation_commands(commands: argparse._SubParsersAction) -> None:
    of_node = argparse.ArgumentParser(add_help=False)
    add = of_node.add_argument
    add("values", nargs="*", metavar="key=value", help="more keys for Flower's --node-config")
    add("--insecure", action="store_true", help="no TLS: only on a network that you trust")
    add("--device", metavar="NAME", help="auto, cpu, cuda or cuda:K")
    add("--threads", type=int, metavar="N", help="torch threads")
    add("--poll-interval", type=float, default=0.2, metavar="S", help="pause between two requests "
        "for work [s]; after long idleness it grows, up to 3 s (default: 0.2)")  # fmt: skip
    add("--no-preload", action="store_true", help="import torch again for every message")
    add("--worker", action="store_true", help="keep a resident trainer, with model, data and "
        "device, between messages; useful above all with a GPU")  # fmt: skip

    up = commands.add_parser("up", parents=[of_node], help="start a federation on this machine")
    up.add_argument("--clients", type=int, required=True, metavar="N", help="how many nodes")
    up.add_argument("--data-path", type=Path, action="append", default=[], metavar="PATH",
        help="the nodes' data: given once for all nodes, or once for each")  # fmt: skip
    up.set_defaults(function=node_commands.up)

    down = commands.add_parser("down", help="end the federation that `flatfed up` started")
    down.set_defaults(function=node_commands.down)

    node = commands.add_parser(
        "node", parents=[of_node], help="take part in a federation as one client"
    )
    add = node.add_argument
    add("--superlink", required=True, metavar="HOST:PORT", help="the server's address for nodes")
    add("--partition", type=int, metavar="N", help="this node's number, counted from 0")
    add("--root-certificates", type=Path, metavar="FILE", help="the CA of the server (ca.crt)")
    add("--auth-key", type=Path, metavar="FILE", help="this node's private key")
    add("--trusted-entities", type=Path, metavar="FILE", help="run only apps signed by one of "
        "these, through Flower's hub (docs/security.md)")  # fmt: skip
    add("--data-path", type=Path, metavar="PATH", help="this node's data")
    add("--state-dir", type=Path, metavar="PATH", help="where this node keeps what it remembers "
        "between rounds (default: $FLATFED_HOME/state or ~/.flatfed/state)")  # fmt: skip
    add(
        "--port",
        type=int,
        default=0,
        metavar="N",
        help="port of the node's own loopback API (default: any free one)",
    )
    add("--wait", type=float, default=3.0, metavar="S",
        help="how long to wait for the server to come up [s] (default: 3)")  # fmt: skip
    node.set_defaults(function=node_commands.node)

    worker = commands.add_parser("worker", help="serve as a node's resident trainer",
        description="Holds model, data and device for a node that is started with "
        """--node-config 'worker-socket="PATH" ...'; `flatfed node --worker` starts one by """
        "itself.")  # fmt: skip
    worker.add_argument("--socket", type=Path, required=True, metavar="PATH", help="socket on "
        "which the node's messages arrive; open to this user only")  # fmt: skip
    worker.set_defaults(function=node_commands.worker)


def _add_key_commands(commands: argparse._SubParsersAction) -> None:
    certs = commands.add_parser(
        "certs",
        help="make certificates and keys for a federation",
        description="Makes a CA, the server's certificate, a key per node, and keys.json, the "
        "public keys by partition (clients.keys). Called again, it keeps the CA and all keys, adds "
        "nodes up to --nodes, and with --host makes a new server certificate.",
    )
    add = certs.add_argument
    add(
        "folder",
        type=Path,
        metavar="DIR",
        help="a folder for these files only, which only you can read",
    )
    add("--host", action="append", default=[], metavar="NAME", help="a name or IP address by which "
        "nodes and users reach the server; may be given several times")  # fmt: skip
    add("--nodes", type=int, default=0, metavar="N", help="keys for partitions 0 to N-1")
    add("--days", type=float, default=365, metavar="D", help="how long the server's certificate "
        "is valid [days] (default: 365)")  # fmt: skip
    certs.set_defaults(function=node_commands.certs)

    register = commands.add_parser(
        "register", help="tell a SuperLink which nodes to let in, by their keys"
    )
    add = register.add_argument
    add(
        "keys",
        type=Path,
        metavar="keys.json",
        help="public keys by partition, made by `flatfed certs`",
    )
    add("connection", metavar="CONNECTION", help="the SuperLink's name in Flower's configuration")
    add("--remove", action="store_true", help="unregister all other nodes")
    register.set_defaults(function=node_commands.register)


def entry_point() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # progress is to be read now, through a pipe too
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's `&` ignores it
        processes.at_signal(signal.SIGINT, processes.interrupt)
    sys.exit(main())
