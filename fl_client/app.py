"""The ClientApp: Flower's messages in, the resident `Clients` answers, replies out.

Only the standard library and Flower are imported until a message needs torch.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from fl_common import (
    determinism,  # noqa: F401  (sets MKL's environment before torch loads)
    wire,
)
from fl_common.failures import Failed, harmless, reason
from fl_common.layout import PARAMS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from flwr.app import Context
    from flwr.clientapp.typing import ClientAppCallable

    from fl_client.client import Clients

app = ClientApp()

PARTITION_KEYS = ("partition-id", "num-partitions")
"""Settings of a node that do not change what its process holds."""

_resident: list[tuple[tuple[object, ...], Clients | Exception]] = []
"""This process's clients, or the error that making them raised, with their run and settings; at
most one entry."""


def explained(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The reply; errors are raised again with their class in the text, which is all that Flower's
    simulation passes on."""
    try:
        return call_next(message, context)
    except Exception as error:
        raise Failed(reason(error)) from error


def resident(context: Context) -> Clients:
    """The clients for these settings, of which the node's override the run's: those of the last
    message if it was the same run's and had the same settings, else new ones, whose data are as
    they are now.  An error in making them is raised again for later messages, without another try.
    """
    node = {k: v for k, v in context.node_config.items() if k not in PARTITION_KEYS}
    settings = (dict(context.run_config), node)
    key = (context.run_id, *settings)
    if not _resident or _resident[0][0] != key:
        from fl_client.client import Clients
        from fl_common.config import resolve, with_node

        release()
        made: Clients | Exception
        try:
            made = Clients(resolve(with_node(*settings)))
        except Exception as error:
            made = error
        _resident.append((key, made))
    found = _resident[0][1]
    if isinstance(found, Exception):
        raise found.with_traceback(None)
    return found


def release() -> None:
    """Let go of the resident model and data."""
    _resident.clear()


def partition_of(context: Context) -> int:
    """The client's name; Flower's simulation sets it, on real nodes `--node-config`."""
    if "partition-id" not in context.node_config:
        raise ValueError(
            'this node has no partition-id; start it with --node-config "partition-id=0"'
        )
    return int(context.node_config["partition-id"])


def answer(kind: str, content: RecordDict, context: Context) -> RecordDict:
    """The reply of this process's clients to a message."""
    clients, partition, state = resident(context), partition_of(context), context.state
    if kind == "train":
        return clients.train(partition, content, state)
    if kind == "evaluate":
        return clients.evaluate(partition, content, state)
    if wire.ARRAYS in content:
        return clients.curvature(partition, content)
    return clients.describe(partition)


def _reply(kind: str, message: Message, context: Context) -> Message:
    """The reply of this process, or of the node's resident trainer."""
    if path := context.node_config.get("worker-socket"):
        from fl_client.worker import ask

        return Message(ask(str(path), kind, message.content, context), reply_to=message)
    return Message(answer(kind, message.content, context), reply_to=message)


def private(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """With `dp-clip`, the node's own or the run's, clip what was learned in a round and add noise
    before it leaves: Flower's LocalDpMod.

    The numbers of a reply (loss, samples) stay as they are, and so does what the client remembers,
    which does not leave it.
    """
    values: Mapping[str, Any] = context.run_config
    if "dp-clip" in context.node_config:
        from fl_common.config import with_node

        values = with_node({}, context.node_config)
    clip, epsilon, delta = (
        float(values.get(f"client.{key}", 0.0)) for key in ("dp-clip", "dp-epsilon", "dp-delta")
    )
    reply = call_next(message, context)
    if not clip or reply.has_error():
        return reply
    sent = RecordDict({n: r for n, r in message.content.items() if n != wire.MEMORY})
    received, told = (
        [(n, *r) for n, r in content.items() if n not in (wire.CONFIG, wire.METRICS)]
        for content in (sent, reply.content)
    )
    if not told:  # it asks for what it has lost
        return reply
    for arrays in (received, told):
        if arrays != [(wire.ARRAYS, PARAMS)]:
            raise ValueError(
                f"dp-clip: {arrays} would leave this client without noise; use a model without "
                "BatchNorm (model.norm=group)"
            )
    import numpy
    from flwr.clientapp.mod import LocalDpMod

    # Flower draws from NumPy's global generator.  ClientApps that were forked from one process
    # would all draw the same noise, and it would cancel in the difference of two replies.
    numpy.random.seed()  # noqa: NPY002
    flower = logging.getLogger("flwr")
    level = flower.level
    flower.setLevel(logging.WARNING)  # it logs clip and noise with every reply
    try:
        # Two updates of norm C at most are 2 C apart.
        mod, asked = LocalDpMod(clip, 2 * clip, epsilon, delta), Message(sent, reply_to=message)
        return mod(asked, context, lambda *_: reply)
    finally:
        flower.setLevel(level)


@app.query(mods=[explained])
def query(message: Message, context: Context) -> Message:
    """The roll call: partition, samples and labels.  With a model: the diagonal of its Hessian on
    this client's data.  With a refusal: a line in the node's log, and an empty reply."""
    if why := message.content.get(wire.CONFIG, {}).get(wire.REFUSED):
        logging.getLogger("flwr").warning("the server refuses this node: %s", harmless(str(why)))
        return Message(RecordDict(), reply_to=message)
    return _reply("query", message, context)


@app.train(mods=[explained, private])
def train(message: Message, context: Context) -> Message:
    """One local round."""
    return _reply("train", message, context)


@app.evaluate(mods=[explained])
def evaluate(message: Message, context: Context) -> Message:
    """The model on this client's held-out samples."""
    return _reply("evaluate", message, context)
