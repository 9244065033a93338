"""The ClientApp: Flower's messages in, the resident `Clients` answers, replies out.

Only the standard library and Flower are imported until a message needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import Message
from flwr.clientapp import ClientApp

from fl_common import determinism  # noqa: F401  (sets MKL's environment before torch loads)

if TYPE_CHECKING:
    from flwr.app import Context

    from fl_client.client import Clients

app = ClientApp()

_resident: list[tuple[dict[str, object], Clients]] = []
"""The clients of this process with the run config that they serve; at most one."""


def resident(context: Context) -> Clients:
    """The clients for this run config: those of the last message, or new ones."""
    run_config = dict(context.run_config)
    if not _resident or _resident[0][0] != run_config:
        from fl_client.client import Clients
        from fl_common.config import resolve

        release()
        _resident.append((run_config, Clients(resolve(run_config))))
    return _resident[0][1]


def release() -> None:
    """Let go of the resident model and data."""
    _resident.clear()


def partition_of(context: Context) -> int:
    return int(context.node_config["partition-id"])


@app.query()
def query(message: Message, context: Context) -> Message:
    """The roll call: who is here, with how many samples of which labels."""
    return Message(resident(context).describe(partition_of(context)), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One local round."""
    content = message.content
    reply = resident(context).train(
        partition_of(context),
        int(content["config"]["server-round"]),
        content["arrays"],
        context.state,
    )
    return Message(reply, reply_to=message)
