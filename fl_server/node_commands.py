"""The commands for federations: nodes, their keys, and processes of one machine; each gives its
exit code."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from fl_common.files import absolute_path
from fl_server.console import FAILED, OK, complain

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_common.config import Scalar


def node(args: argparse.Namespace) -> int:
    from fl_client.node import serve
    from fl_client.node_checks import Node, NodeError, check

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
        return complain([str(error)])


def _node_config(args: argparse.Namespace) -> dict[str, Scalar]:
    """Options and key=value as Flower's node config, paths absolute.  Raises NodeError."""
    from fl_client.node_checks import NodeError, default_state_dir
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
            config[key] = str(absolute_path(str(config[key])))
    return config


def worker(args: argparse.Namespace) -> int:
    from fl_client.worker import run

    try:
        run(str(absolute_path(args.socket)))
    except OSError as error:
        return complain([f"--socket {args.socket}: {error.strerror or error}"])
    return OK


def certs(args: argparse.Namespace) -> int:
    from fl_server.certificates import CA, CA_KEY, KEYS, NODES, SERVER, SERVER_KEY, issue
    from fl_server.keys import KeysError

    folder = absolute_path(args.folder)
    try:
        found = issue(folder, args.host, args.nodes, days=args.days)
    except KeysError as error:
        return complain([str(error)])
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
        state = "new" if name in found.made else "old"
        if name not in found.there:
            state, what = "---", "not here"
        print(f"  {state} {name:<10} {what}")
    return OK


def register(args: argparse.Namespace) -> int:
    import os

    from fl_common import sockets
    from fl_server.federation import UsageError, connection
    from fl_server.flower_run import ENVIRONMENT
    from fl_server.keys import KeysError, read_keys, register

    try:
        keys, link = read_keys(args.keys), connection(args.connection)
    except (KeysError, UsageError) as error:
        return complain([str(error)])
    os.environ |= {**ENVIRONMENT, **sockets.direct(), "FLWR_HOME": str(link.flower_home)}
    try:
        register(keys, link, remove=args.remove)
    except KeysError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return OK


def up(args: argparse.Namespace) -> int:
    from fl_client.node_checks import Node, NodeError, check_settings
    from fl_server import federation

    try:
        for data_path in args.data_path or [None]:
            of_node = {**vars(args), "partition": 0, "data_path": data_path, "state_dir": None}
            config = _node_config(argparse.Namespace(**of_node))
            poll_interval, worker = args.poll_interval, args.worker
            check_settings(Node("", config, poll_interval=poll_interval, worker=worker))
    except NodeError as error:
        return complain([str(error)])
    options = list(args.values)
    for name in ("device", "threads", "poll_interval"):
        if (value := getattr(args, name)) is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    options += ["--no-preload"] * args.no_preload + ["--worker"] * args.worker
    return _tried(
        lambda: federation.up(
            args.clients,
            insecure=args.insecure,
            data_paths=[str(path) for path in args.data_path],
            node_options=options,
        )
    )


def down(args: argparse.Namespace) -> int:
    from fl_server import federation

    return _tried(federation.down)


def _tried(act: Callable[[], object]) -> int:
    """Start or end the processes of a federation; gives the exit code."""
    from fl_server.federation import FederationError, UsageError

    try:
        act()
    except UsageError as error:
        return complain([str(error)])
    except FederationError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return OK
